"""Miniature twins of the shipped layouts on eight processes, most of them with fewer texts than ranks: one process's parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
from torch import Tensor

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage.metrics_log import iter_records

SIZE = 8
TOLERANCE = 1e-5
FOUR = {"name": "bpt", "num_particles": 4}
FIVE = {"name": "bpt", "num_particles": 5}

# method, source keys, distribution; two source tasks of one text, a target step of three texts.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "particles and texts": (FOUR, {}, {}),  # 4 x 2
    "five particles": (FIVE, {}, {}),  # 1 x 8, ten cells
    "one particle": ({"name": "bpt", "num_particles": 1}, {}, {}),  # 1 x 8, two texts: six idle ranks
    "own texts": (FIVE, {"shared_texts": False}, {}),  # 1 x 8, two texts a particle
    "linear annealing": (FIVE, {"annealing": "linear", "annealing_steps": 4}, {}),
    "cyclic annealing, ordered sums": (FIVE, {"annealing": "cyclic", "annealing_steps": 4}, {"exact": True}),
    "two rows of particles": (FOUR, {}, {"mesh": {"particle": 2, "data": 4}, "exchange": "coordinates"}),
    "zero": (FIVE, {}, {"shard": "deepspeed"}),
    "zero, one text a pass": (FIVE, {"pass_size": 2}, {"shard": "deepspeed", "activation_checkpointing": True}),
    "zero, own texts": (FOUR, {"shared_texts": False, "pass_size": 1}, {"shard": "deepspeed"}),
    "fsdp2": (FIVE, {}, {"shard": "fsdp2"}),
    "fsdp2, one particle": ({"name": "bpt", "num_particles": 1}, {"annealing": "tanh", "annealing_steps": 4}, {"shard": "fsdp2"}),
}  # fmt: skip


def configured(world: Path, folder: Path, case: str, *, alone: bool) -> RunConfig:
    method, source, distribution = CASES[case]
    folder.mkdir(parents=True)
    plain = tiny_run.settings(
        world,
        method,
        output=str(folder / "runs"),
        source={"batch_size": 1, "steps": 4, "log_every": 1, "checkpoint_every": 4, **source},
        target={"batch_size": 3, "steps": 2, "eval_every": None, "log_every": 1, "checkpoint_every": 2},
        data={"target_tasks": ["mood"]},
        distribution={"exact": distribution.get("exact", False)} if alone else distribution,
    )
    return tiny_run.load(folder, plain)


def trained(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        tiny_run.trained(config, world)


def tensors(config: RunConfig) -> dict[str, Tensor]:
    states = tiny_run.newest_states(config)
    return {f"{stage}/{name}": tensor for stage, state in states.items() for name, tensor in state.items()}


def losses(config: RunConfig) -> list[float]:
    records = iter_records(config.directory / "metrics.jsonl")
    return [value for record in records for name, value in record["metrics"].items() if name.endswith("/loss")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, RunConfig]]:
    """Each case in one process and on eight; the ranks are forked once."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    world, folder = tiny_run.world(tmp_path_factory.mktemp("world"), layers=1), tmp_path_factory.mktemp("runs")
    alone = {case: configured(world, folder / str(number) / "1", case, alone=True) for number, case in enumerate(CASES)}
    together = {case: configured(world, folder / str(number) / "8", case, alone=False) for number, case in enumerate(CASES)}
    for config in alone.values():
        tiny_run.trained(config)
    ranks.run(trained, SIZE, list(together.values()))
    return {case: (together[case], alone[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_eight_processes_train_what_one_does(case: str, runs: dict[str, tuple[RunConfig, RunConfig]]) -> None:
    together, alone = (tensors(config) for config in runs[case])
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        difference = (together[name].double() - tensor.double()).norm()
        assert difference <= TOLERANCE * tensor.double().norm(), name
    assert losses(runs[case][0]) == pytest.approx(losses(runs[case][1]), rel=1e-5)


def test_idle_ranks_are_reported_once_a_run(runs: dict[str, tuple[RunConfig, RunConfig]]) -> None:
    together, alone = runs["one particle"]
    log = (together.directory / "logs" / "rank-0.log").read_text()
    assert log.count("source.batch_size: a step has 2 text(s) for 8 ranks of the data axis, so 6 of 8 ranks have no texts") == 1
    assert log.count("target.batch_size: a step has 3 text(s) for 8 ranks of the data axis, so 5 of 8 ranks have no texts") == 1
    assert "have no texts" not in (alone.directory / "logs" / "rank-0.log").read_text()
