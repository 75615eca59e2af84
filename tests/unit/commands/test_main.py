"""`bpt-dist` as a user calls it, on one finished job of two small runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file

from bpt_dist import config as configuration
from bpt_dist import train
from bpt_dist.artifacts.results import collect
from bpt_dist.commands.check import machine
from bpt_dist.commands.check.job import job_findings
from bpt_dist.commands.eval import evaluate_stored
from bpt_dist.commands.lists import described_methods
from bpt_dist.commands.main import main
from bpt_dist.config.schema import json_schema
from bpt_dist.methods.base import method_class

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "mlflow", "ray", "peft", "matplotlib", "sklearn", "scipy"}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """The folder of two finished runs: `single-s0` (a prompt a target) and `joint-s0` (targets together, with an ensemble)."""
    world = tiny_run.world(tmp_path_factory.mktemp("world"))
    plain = tiny_run.settings(world, {"name": "bpt"}, figures=True)
    joint = {"label": "joint", "target": {"joint": True}, "evaluation": {"predict": "ensemble"}}
    plain |= {"rows": [{"label": "single"}, joint], "seeds": [0]}
    file = world / "job.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert train.run_all(configuration.load(file)) == 0
    return Path(plain["output"]) / plain["name"]


def results(run: Path, **wanted) -> list[dict]:
    entries = json.loads((run / "results.json").read_text())
    return [entry for entry in entries if all(entry[key] == value for key, value in wanted.items())]


def run_command(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- light commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["methods"],
        ["tasks"],
        ["schema"],
        ["table", "nowhere"],
        ["plan", "-c", "nowhere.yaml"],
        ["export", "nowhere"],
        ["run-table", "nowhere.yaml"],
        ["methods", "--json"],
    ],
    ids=" ".join,
)
def test_help_lists_and_user_errors_import_nothing_heavy(words):
    heavy = f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    script = f"import sys; from bpt_dist.commands.main import main; main({words}); {heavy}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "[]"


def test_methods_are_described_as_their_classes_say(capsys):
    code, out, _ = run_command(capsys, "methods")
    assert code == 0
    for name, texts in described_methods().items():
        chosen = method_class(name)
        assert texts == {"summary": chosen.summary, "paper": chosen.paper}
        assert re.search(rf"^ *{name} .*{re.escape(chosen.summary)}", out, re.MULTILINE)


def test_tasks_lists_catalogue_miniature_world_and_own_tasks(capsys, job):
    _, out, _ = run_command(capsys, "tasks")
    assert re.search(r"^ *cola +matthews, accuracy +nyu-mll/glue cola ", out, re.MULTILINE)
    assert re.search(r"^ *mini_rte +accuracy", out, re.MULTILINE)
    assert "colour" not in out
    _, out, _ = run_command(capsys, "tasks", "-c", job / "single-s0" / "config.yaml")
    assert re.search(r"^ *truth +accuracy, f1 ", out, re.MULTILINE)


def test_schema_is_the_one_of_the_settings(capsys, tmp_path):
    code, out, _ = run_command(capsys, "schema")
    assert code == 0
    assert json.loads(out) == json_schema()
    run_command(capsys, "schema", tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text() == out


@pytest.mark.parametrize(
    "words", [["tabel"], ["plan"], ["table", "--format", "pdf"], ["eval", "x", "--split", "train"]], ids=" ".join
)
def test_wrong_usage_is_two(capsys, words):
    code, _, err = run_command(capsys, *words)
    assert code == 2
    assert "Traceback" not in err


def test_user_errors_are_one_sentence_and_their_exit_code(capsys, job, tmp_path):
    cases = {
        ("table", tmp_path): (65, "no results.json"),
        ("plot", tmp_path): (65, "no metrics.jsonl"),
        ("export", job): (2, "it holds the runs joint-s0, single-s0"),
        ("export", job / "single-s0", "--task", "moood"): (2, "it has mood, count"),
        ("eval", job / "single-s0"): (2, "has prompts for mood, count"),
        ("eval", tmp_path / "x.npy", "--task", "mood"): (2, "no such run or prompt"),
        ("sync", job / "single-s0"): (2, "no tracking.json"),
        ("ui", "--runs", tmp_path): (2, "no tracking store"),
        ("ui", "--uri", "sqlite:///relative.db"): (2, "absolute path"),
    }
    for words, (expected, part) in cases.items():
        code, out, err = run_command(capsys, *words)
        assert (code, out) == (expected, ""), words
        assert part in err
        assert "Traceback" not in err


def test_an_unfinished_run_exports_nothing(capsys, job, tmp_path):
    run = tmp_path / "half"
    run.mkdir()
    (run / "config.yaml").write_text((job / "single-s0" / "config.yaml").read_text())
    (run / "status.json").write_text('{"state": "stopped"}')
    code, _, err = run_command(capsys, "export", run)
    assert code == 2
    assert "stopped, not finished" in err


# --- table -----------------------------------------------------------------------------------------------------


def test_the_table_has_the_numbers_of_results_json_and_a_row_for_each_way_to_predict(capsys, job):
    code, out, _ = run_command(capsys, "table", job)
    assert code == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    header, rows = lines[0], {line[0]: line for line in lines[1:]}
    for label, run, predict in (
        ("BPT", "single-s0", "map"),
        (r"BPT (MAP)\*", "joint-s0", "map"),
        (r"BPT (ensemble)\*", "joint-s0", "ensemble"),
    ):
        for task in ("mood", "count"):
            (entry,) = results(job / run, task=task, metric="accuracy", predict=predict, split="test")
            assert rows[label][header.index(f"{task} (accuracy)")].strip("*") == f"{entry['value']:.1f}"


def test_every_entry_finds_the_predictions_behind_it(job):
    for entry in collect([job]).results:
        rights = [json.loads(line)["correct"] for line in entry.predictions.read_text().splitlines()]
        if entry.metric == "accuracy":
            assert entry.value == pytest.approx(100 * sum(rights) / len(rights))


def test_the_table_goes_to_a_file_in_the_format_of_its_name(capsys, job, tmp_path):
    for name, sign in (("t.tex", r"\toprule"), ("t.md", "| Method |")):
        code, out, _ = run_command(capsys, "table", job, "--out", tmp_path / name)
        assert (code, out.strip()) == (0, str(tmp_path / name))
        assert sign in (tmp_path / name).read_text()
    run_command(capsys, "table", job / "single-s0", "--out", tmp_path / "t.csv")
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    (entry,) = results(job / "single-s0", task="mood", metric="accuracy")
    assert [float(row["mean"]) for row in rows if row["task"] == "mood"] == [entry["value"]]


def test_published_numbers_are_set_apart_and_a_split_that_is_not_there_is_refused(capsys, job):
    _, out, _ = run_command(capsys, "table", job, "--published")
    assert out.index("Published numbers") > out.index("Results on the test split")
    code, _, err = run_command(capsys, "table", job, "--split", "validation")
    assert code == 65
    assert "found test" in err


def test_copies_in_a_tracking_store_are_no_runs(capsys, job, tmp_path):
    # Rows of a copy would count every seed twice, or fill the notes with runs "without status.json".
    shutil.copytree(job / "single-s0", tmp_path / "single-s0")
    copy = tmp_path / "mlartifacts" / "1" / "abc" / "artifacts"
    copy.mkdir(parents=True)
    shutil.copy(job / "single-s0" / "results.json", copy)
    code, out, _ = run_command(capsys, "table", tmp_path)
    assert code == 0
    assert "Left out" not in out


# --- figures ---------------------------------------------------------------------------------------------------


def test_plot_draws_what_the_run_drew(capsys, job, tmp_path):
    code, out, _ = run_command(capsys, "plot", job / "single-s0", "--out", tmp_path)
    assert code == 0
    drawn = [Path(line) for line in out.splitlines()]
    assert {file.name for file in drawn} == {file.name for file in (job / "single-s0" / "figures").glob("*.png")}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)


def test_the_mean_particle_beats_every_average_of_optima(capsys, tmp_path):
    code, out, _ = run_command(capsys, "example", "gaussian-product", "--out", tmp_path / "g.png")
    assert code == 0
    distance = {
        line.split("  ")[0].strip(): float(line.split()[-1]) for line in out.splitlines() if re.search(r"\d$", line.strip())
    }
    assert distance["closed form"] == 0
    assert 100 * distance["mean of SVGD particles"] < distance["best weighted average of task optima"]
    assert (tmp_path / "g.png").stat().st_size > 10_000


# --- export ----------------------------------------------------------------------------------------------------


def peft_prompt(job: Path, folder: Path, task_id: int | None = None) -> torch.Tensor:
    """Return the prompt that PEFT puts before a text."""
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    base = T5ForConditionalGeneration.from_pretrained(job.parents[1] / "t5")
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    tasks = None if task_id is None else torch.tensor([task_id])
    return model.get_prompt(batch_size=1, task_ids=tasks)[0].detach()


def test_exported_prompts_load_with_peft_and_are_those_of_the_run(capsys, job, tmp_path):
    code, out, _ = run_command(capsys, "export", job / "single-s0", "--out", tmp_path)
    assert code == 0
    assert out.splitlines()[:2] == [str(tmp_path / "mood"), str(tmp_path / "count")]
    for task in ("mood", "count"):
        stored = load_file(job / "single-s0" / "target" / task / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(peft_prompt(job, tmp_path / task), stored)
    snippet = "\n".join(line for line in out.splitlines() if " import " in line or " = " in line)
    loaded: dict = {}
    exec(snippet, loaded)
    assert loaded["model"].peft_config["default"].num_virtual_tokens == 3


def test_targets_trained_together_become_one_multi_task_prompt(capsys, job, tmp_path):
    code, out, _ = run_command(capsys, "export", job / "joint-s0", "--out", tmp_path)
    assert code == 0
    assert str(tmp_path / "joint") in out.splitlines()
    for task_id, task in enumerate(("mood", "count")):
        single = load_file(tmp_path / task / "adapter_model.safetensors")["prompt_embeddings"]
        torch.testing.assert_close(peft_prompt(job, tmp_path / "joint", task_id), single)


def test_a_shared_prompt_is_exported_as_one_whatever_its_parts_are_called(capsys, job, tmp_path):
    """The names of trained tensors are a method's own: one calls the shared prompt particles, another full."""
    config = tiny_run.settings(job.parents[1], {"name": "mpt"}, output=str(tmp_path / "runs"), target={"joint": True})
    run = tiny_run.trained(tiny_run.load(tmp_path, config))
    code, out, _ = run_command(capsys, "export", run, "--out", tmp_path / "out")
    assert code == 0
    assert str(tmp_path / "out" / "joint") in out.splitlines()
    for task_id, task in enumerate(("mood", "count")):
        single = load_file(tmp_path / "out" / task / "adapter_model.safetensors")["prompt_embeddings"]
        torch.testing.assert_close(peft_prompt(job, tmp_path / "out" / "joint", task_id), single)


