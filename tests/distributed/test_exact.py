"""`distribution.exact`: the bits of particles and optimizer state depend neither on the number of processes nor on resumes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
from records import repeatable

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.train import run_all

SIZES = (1, 2, 3, 4)
PARTICLES = (6, 5, 4, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: dict[str, Any], shard: str = "none", **source: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "source": {"steps": 20, "checkpoint_every": 5, "batch_size": 2, "clip": 0.3, "log_every": 5, **source},
        "target": {"batch_size": 4, "steps": 2},
        "data": {"target_tasks": ["mood"]},
        "distribution": {"exact": True, "shard": shard},
    }
    return tiny_run.load(folder, tiny_run.settings(world, {"name": "bpt", **method}, output=str(folder / "runs"), **sections))


def trained(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        tiny_run.trained(config, world)


def digest(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the newest checkpoint of every stage (particles, optimizer state) and of the posterior; metrics and results."""
    found = {stage: sha256(state) for stage, state in tiny_run.newest_states(config).items()}
    found["posterior"] = sha256(read_tensors(config.directory / "source" / "posterior" / "posterior.safetensors")[0])
    records = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = json.dumps([(record["stage"], record["step"], record["metrics"]) for record in repeatable(records)])
    results = json.loads((config.directory / "results.json").read_text())
    found["results"] = json.dumps([(entry["task"], entry["metric"], entry["value"]) for entry in results])
    return found


def sha256(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def digests(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, str]]:
    """What every number of particles ends with on every number of ranks; the ranks are forked once for all particles."""
    found = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        configs = {number: configured(world, folder / str(number), {"num_particles": number}) for number in PARTICLES}
        ranks.run(trained, size, list(configs.values()))
        found |= {(number, size): digest(config) for number, config in configs.items()}
    return found


@pytest.mark.parametrize("num_particles", PARTICLES)
def test_every_world_size_has_the_same_bits(num_particles: int, digests: dict[tuple[int, int], dict[str, str]]) -> None:
    for size in SIZES:
        assert digests[num_particles, size] == digests[num_particles, 1], size


def test_another_number_of_particles_has_other_bits(digests: dict[tuple[int, int], dict[str, str]]) -> None:
    assert len({digests[number, 1]["posterior"] for number in PARTICLES}) == len(PARTICLES)


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_a_partitioned_t5_has_the_same_bits_on_every_world_size(shard: str, world: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 4):
        config = configured(world, tmp_path / str(size), {"num_particles": 2}, shard, steps=6)
        ranks.run(trained, size, [config])
        found.append(digest(config))
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_a_run_that_moves_from_one_to_two_to_three_ranks_and_back_has_the_bits_of_an_undisturbed_one(
    world: Path, tmp_path: Path, digests: dict[tuple[int, int], dict[str, str]]
) -> None:
    """F17 with ordered sums: the particles change their ranks twice, the optimizer's state with them."""
    config = configured(world, tmp_path, {"num_particles": 6})
    for size, step in ((1, 6), (2, 11), (3, 16)):
        fault = f"step.after_update,step={step},stage=source,raise"
        assert set(ranks.launch(lambda: run_all(config), size, BPT_FAULT=fault)) == {70}
    assert ranks.launch(lambda: run_all(config)) == [0]
    assert digest(config) == digests[6, 1]
