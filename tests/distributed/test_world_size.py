"""On the shipped pretrained backbone one step is the same on one process and two: to rounding, and with `exact` to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch
import yaml
from torch import Tensor

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage import checkpoint
from bpt_dist.train import train_run

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def configured(folder: Path, *, exact: bool, num_ranks: int) -> RunConfig:
    """Return one step of the quick start's source stage with the texts shared by the ranks, so that its sums are cut elsewhere."""
    folder.mkdir(parents=True)
    plain = yaml.safe_load(QUICKSTART.read_text())
    del plain["rows"], plain["seeds"], plain["comparisons"]
    plain["data"] |= {"target_tasks": [], "cache": str(folder.parents[1] / "cache")}
    plain["source"] |= {"steps": 1, "warmup": 0.0, "checkpoint_every": 1, "log_every": 1}
    plain |= {"output": str(folder), "target": {"steps": 0}, "tracking": {"mlflow": False}, "figures": False}
    plain["distribution"] = {"exact": exact, "mesh": {"particle": 1, "data": num_ranks}}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    return configuration.load(folder / "config.yaml")


def trained(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        train_run(config, world)


def state(config: RunConfig) -> dict[str, Tensor]:
    fingerprint = configuration.fingerprint(config)
    newest = checkpoint.latest(config.directory / "source" / "checkpoints", fingerprint=fingerprint, warn=pytest.fail)
    assert newest is not None
    assert newest.step == 1
    return checkpoint.load(newest)[0]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int], dict[str, Tensor]]:
    """Particles and optimizer state after the step, by (exact, number of processes)."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = tmp_path_factory.mktemp("world_size")
    found = {}
    for num_ranks in (1, 2):
        configs = [configured(folder / str(num_ranks) / str(exact), exact=exact, num_ranks=num_ranks) for exact in (False, True)]
        ranks.run(trained, num_ranks, configs)
        found |= {(config.distribution.exact, num_ranks): state(config) for config in configs}
    return found


def test_one_step_is_the_same_to_rounding(states: dict[tuple[bool, int], dict[str, Tensor]]) -> None:
    alone, together = states[False, 1], states[False, 2]
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        assert (together[name].double() - tensor.double()).norm() <= 1e-5 * tensor.double().norm(), name


def test_exact_steps_have_the_same_bits(states: dict[tuple[bool, int], dict[str, Tensor]]) -> None:
    alone, together = states[True, 1], states[True, 2]
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(together[name], tensor), name
