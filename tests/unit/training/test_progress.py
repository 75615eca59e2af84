"""What a run says while it trains: each line names the run and the stage, and nothing is said twice."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import tiny_run

from bpt_dist import train
from bpt_dist.commands.train import show_log
from bpt_dist.config import RunConfig
from bpt_dist.training import optimizer
from bpt_dist.training.progress import StepProgress, log_name

STEPS = 5


@pytest.fixture(autouse=True)
def a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    show_log(first=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, **sections: object) -> RunConfig:
    stages = {"source": {"steps": STEPS, "log_every": 2}, "target": {"steps": STEPS, "log_every": 2, "eval_every": 2}}
    return tiny_run.load(
        folder, tiny_run.settings(world, {"name": "bpt"}, output=str(folder / "runs"), figures=False, **stages, **sections)
    )


def without_numbers(text: str) -> str:
    """Return lines with times and scores left out: what is left is the same in every run."""
    text = re.sub(r"\d+\.\d+", "0.0", text)
    return re.sub(r"\d:\d\d:\d\d", "0:00:00", text)


def test_a_run_says_what_it_does_and_a_finished_one_that_it_is(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(world, tmp_path)
    assert train.run_all(config) == 0
    run, at = f"1/1 {log_name(config)}", config.directory
    rate = "0.0 s/step | 0:00:00 left in this stage"
    steps = [f"step 2/5 | mean loss 0.0 of 2 steps | {rate}", f"step 4/5 | mean loss 0.0 of 2 steps | {rate}",
             f"step 5/5 | mean loss 0.0 of 1 step | {rate}"]  # fmt: skip
    lines = without_numbers(capsys.readouterr().err).splitlines()
    assert lines[:5] == [f"{run} | created {at}", f"{run} | source | running", *[f"{run} | source | {step}" for step in steps]]
    (task, *_) = config.data.target_tasks
    of_target = [line.removeprefix(f"{run} | target/{task} | ") for line in lines if f"| target/{task} |" in line]
    assert [line for line in of_target if line.startswith("step") and "validation" not in line] == steps
    assert [line.partition(" | ")[0] for line in of_target if "validation: " in line] == ["step 2/5", "step 4/5", "step 5/5"]
    assert re.match(rf"test of {task}: \w+ 0\.0, .*\| selected step [245]$", of_target[-1])
    assert lines[-1] == f"{run} | finished: results in {at / 'results.json'}"
    assert train.run_all(config) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{run} | finished by an earlier start: results in {at / 'results.json'}; choose another name= to train it again"


def test_runs_are_counted_and_the_table_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(world, tmp_path, seeds=[0, 1])
    assert train.run_all(config) == 0
    *lines, last = capsys.readouterr().err.splitlines()
    assert {line.partition(" | ")[0] for line in lines} == {"1/2 bpt-s0", "2/2 bpt-s1"}
    assert last == f"all 2 runs are finished; their table: bpt-dist table {config.directory}"


@pytest.mark.parametrize(("fault", "code"), [("term", 75), ("raise", 70)])
def test_why_a_run_ends_is_said_once(
    fault: str, code: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(world, tmp_path)
    monkeypatch.setenv("BPT_FAULT", f"step.after_update,stage=source,step=3,{fault}")
    assert train.run_all(config) == code
    screen = capsys.readouterr().err
    reason = json.loads((config.directory / "status.json").read_text())["reason"]
    assert screen.count(reason) == 1, screen
    assert screen.count("Traceback") == (code == 70)


def test_a_line_has_the_mean_of_the_steps_since_the_line_before(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with StepProgress(6, start=0, every=3, enabled=True) as progress:
        for step, loss in enumerate([1.0, 2.0, 6.0, None, 5.0, 7.0], 1):
            progress.update(step, loss)
    texts = [record.getMessage().split(" | ") for record in caplog.records]
    assert [text[:2] for text in texts] == [
        ["step 3/6", "mean loss 3.0000 of 3 steps"],
        ["step 6/6", "mean loss 6.0000 of 2 steps, 1 skipped"],
    ]


def test_rates_norms_and_costs_are_in_the_records_and_measured_in_their_steps_only(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    monkeypatch.setattr(
        optimizer.StageOptimizer,
        "_largest_norm",
        lambda self, plain=optimizer.StageOptimizer._largest_norm: norms.append(plain(self)) or norms[-1],
    )
    config = configured(world, tmp_path)
    assert train.run_all(config) == 0
    records = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    logged = [record["metrics"] for record in records if f"{record['stage'].split('/')[0]}/loss" in record["metrics"]]
    found = [value for metrics in logged for name, value in metrics.items() if name.endswith("/gradient_norm")]
    assert found == [float(norm) for norm in norms], "other steps measure nothing"
    assert all(norm > 0 for norm in found)
    for metrics in logged:
        stage = "source" if "source/loss" in metrics else "target"
        cost = {"seconds_per_step", "tokens_per_step", "tokens_per_second", "peak_memory_gib"}
        assert {name.removeprefix(f"{stage}/cost/") for name in metrics if "/cost/" in name} == cost
        rates = {name for name in metrics if "/learning_rate" in name}
        assert rates == (
            {"source/learning_rate"} if stage == "source" else {f"target/learning_rate/{n}" for n in ("particles", "u")}
        )
