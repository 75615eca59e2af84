"""ATTEMPT's attention against its formula in a float64 loop, and what follows from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_run
import tiny_t5
import torch

from bpt_dist.backbones import loading
from bpt_dist.config import RunConfig
from bpt_dist.data.tokens import PAD_ID
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods import base as methods
from bpt_dist.storage.checkpoint import latest, load, read_tensors
from bpt_dist.tasks.spec import TaskSpec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, options: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    plain = tiny_run.settings(world, {"name": "attempt", **(options or {})}, output=str(folder / "runs"), **sections)
    return tiny_run.load(folder, plain)


def scattered(method: Any, scale: float = 1.0) -> Any:
    """The method with trained tensors and source prompts far enough apart that the attention has something to choose."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        method.sources = scale * torch.randn(method.sources.shape, generator=generator)
    return method


def layer_norm(x: numpy.ndarray, gain: numpy.ndarray, shift: numpy.ndarray) -> numpy.ndarray:
    return (x - x.mean()) / numpy.sqrt(x.var() + 1e-5) * gain + shift


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_every_text_gets_the_mixture_of_the_paper(
    temperature: float | None, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asai et al. (2022), section 3.2, text by text; with two targets, each text mixes in the prompt of its own task."""
    options = {"attention_width": 7, "temperature": temperature}
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, options, target={"joint": True}), 1) as stage:
        method, batch = scattered(stage.method, 2.0), stage.batches.at(0)
        embeds = method.backbone.model.shared(batch.source_ids).detach()
        found = method.input_embeds(embeds, batch)[0].detach().double().numpy()
        down, up, gain, shift, targets, sources = (
            tensor.detach().double().numpy()
            for tensor in (method.down, method.up, method.norm_scale, method.norm_shift, method.target_prompts, method.sources)
        )
    assert set(batch.task_index.tolist()) == {0, 1}
    assert bool((batch.source_ids == PAD_ID).any())
    for n in range(len(batch)):
        own, length = targets[batch.task_index[n]], int(batch.source_mask[n].sum())
        query = embeds[n, :length].double().numpy().max(axis=0)
        hidden = down @ query
        hidden = layer_norm(up @ (hidden / (1 + numpy.exp(-hidden))), gain, shift)
        library = [*sources, own]
        scores = numpy.array([prompt.max(axis=0) @ hidden for prompt in library]) / (temperature or math.e * 32)
        weights = numpy.exp(scores - scores.max()) / numpy.exp(scores - scores.max()).sum()
        expected = own + sum(weight * prompt for weight, prompt in zip(weights, library, strict=True))
        numpy.testing.assert_allclose(found[n, :3], expected, rtol=1e-4, atol=1e-4)
        numpy.testing.assert_array_equal(found[n, 3:], embeds[n].double().numpy())


def test_a_text_does_not_depend_on_how_far_it_is_padded(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum over pads would make it depend on the longest text of its batch."""
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, {"temperature": 1.0}), 1) as stage, torch.no_grad():
        method, batch = scattered(stage.method), stage.batches.at(0)
        method.backbone.model.shared.weight[PAD_ID] = 50.0
        together = method(batch).log_likelihood[0]
        apart = torch.stack([method(batch.select([n])).log_likelihood[0, 0] for n in range(len(batch))])
    assert bool((batch.source_ids == PAD_ID).any())
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_ranking_and_generation_read_the_mixture_that_was_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, {"temperature": 1.0}, reduction="token_sum")
    with tiny_run.stage_of(monkeypatch, config, 1) as stage, torch.no_grad():
        method, batch = scattered(stage.method), stage.batches.at(0).select([0])
        trained = method(batch)
        ranked = method.rank(batch, batch.target_ids, "map")
        torch.testing.assert_close(ranked[..., 0], trained.log_likelihood, rtol=1e-5, atol=1e-5)
        (written,) = method.generate(batch, 1)
        first = int(trained.logits[0, 0, 0].argmax())
        assert written == method.backbone.tokenizer.decode([first], skip_special_tokens=True)


