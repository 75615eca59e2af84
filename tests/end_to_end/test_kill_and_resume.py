"""F1, F5, F13, F25: whatever ends a run, the same command finishes it with the bits of an undisturbed one.

Every trial forks this process, which has imported torch, and runs what `launcher/train.py` runs once its options are read.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - imported before the forks, because every run exports
import pytest
import ranks
import tiny_run
from records import repeatable

from bpt_dist.config import RunConfig
from bpt_dist.config.method_source import METHODS, method_names
from bpt_dist.storage import checkpoint
from bpt_dist.storage.files import read_json
from bpt_dist.storage.run_directory import read_status
from bpt_dist.train import run_all

TARGETS = ("target/mood", "target/count")
KILLS = (
    "run.opened", "backbone.loaded", "data.row,hit=1", "data.row,hit=90",
    "status.before_write,state=created", "status.before_write,state=running,hit=2", "status.before_write,state=finished",
    "step.before_forward,stage=source,step=0", "step.before_forward,stage=source,step=2",
    "step.before_forward,stage=target/count,step=0",
    "step.after_backward,stage=source,step=1", "step.after_backward,stage=source,step=3",
    "step.after_backward,stage=target/mood,step=2",
    "step.before_update,stage=source,step=3", "step.before_update,stage=target/count,step=2",
    "step.after_update,stage=source,step=2", "step.after_update,stage=source,step=4", "step.after_update,stage=target/mood,step=1",
    "metrics.before_append,stage=source,step=3", "metrics.before_append,stage=target/count,step=3",
    "ckpt.before_write,step=2", "ckpt.before_rename,step=2", "ckpt.before_rename,step=4", "ckpt.after_rename,step=4",
    "ckpt.after_delete,step=2", "ckpt.before_rename,step=3", "ckpt.after_delete,step=3,hit=2",
    "stage.finished,stage=source", "stage.finished,stage=target/mood", "stage.finished,stage=target/count",
    "posterior.before_write",
    "eval.batch,hit=1", "eval.batch,task=mood,hit=5", "eval.batch,task=count,hit=2",
    "export.before_write,task=mood", "export.before_write,task=count",
    "results.before_write,stage=target/mood", "results.before_write,stage=target/count",
)  # fmt: skip
TERMS = (
    "backbone.loaded", "step.before_forward,stage=source,step=0", "step.after_update,stage=source,step=2",
    "step.after_update,stage=target/mood,step=1", "eval.batch,task=mood,hit=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: str = "bpt", **sections: Any) -> RunConfig:
    evaluation = {"batch_size": 3}
    folder.mkdir(exist_ok=True)
    plain = tiny_run.settings(world, {"name": method}, output=str(folder / "runs"), evaluation=evaluation, **sections)
    if method_trains_weights(method):
        plain["target"]["lr"] = 1e-3
    return tiny_run.load(folder, plain)


def method_trains_weights(method: str) -> bool:
    return "length" not in tiny_run.method_options(method).model_fields


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = configured(world, tmp_path_factory.mktemp("undisturbed"))
    assert started(config) == [0]
    found = left_by(config.directory)
    losses = [(line["stage"], line["step"]) for line in found["metrics"] if {"source/loss", "target/loss"} & line["metrics"].keys()]
    assert losses == [
        (stage, step + 1) for stage, steps in (("source", 4), ("target/mood", 3), ("target/count", 3)) for step in range(steps)
    ]
    assert {"results.json", "source/posterior/posterior.safetensors", "target/mood/predictions.jsonl"} <= found.keys()
    assert "target/count/adapter/adapter_model.safetensors" in found
    return found


def started(config: RunConfig, fault: str = "", size: int = 1) -> list[int]:
    return ranks.launch(lambda: run_all(config), size, BPT_FAULT=fault)


def left_by(run: Path) -> dict[str, Any]:
    """Everything a finished run leaves, but for times, what describes its starts, and all but the last checkpoint of a stage."""
    lasts = {max(folder.iterdir()) for folder in run.rglob("checkpoints")}
    found: dict[str, Any] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(file.relative_to(run))
        if name.startswith(("logs/", "run.lock")) or name in (
            "run.json",
            "status.json",
            "config.yaml",
            "metrics.jsonl",
            "bad_step.json",
        ):
            continue
        if "/checkpoints/" not in name or file.parent in lasts:
            found[name] = file.read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found | {"metrics": repeatable(lines)}


def assert_finished_as(undisturbed: dict[str, Any], config: RunConfig) -> None:
    assert read_status(config.directory).state == "finished"
    found = left_by(config.directory)
    assert found.keys() == undisturbed.keys()
    assert [name for name, content in undisturbed.items() if found[name] != content] == []


@pytest.mark.parametrize("fault", KILLS)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    fault: str, world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    assert started(config, f"{fault},kill") == [-signal.SIGKILL]
    if (config.directory / "status.json").is_file():
        assert read_status(config.directory).state == "failed"  # nobody is alive there, whatever the file says
    assert not (config.directory / "results.json").is_file() or "finished" in fault
    assert started(config) == [0]
    assert_finished_as(undisturbed, config)


def test_two_kills_in_a_row(world: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    config = configured(world, tmp_path)
    assert started(config, "ckpt.before_rename,step=4,kill") == [-signal.SIGKILL]
    assert started(config, "export.before_write,task=count,kill") == [-signal.SIGKILL]
    assert started(config) == [0]
    assert_finished_as(undisturbed, config)


@pytest.mark.parametrize("fault", TERMS)
def test_a_run_asked_to_stop_leaves_a_checkpoint_and_resumes(
    fault: str, world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    assert started(config, f"{fault},term") == [75]
    status = read_json(config.directory / "status.json")
    assert status["state"] == "stopped"
    assert status["next"]
    assert any(checkpoint.latest(folder, fingerprint=None, warn=print) for folder in config.directory.rglob("checkpoints"))
    assert started(config) == [0]
    assert_finished_as(undisturbed, config)


def test_a_finished_run_is_left_alone(world: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    config = configured(world, tmp_path)
    assert started(config) == [0]
    before = {file: file.stat().st_mtime_ns for file in config.directory.rglob("*") if file.parent.name != "logs"}
    assert started(config) == [0]
    after = {file: file.stat().st_mtime_ns for file in config.directory.rglob("*") if file.parent.name != "logs"}
    assert {file for file in after if after[file] != before.get(file)} <= {config.directory, config.directory / "logs"}
    assert after.keys() == before.keys()
    assert_finished_as(undisturbed, config)  # F25: the same configuration twice has the same bits


@pytest.mark.parametrize(("stage", "step"), [("source", 3), ("source", 0), ("target/count", 2)])
def test_a_gradient_that_is_not_a_number_stops_before_anything_changes(
    stage: str, step: int, world: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    assert started(config, f"step.after_backward,stage={stage},step={step},nan") == [77]
    status = read_json(config.directory / "status.json")
    assert status["state"] == "failed"
    assert f"{stage} step {step}" in status["reason"]
    assert "no particle was changed" in status["reason"]
    bad = read_json(config.directory / "bad_step.json")
    tasks = ("colour", "truth") if stage == "source" else (stage.split("/")[1],)
    assert (bad["stage"], bad["step"]) == (stage, step)
    assert [row.split("/")[0] for row in bad["row_ids"]["0"]] == [
        task for task in tasks for _ in range(2 if stage == "source" else 3)
    ]
    last = checkpoint.latest(config.directory / stage / "checkpoints", fingerprint=None, warn=print)
    assert (last.step if last else 0) == step // 2 * 2  # the last good step that was due
    assert started(config) == [0]
    assert_finished_as(undisturbed, config)


@pytest.mark.parametrize("method", method_names(METHODS))
def test_a_run_killed_with_all_results_written_only_has_to_say_so(method: str, world: Path, tmp_path: Path) -> None:
    """A method that never began a stage in this process must end cleanly, too."""
    config = configured(world, tmp_path, method, data={"target_tasks": ["mood"]})
    assert started(config, "status.before_write,state=finished,kill") == [-signal.SIGKILL]
    before = left_by(config.directory)
    assert started(config) == [0]
    assert_finished_as(before, config)


# --- two ranks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed_pair(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = configured(world, tmp_path_factory.mktemp("pair"))
    assert started(config, size=2) == [0, 0]
    return left_by(config.directory)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["step.after_backward,stage=source,step=3", "eval.batch,task=mood,hit=2"])
def test_a_rank_that_dies_takes_the_other_along_and_both_resume(
    fault: str, rank: int, world: Path, undisturbed_pair: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    codes = started(config, f"{fault},rank={rank},kill", size=2)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 69
    assert read_status(config.directory).state == "failed"
    assert started(config, size=2) == [0, 0]
    assert_finished_as(undisturbed_pair, config)


def test_a_number_that_is_not_finite_on_one_rank_stops_both(world: Path, undisturbed_pair: dict[str, Any], tmp_path: Path) -> None:
    config = configured(world, tmp_path)
    assert started(config, "step.after_backward,stage=source,step=3,rank=1,nan", size=2) == [77, 77]
    assert list(read_json(config.directory / "bad_step.json")["row_ids"]) == ["1"]
    assert started(config, size=2) == [0, 0]
    assert_finished_as(undisturbed_pair, config)


def test_one_rank_asked_to_stop_stops_both_after_the_same_step(
    world: Path, undisturbed_pair: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    assert started(config, "step.before_forward,stage=source,step=1,rank=1,term", size=2) == [75, 75]
    assert read_json(config.directory / "status.json")["state"] == "stopped"
    assert started(config, size=2) == [0, 0]
    assert_finished_as(undisturbed_pair, config)
