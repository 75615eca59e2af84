"""What version 0.1.0 left on disk is read and resumed: runs, checkpoints, posteriors, exports and a sweep."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import sweep_process
import torch
from typer.testing import CliRunner

from bpt_dist import config as configuration
from bpt_dist import train
from bpt_dist.artifacts.results import collect
from bpt_dist.artifacts.stored_run import StoredRun, is_finished
from bpt_dist.backbones.prompts import read_prompt
from bpt_dist.commands.main import app
from bpt_dist.config import RunConfig
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.storage.files import read_json
from bpt_dist.storage.run_directory import read_status

STORED = Path(__file__).parents[1] / "data" / "version_0.1.0"
TARGETS = ("mood", "count")
NAMES_OF_A_RUN = ("run",)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored files as the working directory: their configurations hold relative paths."""
    folder = tmp_path / "world"
    shutil.copytree(STORED, folder)
    an_hour_ago = time.time() - 3600  # a lock of another machine counts as alive while its time stamp is fresh
    os.utime(folder / "kept" / "killed" / "run.lock", (an_hour_ago, an_hour_ago))
    monkeypatch.chdir(folder)
    return folder


def load(name: str) -> RunConfig:
    return configuration.load(Path(f"{name if name != 'killed' else 'stopped'}.yaml"), [f"name={name}"])


def prompts(run: Path) -> dict[str, torch.Tensor]:
    return {task: read_prompt(run / "target" / task / "adapter", 16) for task in TARGETS}


def entries(run: Path) -> list[dict]:
    """Return the results of a run without what names the run, and without what later versions added."""
    old = read_json(STORED / "kept" / "finished" / "results.json")[0].keys() - {*NAMES_OF_A_RUN}
    return [{name: entry[name] for name in old} for entry in read_json(run / "results.json")]


@pytest.mark.parametrize("name", ["stopped", "stopped-source", "killed"])
def test_a_run_resumes_and_ends_like_the_finished_one(world: Path, name: str) -> None:
    config, finished = load(name), world / "kept" / "finished"
    before = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert train.run_all(config) == 0
    after = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    kept = before[
        : len(before) - (3 if name == "killed" else 0)
    ]  # what the last checkpoint of a killed run does not know is redone
    assert after[: len(kept)] == kept
    assert is_finished(config)
    posteriors = [read_tensors(run / "source" / "posterior" / "posterior.safetensors")[0] for run in (config.directory, finished)]
    for key, tensor in posteriors[1].items():
        assert torch.allclose(posteriors[0][key], tensor, rtol=1e-5, atol=1e-6), key
    for task, prompt in prompts(finished).items():
        assert torch.allclose(prompts(config.directory)[task], prompt, rtol=1e-5, atol=1e-6), task
    for task in TARGETS:
        both = [
            [json.loads(line)["prediction"] for line in (run / "target" / task / "predictions.jsonl").read_text().splitlines()]
            for run in (config.directory, finished)
        ]
        assert both[0] == both[1]
    for new, old in zip(entries(config.directory), entries(finished), strict=True):
        # Version 0.1.0 took the majority class of the training rows, now it is that of the evaluated rows.
        assert new == {**old, "value": pytest.approx(old["value"], rel=1e-5), "majority": new["majority"]}
        assert (new["majority"] is None) == (old["majority"] is None)


def test_the_state_of_every_run_is_told_as_it_is(world: Path) -> None:
    states = {name: read_status(world / "kept" / name) for name in ("finished", "stopped", "stopped-source", "killed")}
    assert {name: status and status.state for name, status in states.items()} == {
        "finished": "finished", "stopped": "stopped", "stopped-source": "stopped", "killed": "failed",
    }  # fmt: skip
    assert states["killed"] is not None
    assert states["killed"].killed


def test_a_finished_run_is_left_alone(world: Path) -> None:
    config = load("finished")
    files = {path: path.read_bytes() for path in config.directory.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert train.run_all(config) == 0
    assert {path: path.read_bytes() for path in files} == files


def test_results_exports_and_predictions_are_read(world: Path) -> None:
    finished = Path("kept/finished")
    assert {result.task for result in collect([finished]).results} == {*TARGETS}
    assert StoredRun.open(finished).posterior == finished / "source" / "posterior"
    for words in (["table", str(finished)], ["export", str(finished), "--out", "copied", "--particles"], ["plot", str(finished)]):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, (words, answer.output, answer.exception)
    answer = CliRunner().invoke(app, ["eval", str(finished / "target" / "mood" / "adapter"), "-c", "finished.yaml"])
    assert answer.exit_code == 0, answer.output
    accuracy = next(entry["value"] for entry in entries(finished) if entry["task"] == "mood" and entry["metric"] == "accuracy")
    assert f"{accuracy:.2f}" in answer.output


def test_a_posterior_is_adapted_from(world: Path) -> None:
    keys = ["name=adapted", "source.posterior=kept/finished", "data.target_tasks=[mood]"]
    config = configuration.load(Path("finished.yaml"), keys)
    assert train.run_all(config) == 0
    assert is_finished(config)
    assert not (config.directory / "source").exists()


def test_a_sweep_resumes_and_keeps_its_finished_trial(world: Path) -> None:
    first = world / "kept" / "tiny" / "trial-000-s0" / "results.json"
    before = (first.read_bytes(), first.stat().st_mtime_ns)
    done = sweep_process.start(world / "tiny.yaml", "--resume", cwd=world)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    states = [read_status(trial) for trial in sorted((world / "kept" / "tiny").glob("trial-*"))]
    assert [status and status.state for status in states] == ["finished"] * 4