def test_particles_and_their_mean_are_exported(capsys, job, tmp_path):
    run_command(capsys, "export", job / "single-s0", "--out", tmp_path, "--particles")
    stored = load_file(job / "single-s0" / "source" / "posterior" / "posterior.safetensors")
    for m, particle in enumerate(stored["particles"]):
        assert torch.equal(peft_prompt(job, tmp_path / "particles" / "particles" / f"{m:02d}"), particle)
    assert torch.equal(peft_prompt(job, tmp_path / "particles" / "mean"), stored["mean"])


# --- eval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["single-s0", "joint-s0"])
def test_eval_reproduces_the_metrics_of_the_run_exactly(job, run):
    config = configuration.load(job / run / "config.yaml")
    for task in ("mood", "count"):
        found, num_rows = evaluate_stored(job / run / "target" / task / "adapter", config, task, "test")
        expected = results(job / run, task=task, predict="map")
        assert found.metrics == {entry["metric"]: entry["value"] for entry in expected}
        assert num_rows == expected[0]["n"]


def test_eval_prints_metrics_of_runs_folders_and_files(capsys, job, tmp_path):
    run = job / "single-s0"
    (entry,) = results(run, task="mood", metric="nll")
    _, of_run, _ = run_command(capsys, "eval", run, "--task", "mood")
    assert f"nll  {entry['value']:.4f}" in re.sub(" +", "  ", of_run)
    _, of_folder, _ = run_command(capsys, "eval", run / "target" / "mood" / "adapter")
    np.save(tmp_path / "p.npy", peft_prompt(job, run / "target" / "mood" / "adapter").numpy())
    _, of_file, _ = run_command(
        capsys, "eval", tmp_path / "p.npy", "--task", "mood", "-c", run / "config.yaml", "evaluation.batch_size=32"
    )
    assert of_run == of_folder == of_file
    code, _, err = run_command(capsys, "eval", tmp_path / "p.npy", "--task", "mood")
    assert code == 2
    assert "--config" in err


