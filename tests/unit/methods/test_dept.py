"""DePT against an explicit loop in float64, and against the plain prompt it starts as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_run
import tiny_t5
import torch

from bpt_dist.backbones import loading
from bpt_dist.commands.eval import evaluate_stored
from bpt_dist.config import RunConfig
from bpt_dist.data.tokens import PAD_ID
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods import base as methods
from bpt_dist.training.stage import TrainingStage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(
    world: Path, folder: Path, method: str = "dept", options: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    plain = tiny_run.settings(world, {"name": method, **(options or {})}, output=str(folder / "runs"), **sections)
    return tiny_run.load(folder, plain)


def randomised(stage: TrainingStage, seed: int = 0) -> Any:
    """The method of a stage with every trained tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return stage.method


@pytest.mark.parametrize(
    "options", [{"max_length": 64}, {"max_length": 5}, {"max_length": 5, "scale_update": True, "rank": 4}], ids=str
)
def test_the_encoder_reads_prompt_then_embeddings_plus_a_times_b(
    options: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, options=options)) as stage:
        method, batch = randomised(stage), stage.batches.at(0)
        embeds = method.backbone.model.shared(batch.source_ids)
        found = method.input_embeds(embeds, batch)[0].detach().numpy()
        a, b, prompt = (
            tensor.detach().double().numpy() for tensor in (method.position_factor, method.embedding_factor, method.particles)
        )
    scale = 8 / numpy.sqrt(4) if "scale_update" in options else 1.0
    assert a.shape == (options["max_length"], b.shape[0])
    assert embeds.shape[1] > 5
    for n in range(len(batch)):
        numpy.testing.assert_array_equal(found[n, :3], prompt[0])
        for t in range(embeds.shape[1]):
            expected = embeds[n, t].double().numpy().copy()
            if t < options["max_length"]:
                expected += scale * sum(a[t, r] * b[r] for r in range(len(b)))
            numpy.testing.assert_allclose(found[n, 3 + t], expected, rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_prompt_tuning_of_its_own_prompt(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("dept", "prompt_tuning"):
        with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, name)) as stage, torch.no_grad():
            found.append(stage.method(stage.batches.at(0)).logits)
    assert torch.equal(*found)


def test_a_text_does_not_depend_on_how_far_it_is_padded(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path)) as stage, torch.no_grad():
        method, batch = randomised(stage), stage.batches.at(0)
        together = method(batch).log_likelihood[0]
        apart = torch.stack([method(batch.select([n])).log_likelihood[0, 0] for n in range(len(batch))])
        assert bool((batch.source_ids == PAD_ID).any())
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "max_length", "rank", "numbers"), [
    (20, 256, 60, 76_800), (40, 256, 45, 76_800), (60, 256, 30, 76_800), (80, 256, 15, 76_800), (40, 348, 41, 76_476),
])  # fmt: skip
def test_the_rank_spends_what_a_prompt_of_100_positions_has_left(
    length: int, max_length: int, rank: int, numbers: int, world: Path, tmp_path: Path
) -> None:
    """The four pairs of the paper for T5-base; with longer texts the same budget buys a lower rank."""
    wide = loading.load(str(tiny_t5.make(tmp_path / "wide", width=768, layers=1)))
    options = {"length": length, "max_length": max_length, "init": "normal"}
    method = methods.load(configured(world, tmp_path, options=options), wide)
    method.begin_target(None, [], [], Mesh())
    assert method.embedding_factor.shape == (rank, 768)  # type: ignore[union-attr]
    assert method.num_trainable() == numbers


def test_prompt_and_update_have_their_own_learning_rates(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first step is the learning rate in the direction of the gradient's sign."""
    config = configured(world, tmp_path, options={"lr_low_rank": 0.02}, target={"lr": 0.5, "schedule": "constant"})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        method, batch = stage.method, stage.batches.at(0)
        before = method.snapshot()
        method.loss(method(batch), batch).backward()
        stage.optimizer.step(0)
        moved = {name: (tensor - before[name]).abs() for name, tensor in method.snapshot().items()}
    assert float(moved["particles"].median()) == pytest.approx(0.5, rel=1e-3)
    assert float(moved["embedding_factor"].median()) == pytest.approx(0.02, rel=1e-3)


def test_an_export_needs_the_file_of_its_start_no_longer(world: Path, tmp_path: Path) -> None:
    """Also a start longer than the budget, which leaves the update its least rank."""
    numpy.save(tmp_path / "start.npy", numpy.ones((120, 32), dtype=numpy.float32))
    options = {"init": "file", "init_file": str(tmp_path / "start.npy"), "max_length": 8}
    config = configured(world, tmp_path, options=options, data={"target_tasks": ["mood"]})
    run = tiny_run.trained(config)
    (tmp_path / "start.npy").unlink()
    found, _ = evaluate_stored(run / "target" / "mood" / "weights", config, "mood", "test")
    results = json.loads((run / "results.json").read_text())
    assert found.metrics == {entry["metric"]: entry["value"] for entry in results}


def test_a_prompt_as_long_as_the_budget_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.length: leaves nothing of budget_length 100 \(got 100\); lower it"):
        configured(world, tmp_path, options={"length": 100})
    with pytest.raises(ConfigError, match=r"method\.budget_length: has no effect beside rank \(got 50\)"):
        configured(world, tmp_path, options={"rank": 4, "budget_length": 50})
