"""Same trajectory for every world size, mesh and sharding; a partitioned T5 gives the prompts the gradients of the whole one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny_run
import tiny_t5
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bpt_dist import backbone as backbones
from bpt_dist import engine
from bpt_dist.backbone import Backbone
from bpt_dist.checkpoint import read_tensors
from bpt_dist.config import Config, Distribution
from bpt_dist.files import read_json
from bpt_dist.mesh import World
from bpt_dist.prompts import prepend
from bpt_dist.train import run_all

STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: dict[str, Any], **sections: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    long = {"steps": STEPS, "checkpoint_every": STEPS, "log_every": STEPS, **sections.pop("source", {})}
    target = {"batch_size": 4, **sections.pop("target", {})}
    plain = tiny_run.settings(world, {"name": "bpt", **method}, output=str(folder / "runs"), source=long, target=target, **sections)
    return tiny_run.load(folder, plain)


def trained(world: World, config: Config) -> None:
    tiny_run.trained(config, world)


def posterior(config: Config) -> Tensor:
    return read_tensors(config.directory / "source" / "posterior" / "posterior.safetensors")[0]["particles"]


def adapter(config: Config, task: str) -> Tensor:
    return read_tensors(config.directory / "target" / task / "adapter" / "adapter_model.safetensors")[0]["prompt_embeddings"]


def predictions(config: Config) -> list[str]:
    return [
        json.loads(line)["prediction"]
        for task in config.data.target_tasks
        for line in (config.directory / "target" / task / "predictions.jsonl").read_text().splitlines()
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# --- one rank is n ranks ----------------------------------------------------------------------------------------------------------

CASES = {
    "four particles": ({"num_particles": 4}, {}, (2, 4)),
    "two particles, data axis": ({"num_particles": 2}, {}, (2, 4)),
    "three particles, data axis only": ({"num_particles": 3}, {}, (2,)),
    "own texts, one task of two": ({"num_particles": 4}, {"source": {"shared_texts": False, "tasks_per_step": 1}}, (2,)),
    "clipped, weighted": ({"num_particles": 2}, {"source": {"clip": 0.5, "task_weights": {"truth": 4.0}, "warmup": 0.2}}, (4,)),
    "data axis by hand": ({"num_particles": 2}, {"distribution": {"mesh": {"particle": 1, "data": 2}}}, (2,)),
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


def test_a_target_step_with_too_few_texts_is_refused_before_the_source_stage(world: Path, tmp_path: Path) -> None:
    config = configured(world, tmp_path, {}, target={"batch_size": 3})
    assert ranks.launch(lambda: run_all(config), 4) == [2] * 4
    reason = read_json(config.directory / "status.json")["reason"]
    assert reason.startswith("target.batch_size is 3: a step has 3 text(s) for 4 ranks of the data axis; raise it")
    assert not (config.directory / "source").exists()


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 4)])
def test_a_run_resumes_on_another_number_of_ranks(first: int, then: int, world: Path, tmp_path: Path) -> None:
    """F17: checkpoints hold all particles, whoever owned them."""
    undisturbed, moved = (configured(world, tmp_path / name, {"num_particles": 4}) for name in ("undisturbed", "moved"))
    tiny_run.trained(undisturbed)
    stopped = ranks.launch(lambda: run_all(moved), first, BPT_FAULT=f"step.after_update,stage=source,step={STEPS // 2},term")
    assert stopped == [75] * first
    assert ranks.launch(lambda: run_all(moved), then) == [0] * then
    assert relative(posterior(moved), posterior(undisturbed)) < 1e-5
    assert relative(adapter(moved, "mood"), adapter(undisturbed, "mood")) < 1e-5


# --- a partitioned T5 -------------------------------------------------------------------------------------------------------------


def texts(rank: int, step: int) -> SimpleNamespace:
    """Other texts of other lengths on every rank and step; T5 gathers its weights for all of them alike."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    source = torch.randint(3, 128, (2, 5 + 2 * rank + step), generator=generator)
    target = torch.randint(3, 128, (2, 3 + rank), generator=generator)
    return SimpleNamespace(source_ids=source, source_mask=torch.ones_like(source), target_ids=target)


def gradient(backbone: Backbone, rank: int, step: int) -> Tensor:
    prompts = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    found = backbone.score(texts(rank, step), lambda embeds: prepend(prompts, embeds), "token_mean")
    (-found.log_likelihood.sum()).backward()
    assert prompts.grad is not None
    return prompts.grad


