"""What a run says or refuses beside its steps: a backbone that was written to, few-shot targets the posterior has seen, memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from bpt_dist import train
from bpt_dist.config import RunConfig
from bpt_dist.errors import BackboneChanged, OutOfMemory
from bpt_dist.storage.files import read_json
from bpt_dist.training.run import TrainingRun


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: str = "prompt_tuning", **sections: Any) -> RunConfig:
    return tiny_run.load(folder, tiny_run.settings(world, {"name": method}, output=str(folder / "runs"), **sections))


def spoil(run: TrainingRun) -> None:
    with torch.no_grad():
        next(iter(run.backbone.core.parameters())).view(-1)[0] += 1


@pytest.mark.parametrize("method", ["prompt_tuning", "bpt", "lora"])
def test_nothing_is_stored_of_a_backbone_that_was_written_to(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, loop = configured(world, tmp_path, method), train.run_stage
    with pytest.raises(BackboneChanged, match="a weight of the frozen model changed"), tiny_run.session(config) as run:

        def spoilt(stage: Any) -> None:
            loop(stage)
            spoil(run)

        monkeypatch.setattr(train, "run_stage", spoilt)
        train.train(run)
    left = [path.name for path in config.directory.rglob("*") if path.is_file()]
    for name in ("results.json", "result.json", "predictions.jsonl", "posterior.json", "adapter_config.json", "weights.json"):
        assert name not in left
    assert read_json(config.directory / "status.json")["state"] == "failed"


def test_fine_tuning_may_write_to_it(world: Path, tmp_path: Path) -> None:
    folder = tiny_run.trained(configured(world, tmp_path, "fine_tuning"))
    assert (folder / "results.json").is_file()


@pytest.mark.parametrize(
    ("shots", "targets", "said"),
    [(2, ["colour", "mood"], "colour"), (2, ["mood"], None), (None, ["colour"], None), (2, ["truth", "colour"], "truth, colour")],
)
def test_few_shot_targets_that_the_source_stage_learns_from_are_said(
    shots: int | None, targets: list[str], said: str | None, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(world, tmp_path, "bpt", data={"target_tasks": targets, "shots": shots})
    with caplog.at_level(logging.WARNING):
        tiny_run.trained(config)
    lines = [line for line in caplog.messages if line.startswith("data.shots: ")]
    assert len(lines) == (said is not None)
    if said is not None:
        assert f"rows a class of {said} are drawn" in lines[0]
        caplog.clear()  # the same for a posterior of another run
        again = configured(
            world, tmp_path, "bpt", name="again", data={"target_tasks": targets, "shots": shots}, source={"posterior": None}
        )
        again = again.model_copy(update={"source": again.source.model_copy(update={"posterior": config.directory})})
        tiny_run.trained(again)
        assert said in "".join(line for line in caplog.messages if line.startswith("data.shots: "))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("std::bad_alloc")])
@pytest.mark.parametrize("place", ["precondition_", "begin_step"])
def test_memory_that_runs_out_outside_a_pass_is_named(
    error: Exception, place: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, "bpt")
    with pytest.raises(OutOfMemory) as caught, tiny_run.session(config) as run:

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(run.method, place, fail)
        train.train(run)
    assert "rank 0 on localhost: out of memory at " in str(caught.value)
    assert "outside the passes; start more processes" in str(caught.value)
    assert "out of memory" in read_json(config.directory / "status.json")["reason"]


def test_other_errors_of_a_step_stay_what_they_are(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), tiny_run.session(configured(world, tmp_path)) as run:

        def fail(*_: object) -> None:
            raise RuntimeError("shapes differ")

        monkeypatch.setattr(run.method, "begin_step", fail)
        train.train(run)
