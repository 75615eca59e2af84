"""`bpt-dist run-table` as a user starts it: runs side by side, one that fails, a worker that dies, a command that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from bpt_dist.commands.main import main
from bpt_dist.storage.lock import holder_of
from bpt_dist.storage.run_directory import read_status

COMMAND = [str(Path(sys.executable).with_name("bpt-dist")), "run-table"]
PROMPT = {"method": {"name": "prompt_tuning", "length": 3}, "target": {"lr": 0.3}}
JOINT = {"label": "bpt-joint", "target": {"joint": True, "sampling": "stochastic"}}
LOST = {"label": "lost", "method": {"name": "prompt_tuning", "init": "file", "init_file": "nowhere.npy"}, "target": {"lr": 0.3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def write_config(world: Path, folder: Path, *rows: dict[str, Any]) -> Path:
    plain = tiny_run.settings(world, {"name": "bpt"}, name="table", output=str(folder / "runs"))
    file = folder / "table.yaml"
    file.write_text(yaml.safe_dump({**plain, "rows": list(rows), "seeds": [0, 1]}))
    return file


def started(file: Path, *words: str, fault: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "BPT_FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, str(file), *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(folder: Path) -> dict[str, bytes]:
    """What the finished runs were started with: a run that is opened again adds to it."""
    files = sorted((folder / "runs" / "table").glob("*/status.json"))
    return {
        file.parent.name: (file.parent / "run.json").read_bytes()
        for file in files
        if json.loads(file.read_text())["state"] == "finished"
    }


def has_just_begun(folder: Path) -> bool:
    """Whether a run has recorded one or two steps of its six or more: a signal sent now meets it before its end."""
    logs = (folder / "runs" / "table").glob("*/metrics.jsonl")
    return any(0 < log.read_bytes().count(b"\n") <= 2 for log in logs)


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def cells(folder: Path) -> dict[tuple[str, str], int]:
    found = json.loads((folder / "runs" / "table" / "table.json").read_text())
    return {(row["method"], cell["task"]): cell["num_seeds"] for row in found["rows"] for cell in row["cells"]}


def test_a_failed_row_stops_no_other_a_dead_worker_is_replaced_and_nothing_is_trained_twice(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_config(world, tmp_path, PROMPT, LOST, JOINT)
    # Every worker is killed when it opens its second run: each of those runs is tried again by a new one.
    job = started(file, "--workers", "2", fault="run.opened,hit=2,kill")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 2, output
    assert "died and is tried once more" in output
    assert "lost-s0 FAILED (2)" in output
    assert set(finished(tmp_path)) == {"prompt_tuning-s0", "prompt_tuning-s1", "bpt-joint-s0", "bpt-joint-s1"}
    full = {(method, task): 2 for method in ("PT", "BPT*") for task in ("mood", "count")}
    assert cells(tmp_path) == full
    table = json.loads((tmp_path / "runs" / "table" / "table.json").read_text())
    assert [(each["run"], each["tasks"]) for each in table["missing"]] == [
        ("lost-s0", ["mood", "count"]),
        ("lost-s1", ["mood", "count"]),
    ]
    assert "nowhere.npy" in table["missing"][0]["reason"]
    assert "Missing: lost-s0 (mood, count)" in (tmp_path / "runs" / "table" / "table.md").read_text().replace("\\", "")
    before = finished(tmp_path)
    capfd.readouterr()
    assert main(["run-table", str(file), "--workers", "1"]) == 2
    assert "2 of 6 runs to train, in this process" in capfd.readouterr().out
    assert finished(tmp_path) == before
    # Without the row that cannot be trained, all is there; had one run met another T5 under that path, the table would name it.
    write_config(world, tmp_path, PROMPT, JOINT)
    record = tmp_path / "runs" / "table" / "bpt-joint-s1" / "backbone.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "backbone_hash": "0" * 64}))
    assert main(["run-table", str(file)]) == 0
    output = capfd.readouterr().out
    assert "all 4 runs are finished" in output
    assert "Not comparable: bpt-joint-s1 had another content of backbone than the other runs" in output
    assert output.count("Not comparable") == 1
    assert finished(tmp_path) == before


def test_a_stopped_and_a_killed_command_lose_nothing_that_was_finished(world: Path, tmp_path: Path) -> None:
    file = write_config(world, tmp_path, PROMPT, JOINT, {"label": "bpt"})
    slow = "step.after_update,sleep:0.3"
    job = started(file, "--workers", "2", fault=slow)
    wait_until(lambda: len(finished(tmp_path)) >= 1 and has_just_begun(tmp_path), job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 75, output
    assert "stopped with a checkpoint" in output, output
    after_stop = finished(tmp_path)
    assert 1 <= len(after_stop) < 6

    job = started(file, "--workers", "2", fault=slow)
    wait_until(lambda: len(finished(tmp_path)) > len(after_stop), job)
    job.kill()
    job.communicate()
    after_kill = finished(tmp_path)
    assert len(after_kill) < 6
    # The workers outlive the command by the seconds they need to stop; the next one waits for them.
    job = started(file, "--workers", "2")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert len(finished(tmp_path)) == 6
    assert {name: finished(tmp_path)[name] for name in after_kill} == after_kill
    assert cells(tmp_path) == {(method, task): 2 for method in ("PT", "BPT", "BPT*") for task in ("mood", "count")}
    assert not list((tmp_path / "runs").rglob("run.lock"))


def test_one_row_may_be_trained_alone_and_the_table_has_what_is_finished(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(json.dumps(PROMPT))  # YAML would write an alias of the same object
    file = write_config(world, tmp_path, {**PROMPT, "seeds": [1]}, {**other, "label": "other"})
    assert main(["run-table", str(file), "--row", "prompt_tuning", "--workers", "1"]) == 0
    output = capfd.readouterr().out
    assert "1 of 1 runs to train, in this process" in output
    assert "Missing, not trained yet: other-s0, other-s1" in output.replace("\\", "")
    assert set(finished(tmp_path)) == {"prompt_tuning-s1"}
    assert main(["run-table", str(file), "--row", "otter"]) == 2
    assert "--row: otter is no row of table; rows are prompt_tuning, other; did you mean other?" in capfd.readouterr().err
    assert main(["run-table", str(file), "--row", "other", "--choose", str(tmp_path / "chosen.yaml")]) == 2
    assert "--choose, --row: a choice needs every row" in capfd.readouterr().err


def test_each_run_may_be_a_job_of_the_deepspeed_launcher(world: Path, tmp_path: Path) -> None:
    file = write_config(world, tmp_path, JOINT)
    job = started(file, "--processes", "2", "seeds=0")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    folder = tmp_path / "runs" / "table" / "bpt-joint-s0"
    assert read_status(folder).state == "finished"
    assert json.loads((folder / "run.json").read_text())["openings"][-1]["world_size"] == 2


def test_a_killed_command_takes_the_job_it_launched_with_it(world: Path, tmp_path: Path) -> None:
    """Otherwise the next command would train a second job on the devices of the first."""
    file, folder = write_config(world, tmp_path, JOINT), tmp_path / "runs" / "table" / "bpt-joint-s0"
    job = started(file, "--processes", "2", "seeds=0", fault="step.after_update,sleep:2")
    wait_until(lambda: (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size > 0, job)
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 60
    while holder_of(folder) is not None:
        assert time.monotonic() < deadline, "the launched job lives on"
        time.sleep(0.2)
    assert read_status(folder).state == "stopped"
    job = started(file, "--processes", "2", "seeds=0")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert len(json.loads((folder / "run.json").read_text())["openings"]) == 2


def test_a_configuration_that_makes_no_table_is_refused_before_anything_starts(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_config(world, tmp_path, PROMPT)
    assert main(["run-table", str(file), "rows=null", "seeds=null"]) == 2
    assert "rows: is missing" in capfd.readouterr().err
    assert main(["run-table", str(file), "--workers", "2", "--processes", "2"]) == 2
    assert main(["run-table", str(file), "--choose", str(tmp_path / "chosen.yaml")]) == 2
    assert "evaluation.splits" in capfd.readouterr().err
    file = write_config(world, tmp_path, PROMPT, {**JOINT, "evaluation": {"splits": ["validation"]}})
    assert main(["run-table", str(file)]) == 2
    assert "bpt-joint is evaluated on ['validation'] and the table shows test rows" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_search_writes_the_rows_that_did_best_on_validation(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trials = [{"label": f"pt-{rate}", "method": {**PROMPT["method"]}, "target": {"lr": rate}} for rate in (0.01, 0.3)]
    file, chosen = write_config(world, tmp_path, *trials), tmp_path / "chosen.yaml"
    words = [str(file), "evaluation.splits=validation", "seeds=0", "--workers", "1"]
    assert main(["run-table", *words, "--choose", str(chosen)]) == 0
    results = {
        label: json.loads((tmp_path / "runs" / "table" / f"{label}-s0" / "results.json").read_text())
        for label in ("pt-0.01", "pt-0.3")
    }
    scores = {label: sum(e["value"] for e in entries if e["headline"]) / 2 for label, entries in results.items()}
    (row,) = yaml.safe_load(chosen.read_text())["rows"]
    assert f"pt-{row['target']['lr']}" == max(scores, key=lambda label: (scores[label], label == "pt-0.01"))
    assert f"pt-0.3 {scores['pt-0.3']:.1f}" in capfd.readouterr().out


def test_the_rows_of_a_quick_start_from_the_majority_to_the_ensemble(tmp_path: Path) -> None:
    """On the shipped backbone: what takes no training, what starts from nothing, from one prompt and from particles, both ways."""
    plain = {
        "name": "all", "output": str(tmp_path / "runs"),
        "method": {"name": "bpt", "length": 4, "num_particles": 2, "sigma_relative": 1.0},
        "backbone": "mini", "tracking": {"mlflow": False}, "figures": False, "seeds": [0, 1],
        "data": {"source_tasks": ["mini_nli"], "target_tasks": ["mini_rte", "mini_review"], "shots": 4, "max_eval_rows": 30},
        "source": {"steps": 2, "lr": 0.3}, "target": {"steps": 2, "batch_size": 2},
        "comparisons": ["prompt_tuning:untrained", "vanilla_transfer:prompt_tuning", "bpt:vanilla_transfer", "bpt/ensemble:bpt"],
        "rows": [
            {"label": "untrained", "method": {"name": "prompt_tuning", "length": 4}, "target": {"steps": 0}},
            {"method": {"name": "prompt_tuning", "length": 4}, "target": {"lr": 0.3}},
            {"method": {"name": "vanilla_transfer", "length": 4}, "target": {"lr": 0.3}},
            {"label": "bpt", "evaluation": {"predict": "ensemble"}},
        ],
    }  # fmt: skip
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert main(["run-table", str(file), "--workers", "1"]) == 0
    folder = tmp_path / "runs" / "all"
    table = (folder / "table.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ").replace("\\", "") for line in table.splitlines() if line.startswith("| ")]
    assert rows == [
        "Method", "*Without training*", "Majority class", "*One target task a run*", "PT [prompt_tuning]", "PT [untrained]",
        "Vanilla transfer PT", "BPT (MAP)", "BPT (ensemble)",
    ]  # fmt: skip
    numbers = json.loads((folder / "table.json").read_text())
    assert len(numbers["comparisons"]) == 4
    assert numbers["sentences"][-1] == "Compared: 2 seeds, mean of mini_rte, mini_review (accuracy)."
    assert numbers["rows"][1]["trainable_parameters"] == numbers["rows"][0]["trainable_parameters"]
    # The majority is counted in the rows that were evaluated.
    for entry in numbers["majority"]:
        answers = [json.loads(line)["target"] for line in (folder / "bpt-s0/target" / entry["task"] / "predictions.jsonl").open()]
        assert entry["mean"] == pytest.approx(100 * max(map(answers.count, answers)) / 30)


def test_quick_trains_the_smaller_version_and_leaves_the_whole_one_alone(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_config(world, tmp_path, PROMPT)
    assert main(["run-table", str(file), "--quick"]) == 2
    assert capfd.readouterr().err.endswith(
        "quick: is missing, so the file has no smaller version; add the section or leave out --quick\n"
    )
    file.write_text(file.read_text() + "quick: {seeds: [0], data: {target_tasks: [mood]}}\n")
    assert main(["run-table", str(file), "--workers", "1", "--quick"]) == 0
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/*/results.json")] == ["prompt_tuning-s0"]
    found = json.loads((tmp_path / "runs" / "table-quick" / "table.json").read_text())
    assert {cell["task"] for row in found["rows"] for cell in row["cells"]} == {"mood"}
    assert not (tmp_path / "runs" / "table").exists()