def partitioned(world: World, folder: str, shard: Any) -> dict[str, Any]:
    """What one rank finds out about a partitioned T5."""
    torch.manual_seed(0)
    whole, parts = backbones.load(folder), backbones.load(folder)
    engine.place(parts, Distribution(shard=shard), world)
    errors = []
    for step in range(3):
        found, expected = gradient(parts, world.rank, step), gradient(whole, world.rank, step)
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    ids, prompts = torch.tensor([[10, 1], [11, 1]]), torch.randn(1, 4, 32)
    with torch.no_grad():
        ranked = [each.rank(texts(world.rank, 0), ids, lambda e: prepend(prompts.to(e), e)) for each in (parts, whole)]
        # Unequal lengths: rank 0 is done earlier and has to go on for the sake of the others.
        written = [
            each.generate(texts(world.rank, 0), lambda e: prepend(prompts, e), 3 + 4 * world.rank) for each in (parts, whole)
        ]
        rows = [each.vocabulary_rows(torch.arange(3, 9)) for each in (parts, whole)]
    parts.verify_unchanged()
    share_of = {"deepspeed": share_of_deepspeed, "fsdp2": share_of_fsdp2}[shard]
    share = share_of(list(parts.model.parameters()))
    waiting = parts.score(texts(world.rank, 0), lambda embeds: prepend(prompts.requires_grad_(), embeds), "token_mean")
    share["gathered"] += share_of(list(parts.model.parameters()))["gathered"]  # nor between forward and backward
    (-waiting.log_likelihood.sum()).backward()
    return {
        "errors": errors,
        "ranked": float((ranked[0] - ranked[1]).abs().max()),
        "written": written[0] == written[1],
        "rows": torch.equal(*rows),
        "whole": sum(p.numel() * p.element_size() for p in whole.model.parameters()),
        **share,
    }


def share_of_deepspeed(parameters: list[Any]) -> dict[str, Any]:
    """Bytes on this rank, bytes of the tensors that are not worth a message and stay whole, and what is gathered besides."""
    small = [p for p in parameters if p.ds_persist]
    assert max(p.ds_numel for p in small) <= 1000
    return {
        "resident": sum((p.numel() + p.ds_tensor.numel()) * p.element_size() for p in parameters),
        "small": sum(p.ds_numel * p.element_size() for p in small),
        "gathered": [p.ds_shape for p in parameters if p.numel() and not p.ds_persist],
    }


def share_of_fsdp2(parameters: list[Any]) -> dict[str, Any]:
    return {
        "resident": sum(p.to_local().numel() * p.element_size() for p in parameters),
        "small": 0,
        "gathered": [p.shape for p in parameters if not isinstance(p, DTensor)],
    }


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_partitioned_t5_gives_the_gradients_of_the_whole_one_and_holds_its_share(
    tied: bool, shard: str, world: Path, tmp_path: Path
) -> None:
    found = ranks.run(partitioned, 2, str(tiny_t5.make(tmp_path / "t5", tied=tied)), shard)
    for each in found:
        assert max(each["errors"]) < 2e-6
        assert each["ranked"] < 1e-4
        assert each["written"]
        assert each["rows"]
        assert each["gathered"] == []
        # Half of everything, and whole those tensors (norms, position biases) that are not worth a message.
        assert each["resident"] <= each["whole"] / 2 + each["small"] + 8 * 64
        assert each["small"] <= 0.02 * each["whole"]


@pytest.mark.parametrize(("shard", "num_particles"), [("deepspeed", 2), ("deepspeed", 1), ("fsdp2", 2)])
def test_a_run_with_a_partitioned_t5_is_the_run_with_the_whole_one(
    shard: str, num_particles: int, world: Path, tmp_path: Path
) -> None:
    short, method = {"source": {"steps": 3, "log_every": 1}}, {"num_particles": num_particles}
    whole = configured(world, tmp_path / "whole", method, **short)
    parts = configured(world, tmp_path / "parts", method, distribution={"shard": shard}, **short)
    for config in (whole, parts):
        ranks.run(trained, 2, config)
    assert relative(posterior(parts), posterior(whole)) < 1e-5
    for task in ("mood", "count"):
        assert relative(adapter(parts, task), adapter(whole, task)) < 1e-5
    assert predictions(parts) == predictions(whole)
