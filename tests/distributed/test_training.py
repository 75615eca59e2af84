"""Options of the source stage on several ranks, repetition, resume; all layouts of the plain stage are in test_layouts.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
import torch
from torch import Tensor

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.train import run_all

STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: dict[str, Any], **sections: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    long = {"steps": STEPS, "checkpoint_every": STEPS, "log_every": STEPS, **sections.pop("source", {})}
    target = {"batch_size": 4, **sections.pop("target", {})}
    plain = tiny_run.settings(world, {"name": "bpt", **method}, output=str(folder / "runs"), source=long, target=target, **sections)
    return tiny_run.load(folder, plain)


def trained(world: World, config: RunConfig) -> None:
    tiny_run.trained(config, world)


def posterior(config: RunConfig) -> Tensor:
    return read_tensors(config.directory / "source" / "posterior" / "posterior.safetensors")[0]["particles"]


def adapter(config: RunConfig, task: str) -> Tensor:
    return read_tensors(config.directory / "target" / task / "adapter" / "adapter_model.safetensors")[0]["prompt_embeddings"]


def predictions(config: RunConfig) -> list[str]:
    return [
        json.loads(line)["prediction"]
        for task in config.data.target_tasks
        for line in (config.directory / "target" / task / "predictions.jsonl").read_text().splitlines()
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# --- one rank is n ranks ----------------------------------------------------------------------------------------------------------

CASES = {
    "own texts, one task of two": ({"num_particles": 4}, {"source": {"shared_texts": False, "tasks_per_step": 1}}, (2,)),
    "clipped, weighted": ({"num_particles": 2}, {"source": {"clip": 0.5, "task_weights": {"truth": 4.0}, "warmup": 0.2}}, (4,)),
    "repulsive ensemble, token kernels": ({"num_particles": 4, "form": "repulsive_ensemble", "scope": "token"}, {}, (2,)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_world_size_trains_the_same_particles_and_predicts_the_same(case: str, world: Path, tmp_path: Path) -> None:
    method, sections, sizes = CASES[case]
    alone = {**sections, "distribution": {}}
    expected = configured(world, tmp_path / "1", method, **alone)
    tiny_run.trained(expected)
    for size in sizes:
        config = configured(world, tmp_path / str(size), method, **sections)
        ranks.run(trained, size, config)
        assert relative(posterior(config), posterior(expected)) < 1e-5
        for task in ("mood", "count"):
            assert relative(adapter(config, task), adapter(expected, task)) < 1e-5
        assert predictions(config) == predictions(expected)


def test_the_same_layout_has_the_same_bits(world: Path, tmp_path: Path) -> None:
    found = []
    for attempt in ("a", "b"):
        config = configured(world, tmp_path / attempt, {"num_particles": 2}, source={"steps": 5})
        ranks.run(trained, 4, config)
        found.append(config)
    assert torch.equal(posterior(found[0]), posterior(found[1]))
    assert torch.equal(adapter(found[0], "count"), adapter(found[1], "count"))


def test_a_row_that_cannot_work_on_the_processes_is_refused_before_any_row_starts(world: Path, tmp_path: Path) -> None:
    rows = [{"label": "good"}, {"label": "bad", "distribution": {"mesh": {"particle": 2, "data": 1}}}]
    config = configured(world, tmp_path, {}, rows=rows)
    assert ranks.launch(lambda: run_all(config), 4) == [2] * 4
    assert not config.directory.exists()


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 4)])
def test_a_run_resumes_on_another_number_of_ranks(first: int, then: int, world: Path, tmp_path: Path) -> None:
    """F17: checkpoints hold the particles of all ranks."""
    undisturbed, moved = (configured(world, tmp_path / name, {"num_particles": 4}) for name in ("undisturbed", "moved"))
    tiny_run.trained(undisturbed)
    stopped = ranks.launch(lambda: run_all(moved), first, BPT_FAULT=f"step.after_update,stage=source,step={STEPS // 2},term")
    assert stopped == [75] * first
    assert ranks.launch(lambda: run_all(moved), then) == [0] * then
    assert relative(posterior(moved), posterior(undisturbed)) < 1e-5
    assert relative(adapter(moved, "mood"), adapter(undisturbed, "mood")) < 1e-5
