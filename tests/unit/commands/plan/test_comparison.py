"""What a plan counts beside steps and evaluations, against the passes of a real run; and the line that compares the two."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch

from bpt_dist import train
from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.commands.plan import comparison
from bpt_dist.commands.plan.comparison import compared_with_plan
from bpt_dist.commands.plan.estimate import Plan, estimate
from bpt_dist.commands.plan.stages import num_records
from bpt_dist.config import SourceStageConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import ConfigError
from bpt_dist.training.optimizer import StageOptimizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, tmp_path: Path, **sections: Any) -> Any:
    return tiny_run.load(
        tmp_path, tiny_run.settings(world, {"name": "bpt", **sections.pop("method", {})}, output=str(tmp_path / "runs"), **sections)
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every pass that computes a likelihood and learns nothing."""
    found: list[int] = []
    compute = T5Backbone.log_likelihood

    def counted(self: Any, texts: Any, *rest: Any, **keywords: Any) -> Any:
        forward = compute(self, texts, *rest, **keywords)
        if not torch.is_grad_enabled():
            found.append(forward.log_likelihood.numel())
        return forward

    monkeypatch.setattr(T5Backbone, "log_likelihood", counted)
    return found


@pytest.mark.parametrize(
    ("method", "source", "target"),
    [
        ({}, {"log_every": 1}, {}),
        ({}, {"steps": 7, "log_every": 3}, {}),
        ({}, {"steps": 5, "log_every": 2, "shared_texts": False}, {}),
        ({}, {"steps": 5, "log_every": 2, "tasks_per_step": 1}, {}),
        ({"num_particles": 1}, {}, {}),
        ({"start": "best"}, {"steps": 2, "log_every": 5}, {}),
        ({"start": "best", "num_particles": 4}, {"steps": 2, "log_every": 5}, {"pass_size": 5}),
    ],
)  # fmt: skip
def test_comparisons_are_those_of_a_real_run(
    method: dict[str, Any], source: dict[str, Any], target: dict[str, Any], world: Path, tmp_path: Path, passes: list[int]
) -> None:
    data = {"target_tasks": ["mood"], "max_train_rows": 20}
    config = configured(world, tmp_path, method=method, source=source, target=target, data=data, evaluation={"batch_size": 8})
    plan = estimate(config, 1)
    tiny_run.trained(config)
    assert sum(stage.comparison_passes for stage in plan.stages) == len(passes)
    source_stage, target_stage = plan.stages
    rows = {"source": 0, "target": 0}
    if config.method.num_particles > 1:
        texts = source.get("tasks_per_step", 2) * 2 * (1 if source.get("shared_texts", True) else 2)
        rows["source"] = num_records(config.source) * texts
    if method.get("start") == "best":
        rows["target"] = config.method.num_particles * 20
    assert sum(rows.values()) == sum(passes)
    assert (source_stage.comparison_flops > 0, target_stage.comparison_flops > 0) == (rows["source"] > 0, rows["target"] > 0)


def test_comparisons_take_time_in_the_plan(world: Path, tmp_path: Path) -> None:
    often, seldom = (estimate(configured(world, tmp_path, source={"steps": 50, "log_every": every}), 1) for every in (1, 50))
    times = [plan.stage_seconds(plan.stages[0]) - 50 * plan.step_seconds(plan.stages[0]) for plan in (often, seldom)]
    assert times[0] > 10 * times[1] > 0


@pytest.mark.parametrize(("steps", "every"), [(0, 1), (1, 1), (1, 5), (7, 3), (6, 3), (10, 1), (3, 50)])
def test_records_are_those_the_optimizer_measures(steps: int, every: int) -> None:
    settings = SourceStageConfig(steps=steps, log_every=every, lr=0.1)
    of_stage: Any = SimpleNamespace(stage=settings)
    assert num_records(settings) == sum(StageOptimizer.measures(of_stage, step) for step in range(steps))


def test_a_training_says_once_a_stage_how_it_compares(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Plan] = []

    def counted(*args: Any) -> Plan:
        made.append(estimate(*args))
        return made[-1]

    monkeypatch.setattr(comparison, "estimate", counted)
    long = {"steps": 30, "log_every": 10}
    config = configured(world, tmp_path, source=long, target=long | {"eval_every": 10}, data={"target_tasks": ["mood"]})
    with caplog.at_level(logging.INFO):
        train.train_run(config, World(), around=compared_with_plan)
    lines = [record.getMessage() for record in caplog.records if "planned were" in record.getMessage()]
    assert len(lines) == 2
    assert len(made) == 1
    assert all(line.startswith("20 steps took ") for line in lines)
    for line, stage in zip(lines, made[0].stages, strict=True):
        assert f"planned were {made[0].step_seconds(stage):.3g} s" in line
    progress = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert all("left in this stage" in line for line in progress if "mean loss" in line)


def test_a_run_that_cannot_be_planned_is_trained_all_the_same(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Plan:
        raise ConfigError("this machine is too small")

    monkeypatch.setattr(comparison, "estimate", refused)
    config = configured(world, tmp_path, source={"steps": 24, "log_every": 12}, data={"target_tasks": ["mood"]})
    with caplog.at_level(logging.INFO):
        train.train_run(config, World(), around=compared_with_plan)
    assert (config.directory / "results.json").is_file()
    assert (
        len(
            [
                record
                for record in caplog.records
                if "there is no plan to compare with: this machine is too small" in record.getMessage()
            ]
        )
        == 1
    )


def test_short_stages_ask_for_no_plan(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "estimate", lambda *_: pytest.fail("a plan was made"))
    config = configured(world, tmp_path)
    train.train_run(config, World(), around=compared_with_plan)
    assert (config.directory / "results.json").is_file()
