"""A job of several runs holds one backbone at a time and makes no more process groups from run to run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
import torch
from transformers import T5ForConditionalGeneration

from bpt_dist import config as configuration
from bpt_dist.backbones import loading
from bpt_dist.backbones.base import local_shard
from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.train import train_run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def backbones() -> list[Any]:
    """Every T5 in memory, also one that nobody needs any more."""
    return [it for it in gc.get_objects() if isinstance(it, T5ForConditionalGeneration)]


def storages() -> int:
    """Bytes of different storages of all weights in memory."""
    held: dict[int, int] = {}
    for model in backbones():
        for weight in model.parameters():
            for tensor in (weight.detach() if not hasattr(weight, "to_local") else local_shard(weight), local_shard(weight)):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def train_all(mesh_world: World, config: RunConfig) -> list[tuple[int, int, int]]:
    """Train all runs; return the T5s in memory before each is loaded, and after it their bytes and the process groups."""
    found, before = [], []
    load = loading.load
    loading.load = lambda *args, **kwargs: [before.append(len(backbones())), load(*args, **kwargs)][1]
    try:
        for one in configuration.expand(config):
            train_run(one, mesh_world)
            groups = len(torch.distributed.distributed_c10d._world.pg_map) if torch.distributed.is_initialized() else 0
            gc.collect()
            found.append((before[-1], storages(), groups))
    finally:
        loading.load = load
    return found


@pytest.mark.parametrize("method", ["bpt", "fine_tuning", "lora"])
@pytest.mark.parametrize("shard", ["none", "deepspeed", "fsdp2"])
def test_after_four_runs_there_is_no_backbone_and_no_group_more(world: Path, tmp_path: Path, method: str, shard: str) -> None:
    """The module stack of DeepSpeed kept the engine of every run, and each run made a process group for its host."""
    scope = "world" if method == "fine_tuning" else "node"
    distribution = {} if shard == "none" else {"shard": shard, "scope": scope}
    lr = {"lr": 0.01} if method == "lora" else {}
    plain = tiny_run.settings(
        world, {"name": method}, output=str(tmp_path), seeds=[0, 1, 2, 3], distribution=distribution,
        target={"steps": 2, **lr}, data={"target_tasks": ["mood"]},
    )  # fmt: skip
    for of_rank in ranks.run(train_all, 1 if shard == "none" else 2, tiny_run.load(tmp_path, plain)):
        assert [loaded for loaded, _, _ in of_rank] == [0, 0, 0, 0]
        assert [held for _, held, _ in of_rank] == [0, 0, 0, 0]
        assert len({groups for _, _, groups in of_rank}) == 1