def test_a_prompt_can_be_tried_on_another_task(capsys, job):
    code, out, _ = run_command(
        capsys, "eval", job / "single-s0" / "target" / "mood" / "adapter", "--task", "truth", "--split", "validation"
    )
    assert code == 0
    assert "truth, validation, 6 rows" in out


# --- check -----------------------------------------------------------------------------------------------------


def test_check_fails_with_two_and_names_the_only_thing_that_is_wrong(capsys, tmp_path):
    world = tiny_run.world(tmp_path)
    rows = world / "tasks" / "mood" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"label": 1', '"label": 7', 1))
    tiny_run.load(tmp_path, tiny_run.settings(world, {"name": "bpt"}))
    code, out, _ = run_command(capsys, "check", "-c", tmp_path / "config.yaml")
    assert code == 2
    passed = dict(re.findall(r"^ok    ([\w ]+): (.*)$", out, re.MULTILINE))
    assert passed["task colour"] == "32 train, 6 validation, 6 test rows, all valid"
    assert "2 gloo processes" in passed["processes"]
    assert passed["deepspeed"].endswith("imports")
    assert passed["backbone"].endswith("fp32")
    assert passed["tracking"] == "off, metrics.jsonl only"
    failed = re.findall(r"^FAIL  ([\w ]+):", out, re.MULTILINE)
    assert set(failed) - {"schema"} == {"task mood"}, "whether the schema is current has a test of its own"
    assert f"{rows}:2: field 'label' is 7" in out


