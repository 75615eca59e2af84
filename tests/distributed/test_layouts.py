"""One configuration, every world size, mesh and sharding: the same particles, optimizer state and results to 1e-5."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
from torch import Tensor

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World

SIZES = (1, 2, 3, 4)
PARTICLES = (6, 5, 4, 1)
SHARDS = ("none", "deepspeed", "fsdp2")
TOLERANCE = 1e-5


def meshes(num_particles: int, size: int) -> Iterator[tuple[int, int]]:
    for particle in range(1, size + 1):
        if size % particle == 0 and num_particles % particle == 0:
            yield particle, size // particle


LAYOUTS = [
    (size, shard, number, mesh) for size in SIZES for shard in SHARDS for number in PARTICLES for mesh in meshes(number, size)
]


def configured(world: Path, folder: Path, shard: str, num_particles: int, mesh: tuple[int, int]) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    plain = tiny_run.settings(
        world,
        {"name": "bpt", "num_particles": num_particles},
        output=str(folder / "runs"),
        source={"steps": 20, "checkpoint_every": 20, "batch_size": 2, "log_every": 20},
        target={"batch_size": 4, "steps": 3, "eval_every": None, "log_every": 3, "checkpoint_every": 3},
        data={"target_tasks": ["mood"]},
        distribution={"shard": shard, "mesh": {"particle": mesh[0], "data": mesh[1]}},
    )
    return tiny_run.load(folder, plain)


def trained(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        tiny_run.trained(config, world)


def tensors(config: RunConfig) -> dict[str, Tensor]:
    """Particles and optimizer state at the end of both stages."""
    states = tiny_run.newest_states(config)
    return {f"{stage}/{name}": tensor for stage, state in states.items() for name, tensor in state.items()}


def results(config: RunConfig) -> list[tuple[str, float]]:
    return [(entry["metric"], entry["value"]) for entry in json.loads((config.directory / "results.json").read_text())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, RunConfig]:
    """All layouts; the ranks of a world size and sharding are forked once."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    world, folder = tiny_run.world(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("layouts")
    found: dict[Any, RunConfig] = {}
    for size in SIZES:
        for shard in SHARDS:
            here = {
                layout: configured(world, folder / "-".join(map(str, (size, shard, layout[2], *layout[3]))), *layout[1:])
                for layout in LAYOUTS
                if layout[:2] == (size, shard)
            }
            ranks.run(trained, size, list(here.values()))
            found |= here
    return found


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: f"{layout[1]}-W{layout[0]}-M{layout[2]}-{layout[3][0]}x{layout[3][1]}"
)
def test_particles_optimizer_state_and_results_agree_with_one_process(layout: Any, runs: dict[Any, RunConfig]) -> None:
    _, _, num_particles, _ = layout
    found, expected = tensors(runs[layout]), tensors(runs[1, "none", num_particles, (1, 1)])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor.double()).norm()
        assert difference <= TOLERANCE * tensor.double().norm(), name
    of_one = results(runs[1, "none", num_particles, (1, 1)])
    assert [metric for metric, _ in results(runs[layout])] == [metric for metric, _ in of_one]
    for (metric, value), (_, alone) in zip(results(runs[layout]), of_one, strict=True):
        assert value == pytest.approx(alone, rel=TOLERANCE, abs=TOLERANCE), metric
