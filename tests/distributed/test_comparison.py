"""What ranks measure together: the loss at the mean of the particles and the start of a target, on every layout and sharding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage import layout
from bpt_dist.storage.metrics_log import iter_records

LAYOUTS: dict[str, dict[str, Any]] = {
    "particles apart": {"mesh": {"particle": 2, "data": 1}},
    "texts apart": {"mesh": {"particle": 1, "data": 2}},
    "slices of prompts": {"mesh": {"particle": 2, "data": 1}, "exchange": "coordinates"},
    "ZeRO": {"shard": "deepspeed"},
    "FSDP2": {"shard": "fsdp2", "mesh": {"particle": 1, "data": 2}},
}
RATES = {"lr": None, "lr_relative": 0.01}  # small, so that runs of different layouts differ by rounding alone


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return tiny_run.world(tmp_path_factory.mktemp("world"), layers=1)


def configured(world: Path, name: str, distribution: dict[str, Any]) -> RunConfig:
    method = {"name": "bpt", "num_particles": 4, "spread": 1.0, "start": "best", "lr_full_relative": 0.01}
    source = {**RATES, "steps": 3, "batch_size": 3, "log_every": 2}
    plain = tiny_run.settings(
        world, method, source=source, target={"steps": 1}, distribution=distribution, evaluation={"predict": "ensemble"}
    )
    return tiny_run.load(world, {**plain, "name": name.replace(" ", "-").lower()})


def trained(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        tiny_run.trained(config, world)


def found(config: RunConfig) -> tuple[dict[int, float], dict[str, int], float]:
    """The loss at the mean by step, the particle each target started from, and how far predictions agree."""
    records = [record for record in iter_records(config.directory / layout.METRICS) if record["stage"] == "source"]
    entries = json.loads((config.directory / layout.RESULTS).read_text())
    (agreement,) = [entry["value"] for entry in entries if entry["metric"] == "prediction_agreement"]
    losses = {record["step"]: record["metrics"]["svgd/loss_at_mean"] for record in records}
    return losses, {entry["task"]: entry["start_particle"] for entry in entries}, agreement


def test_all_layouts_measure_what_one_process_does(world: Path) -> None:
    alone = configured(world, "one process", {})
    tiny_run.trained(alone)
    losses, starts, agreement = found(alone)
    assert sorted(losses) == [1, 2, 3]
    assert None not in starts.values()
    configs = {name: configured(world, name, distribution) for name, distribution in LAYOUTS.items()}
    ranks.run(trained, 2, list(configs.values()))
    for name, config in configs.items():
        of_layout = found(config)
        assert of_layout[0] == pytest.approx(losses, rel=1e-5), name
        assert of_layout[1] == starts, name
        assert of_layout[2] == pytest.approx(agreement), name


def test_exact_has_the_same_bits_on_one_process_and_two(world: Path) -> None:
    pair = [configured(world, f"exact {size}", {"exact": True, "mesh": "auto"}) for size in (1, 2)]
    tiny_run.trained(pair[0])
    ranks.run(trained, 2, pair[1:])
    assert found(pair[0]) == found(pair[1])