def test_check_says_what_is_missing_and_what_to_do(tmp_path):
    world = tiny_run.world(tmp_path)
    store = tmp_path / "mlflow.db"
    store.write_text("no database at all, but long enough to be taken for one by its name\n" * 20)
    shutil.rmtree(world / "tasks" / "count")
    sections = {"backbone": {"path": str(tmp_path / "tasks")}, "tracking": {"mlflow": True, "uri": f"sqlite:///{store}"}}
    config = tiny_run.load(tmp_path, tiny_run.settings(world, {"name": "bpt"}, **sections))
    failed = {each.name: f"{each.text}; {each.remedy}" for each in job_findings(config) if each.remedy is not None}
    assert set(failed) == {"backbone", "task count", "tracking"}
    assert "has no config.json" in failed["backbone"]
    assert "reads train.jsonl and validation.jsonl" in failed["task count"]
    assert "move it away" in failed["tracking"]


def test_check_compares_packages_with_the_bounds_of_the_project(monkeypatch):
    monkeypatch.setattr(machine.metadata, "requires", lambda _: ["torch<1", "no-such-package>=3", "ray; extra == 'more'"])
    found = {each.name: each for each in machine._packages()}
    assert found["torch"].remedy == "pip install 'torch<1'"
    assert found["no-such-package"].text == "is not installed"
    assert found["packages"].text.startswith("0 of 2")
