"""Both passes of every decoder-only family equal transformers' own modules, text by text, on random batches of awkward shapes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import torch
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.prompts import prepend, prepend_chosen, prepend_own
from bpt_dist.data.batches import Batch

NUM_BATCHES = 20
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CANDIDATES = torch.tensor([[9, 12, 1], [9, 12, 14], [9, 1, -100], [30, -100, -100], [9, 12, -100]])


@pytest.fixture(scope="module", params=tiny_decoder.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.make(tmp_path_factory.mktemp(request.param), request.param)


@cache
def models(folder: Path) -> tuple[Any, dict[str, Backbone]]:
    """Return transformers' model and our passes: two kinds of attention, and its own modules padded."""
    passes = {kind: loading.load(str(folder)) for kind in ("sdpa", "eager", "stock")}
    for kind in ("sdpa", "eager"):
        passes[kind].use_packed_pass(kind)
    return tiny_decoder.stock(folder), passes


def expected(model: Any, batch: Batch, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihoods [m, N] and the gradients of their weighted sum with respect to the prompts."""
    theta = prompts.clone().requires_grad_()
    rows = [[tiny_decoder.truth(model, prompt, *tiny_decoder.of_row(batch, n)) for n in range(len(batch))] for prompt in theta]
    found = torch.stack([torch.stack(row) for row in rows])
    (gradient,) = torch.autograd.grad((found * batch.weight).sum(), theta)
    return found.detach(), gradient


@pytest.mark.parametrize("seed", range(NUM_BATCHES))
def test_log_likelihoods_and_gradients_are_those_of_transformers(folder: Path, seed: int) -> None:
    model, passes = models(folder)
    batch, prompts = tiny_decoder.random_batch(seed)
    truth, gradient = expected(model, batch, prompts)
    for kind, backbone in passes.items():
        theta = prompts.clone().requires_grad_()
        found = backbone.log_likelihood(batch, lambda embeds, theta=theta: prepend(theta, embeds), "token_sum")
        (found.log_likelihood * batch.weight).sum().backward()
        torch.testing.assert_close(found.log_likelihood, truth, **CLOSE, msg=lambda text, kind=kind: f"{kind}: {text}")
        assert theta.grad is not None
        scale = float(gradient.abs().max()) or 1.0  # behind several short windows a prompt is out of sight
        torch.testing.assert_close(theta.grad / scale, gradient / scale, **CLOSE, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize("seed", range(4))
def test_ranking_is_that_of_whole_sequences(folder: Path, seed: int) -> None:
    """Candidates that begin with the same tokens, one inside another, are ranked by all their tokens."""
    model, passes = models(folder)
    batch, prompts = tiny_decoder.random_batch(seed)
    for kind, backbone in passes.items():
        found = backbone.rank(batch, CANDIDATES, lambda embeds: prepend(prompts, embeds))
        for m, prompt in enumerate(prompts):
            for n in range(len(batch)):
                source, _ = tiny_decoder.of_row(batch, n)
                truth = [tiny_decoder.truth(model, prompt, source, words[words >= 0]) for words in CANDIDATES]
                torch.testing.assert_close(found[m, n], torch.stack(truth), rtol=1e-4, atol=2e-5, msg=f"{kind}, {m}, {n}")


@pytest.mark.parametrize("seed", range(4))
def test_generation_is_token_by_token_that_of_whole_sequences(folder: Path, seed: int) -> None:
    model, passes = models(folder)
    batch, prompts = tiny_decoder.random_batch(seed)
    sources = [tiny_decoder.of_row(batch, n)[0] for n in range(len(batch))]
    truth = [[tiny_decoder.written(model, prompt, source, 9) for source in sources] for prompt in prompts]
    for kind, backbone in passes.items():
        found = backbone.generate(batch, lambda embeds: prepend(prompts, embeds), 9)
        assert found == [backbone.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in truth], kind


def test_prompts_of_tasks_and_of_texts_are_read_as_they_are_chosen(folder: Path) -> None:
    """Tasks may start from equal prompts, which still learn apart; a prompt no text has gets no gradient."""
    _, passes = models(folder)
    batch, _ = tiny_decoder.random_batch(3)
    batch = batch.select([0, 1, 2])
    choice = torch.tensor([0, 2, 0])
    start = torch.randn(1, 1, 4, tiny_decoder.WIDTH, generator=torch.Generator().manual_seed(1)).expand(2, 4, -1, -1)
    gradients = {}
    for kind, backbone in passes.items():
        for form in ("chosen", "own"):
            theta = start.clone().requires_grad_()
            put = {
                "chosen": lambda embeds, theta=theta: prepend_chosen(theta, choice, embeds),
                "own": lambda embeds, theta=theta: prepend_own(theta[:, choice], embeds),
            }[form]
            backbone.log_likelihood(batch, put, "token_mean").log_likelihood.sum().backward()
            gradients[kind, form] = theta.grad
            assert not theta.grad[:, 1].any()
    for found in gradients.values():
        torch.testing.assert_close(found, gradients["stock", "own"], rtol=1e-4, atol=1e-5)


def test_states_and_logits_of_both_passes_are_the_same(folder: Path) -> None:
    _, passes = models(folder)
    for seed in range(4):
        batch, prompts = tiny_decoder.random_batch(seed)
        found = {
            kind: backbone.log_likelihood(batch, lambda embeds, p=prompts: prepend(p, embeds), "token_mean", states=True)
            for kind, backbone in passes.items()
        }
        read = torch.cat([torch.ones(len(batch), prompts.shape[1]), batch.source_mask], dim=1).bool()
        has_target = batch.target_ids >= 0
        ours, stock = found["sdpa"], found["stock"]
        torch.testing.assert_close(ours.log_likelihood, stock.log_likelihood, **CLOSE)
        torch.testing.assert_close(ours.logits[:, has_target], stock.logits[:, has_target], rtol=1e-4, atol=1e-4)
        assert ours.states is not None
        assert stock.states is not None
        for own, other, mask in zip(ours.states, stock.states, (read, has_target), strict=True):
            torch.testing.assert_close(own[:, mask], other[:, mask], rtol=1e-4, atol=1e-4)


def test_the_ensemble_writes_one_text_by_the_mean_distribution(folder: Path) -> None:
    _, passes = models(folder)
    batch, prompts = tiny_decoder.random_batch(5)
    prompts = torch.cat([prompts, prompts + 1])
    found = [backbone.generate(batch, lambda e: prepend(prompts, e), 6, average=True) for backbone in passes.values()]
    assert len(found[0]) == 1
    assert found[0] == found[1] == found[2]
