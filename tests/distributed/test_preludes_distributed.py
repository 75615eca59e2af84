"""Preludes on several ranks: every stage of a method that has them ends with the tensors of one rank."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
from torch import Tensor

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage.checkpoint import latest, load
from bpt_dist.train import run_all

STEPS = 4
METHODS = {
    "spot": {"name": "spot", "retrieval": "mixture", "top_k": 2},
    # Prompts far apart and a low temperature, so that the attention chooses: what moves its shift from zero would otherwise be a
    # small difference of large numbers.
    "attempt": {"name": "attempt", "prompt_steps": STEPS, "init": "normal", "temperature": 1.0},
    "mpt": {"name": "mpt", "teacher_steps": STEPS},
}
STAGES = {
    "spot": {"source/keys", "source", "target/joint/probe", "target/joint"},
    "attempt": {"source/prompts", "source", "target/joint"},
    "mpt": {"source/teachers", "source", "target/joint"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, name: str, stage: dict[str, Any], **sections: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    every = {"steps": STEPS, "checkpoint_every": STEPS, "log_every": STEPS, "clip": 0.5, **stage}
    target = {**every, "batch_size": 4, "eval_every": None, "joint": True}
    plain = tiny_run.settings(world, METHODS[name], output=str(folder / "runs"), source=every, target=target, **sections)
    return tiny_run.load(folder, plain)


def trained(world: World, config: RunConfig) -> None:
    tiny_run.trained(config, world)


def last_tensors(config: RunConfig) -> dict[str, Tensor]:
    """What each stage and prelude trained, as its last checkpoint has it."""
    found = {}
    for folder in config.directory.rglob("checkpoints"):
        last = latest(folder, fingerprint=None, warn=pytest.fail)
        assert last is not None
        assert last.step >= min(STEPS, 3)
        stage = str(folder.parent.relative_to(config.directory))
        found |= {f"{stage}: {name}": tensor for name, tensor in load(last)[0].items() if name.endswith("/value")}
    return found


def predictions(config: RunConfig) -> list[str]:
    files = [config.directory / "target" / task / "predictions.jsonl" for task in config.data.target_tasks]
    return [json.loads(line)["prediction"] for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_every_stage_trains_what_one_rank_trains(name: str, world: Path, tmp_path: Path) -> None:
    """Also K prompts on K tasks, of which a rank may see texts of some tasks only."""
    smooth = {"optimizer": "sgd"}
    alone = configured(world, tmp_path / "alone", name, smooth)
    tiny_run.trained(alone)
    expected = last_tensors(alone)
    assert {key.split(":")[0] for key in expected} == STAGES[name]
    for shard, size in (("none", 2), ("none", 4), ("deepspeed", 2), ("fsdp2", 2)):
        config = configured(world, tmp_path / f"{shard}{size}", name, smooth, distribution={"shard": shard})
        ranks.run(trained, size, config)
        found = last_tensors(config)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            # The shift of a norm starts at zero: it is a sum of a few small updates and nothing else, so their rounding shows.
            assert float((found[key] - tensor).norm() / tensor.norm()) <= 2e-5, (shard, size, key)
        assert predictions(config) == predictions(alone)


@pytest.mark.parametrize("name", METHODS)
def test_exact_preludes_have_the_same_bits_on_every_world_size(name: str, world: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 4):
        config = configured(world, tmp_path / str(size), name, {}, distribution={"exact": True})
        ranks.run(trained, size, config)
        found.append((last_tensors(config), predictions(config)))
    for tensors, predicted in found[1:]:
        tiny_run.assert_same(tensors, found[0][0])
        assert predicted == found[0][1]


def test_a_run_stopped_in_a_prelude_resumes_on_another_number_of_ranks(world: Path, tmp_path: Path) -> None:
    """With `exact`, even with the same bits."""
    undisturbed, moved = (configured(world, tmp_path / each, "mpt", {}, distribution={"exact": True}) for each in ("one", "moved"))
    ranks.run(trained, 1, undisturbed)
    assert ranks.launch(lambda: run_all(moved), 2, BPT_FAULT="step.after_update,stage=source/teachers,step=2,term") == [75, 75]
    assert not (moved.directory / "source" / "posterior").exists()
    assert ranks.launch(lambda: run_all(moved), 1) == [0]
    tiny_run.assert_same(last_tensors(moved), last_tensors(undisturbed))
    assert predictions(moved) == predictions(undisturbed)