def test_the_attention_learns_at_its_own_rate(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the authors' code this rate never applied. Adam's first step is the learning rate, whatever the gradient."""
    config = configured(world, tmp_path, {"lr_attention": 0.05, "temperature": 1.0}, target={"lr": 0.4, "schedule": "constant"})
    with tiny_run.stage_of(monkeypatch, config, 1) as stage:
        method, batch = scattered(stage.method), stage.batches.at(0)
        before = method.snapshot()
        method.loss(method(batch), batch).backward()
        stage.optimizer.step(0)
        moved = {name: float((tensor - before[name]).abs().median()) for name, tensor in method.snapshot().items()}
    attention = {"down": 0.05, "up": 0.05, "norm_scale": 0.05, "norm_shift": 0.05}
    assert moved == pytest.approx({"target_prompts": 0.4, **attention}, rel=1e-2)


@pytest.mark.parametrize(("train_layer_norm", "tasks", "numbers"), [
    (True, 1, 76_800 + 153_600 + 1_536), (False, 1, 230_400), (True, 8, 8 * 96_192),
])  # fmt: skip
def test_the_count_is_the_published_one_with_or_without_the_layer_norm(
    train_layer_norm: bool, tasks: int, numbers: int, world: Path, tmp_path: Path
) -> None:
    wide = loading.load(str(tiny_t5.make(tmp_path / "wide", width=768, layers=1)))
    method = methods.load(configured(world, tmp_path, {"train_layer_norm": train_layer_norm, "length": 100}), wide)
    specs = [TaskSpec(name=f"task{index}", summary="", kind="text", metrics=("accuracy",)) for index in range(tasks)]
    method.begin_target({"prompts": torch.randn(6, 100, 768)}, specs, [1] * tasks, Mesh())
    assert method.num_trainable() == numbers


def test_the_attention_starts_with_the_standard_deviation_of_the_authors_code(world: Path, tmp_path: Path) -> None:
    """`_init_weights` of their T5 meets every `nn.Linear`: N(0, 0.01^2) for both weights, at every width."""
    method = methods.load(configured(world, tmp_path, {"length": 3}), loading.load(str(world / "t5")))
    method.begin_target(
        {"prompts": torch.randn(2, 3, 32)}, [TaskSpec(name="mood", summary="", kind="text", metrics=("accuracy",))], [1], Mesh()
    )
    for weight, shape in ((method.down.detach(), (100, 32)), (method.up.detach(), (32, 100))):
        assert weight.shape == shape
        assert float(weight.mean()) == pytest.approx(0.0, abs=0.001)
        assert float(weight.std()) == pytest.approx(0.01, rel=0.05)
        assert float(weight.abs().max()) > 0.025  # not cut


def test_the_attention_is_pre_trained_over_frozen_source_prompts(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run.trained(configured(world, tmp_path, {"prompt_steps": 2}))
    handed_over, _ = read_tensors(run / "source" / "posterior" / "posterior.safetensors")
    last = latest(run / "source" / "prompts" / "checkpoints", fingerprint=None, warn=pytest.fail)
    assert last is not None
    assert last.step == 2
    assert torch.equal(handed_over["prompts"], load(last)[0]["trained/task_prompts/value"])
    from_there = configured(world, tmp_path, source={"posterior": str(run)}, name="again")
    with tiny_run.stage_of(monkeypatch, from_there) as stage:
        for name in ("down", "up", "norm_scale", "norm_shift"):
            assert torch.equal(getattr(stage.method, name), handed_over[f"attention/{name}"])
        assert torch.equal(stage.method.target_prompts[0], handed_over["prompts"][0])
    plain = tiny_run.trained(configured(world, tmp_path, name="plain"))
    missing = configured(world, tmp_path, {"prompt_steps": 2}, source={"posterior": str(plain)}, name="missing")
    with pytest.raises(ConfigError, match=r"method\.prompt_steps: is 2, but the source posterior holds no pre-trained attention"):
        tiny_run.trained(missing)
    narrow = configured(world, tmp_path, {"attention_width": 9}, source={"posterior": str(run)}, name="narrow")
    with pytest.raises(ConfigError, match=r"method\.attention_width: is 9, the pre-trained attention of the posterior has 100"):
        tiny_run.trained(narrow)
