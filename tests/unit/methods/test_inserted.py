"""What all methods keep that are inserted into the backbone: texts of a batch do not touch each other, decoding follows scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import inserted
import pytest
import tiny_run
import tiny_t5
import torch
from plain_t5 import batch, shake
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.config import DistributionConfig
from bpt_dist.config.method_source import method_names
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import World
from bpt_dist.methods._inserted import InsertedMethod
from bpt_dist.methods.base import method_class
from bpt_dist.training.sharding import placement

NAMES = [name for name in method_names() if issubclass(method_class(name), InsertedMethod)]
TASKS = ("mood", "count", "truth")
TASK_INDEX = (2, 0, 1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


@pytest.fixture(params=[(name, forward) for name in NAMES for forward in ("stock", "packed")], ids="-".join)
def method(request: pytest.FixtureRequest, folder: Path) -> Any:
    name, forward = request.param
    found = inserted.begun(folder, name, TASKS)
    if forward == "packed":
        found.backbone.use_packed_pass("sdpa")
    shake(found)
    return found


def alone(texts: Batch, n: int) -> Batch:
    return texts.select([n])


@torch.no_grad()
def log_likelihood(method: Any, texts: Batch) -> Tensor:
    found: Tensor = method(texts).log_likelihood[0]
    return found


# How far a method may start from the backbone. HyperFormer's written norms start with gains of about 0.08, as published.
START = {"bitfit": 0.0, "lora": 0.0, "adapters": 1e-2, "hyperdecoder": 1e-2}


@pytest.mark.parametrize("name", START)
def test_at_its_start_the_method_is_the_t5(folder: Path, name: str) -> None:
    started, texts = inserted.begun(folder, name, TASKS), batch(TASK_INDEX)
    found = log_likelihood(started, texts)
    started.backbone.detach()
    torch.testing.assert_close(found, log_likelihood(started, texts), rtol=0, atol=START[name])


def test_a_text_scores_alone_as_beside_texts_of_other_lengths_and_tasks(method: Any) -> None:
    texts = batch(TASK_INDEX)
    together = log_likelihood(method, texts)
    for n in range(len(texts)):
        torch.testing.assert_close(log_likelihood(method, alone(texts, n))[0], together[n], rtol=1e-5, atol=1e-5)
    assert torch.equal(log_likelihood(method, batch(TASK_INDEX, pad=77)), together)


def test_ranking_equals_scoring_each_label(method: Any) -> None:
    texts = batch(TASK_INDEX)
    labels = torch.tensor([[10, 1, -100], [11, 12, 1]])
    found = method.rank(texts, labels, "map")[0]
    for c, label in enumerate(labels):
        targets = label.expand(len(texts), -1)
        asked = Batch(0, texts.source_ids, texts.source_mask, targets, texts.task_index, texts.row_ids, texts.weight)
        torch.testing.assert_close(found[:, c], log_likelihood(method, asked), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generation_is_the_greedy_path_of_the_score(method: Any) -> None:
    texts, limit = batch(TASK_INDEX), 5
    found = method.generate(texts, limit)
    for n in range(len(texts)):
        one, tokens = alone(texts, n), torch.empty(1, 0, dtype=torch.long)
        while tokens.shape[1] < limit and tokens[0, -1:].tolist() != [1]:
            asked = torch.cat([tokens, torch.tensor([[5]])], dim=1)  # what comes last is not read
            logits = method(Batch(0, one.source_ids, one.source_mask, asked, one.task_index, one.row_ids, one.weight)).logits
            tokens = torch.cat([tokens, logits[0, :, -1].argmax(-1, keepdim=True)], dim=1)
        assert found[n] == method.backbone.tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_gradients_of_a_mixed_batch_are_the_sum_over_its_texts(method: Any) -> None:
    texts = batch(TASK_INDEX)
    method.loss(method(texts), texts).backward()
    together = {name: parameter.grad.clone() for name, parameter in method.named_parameters()}
    method.zero_grad()
    for n in range(len(texts)):
        one = alone(texts, n)
        method.loss(method(one), one).backward()
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in method.backbone.model.parameters())


def gradients(method: Any) -> dict[str, Tensor]:
    texts = batch(TASK_INDEX)
    method.loss(method(texts), texts).backward()
    return {name: parameter.grad for name, parameter in method.named_parameters()}


def test_recomputing_the_blocks_in_the_backward_pass_changes_no_gradient(method: Any) -> None:
    expected = gradients(method)
    method.zero_grad(set_to_none=True)
    placement.place(method.backbone, DistributionConfig(activation_checkpointing=True), World())
    tiny_run.assert_same(gradients(method), expected)


VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *((name, {}, tasks) for name in NAMES for tasks in (TASKS, TASKS[:1])),
    ("lora", {"targets": ("q", "k", "v", "o", "wi", "wo"), "init": "kaiming"}, TASKS),
    ("lora", {"targets": ("k",)}, TASKS),
    ("adapters", {"shared": True}, TASKS),
    ("hyperformer", {"variant": "plain", "label_smoothing": 0.1}, TASKS),
    ("hyperdecoder", {"adapter_input": "raw", "pooled_mlp": True, "label_smoothing": 0.1}, TASKS),
]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("name", "options", "tasks"), VARIANTS, ids=str)
def test_the_packed_pass_reads_what_is_inserted(
    name: str, options: dict[str, Any], tasks: tuple[str, ...], gated: bool, tmp_path: Path
) -> None:
    folder, texts = (
        tiny_t5.make(tmp_path / "t5", gated=gated, tied=not gated),
        batch(TASK_INDEX if len(tasks) > 1 else (0, 0, 0, 0)),
    )
    labels, found = torch.tensor([[10, 1, -100], [11, 12, 1], [10, 12, 1]]), {}
    for forward in ("stock", "packed"):
        if gated and "wi" in options.get("targets", ()):
            options = {**options, "targets": ("wi_0", "wi_1", "v", "wo")}
        method = inserted.begun(folder, name, tasks, **options)
        shake(method, std=0.1)
        if forward == "packed":
            method.backbone.use_packed_pass("sdpa")
        scored = method(texts)
        method.loss(scored, texts).backward()
        gradients = {key: tensor.grad for key, tensor in method.named_parameters()}
        ranked, written = method.rank(texts, labels, "map"), method.generate(texts, 6)
        found[forward] = (scored.log_likelihood.detach(), ranked, gradients, written)
    scores, ranks, gradients, written = found["packed"]
    expected_scores, expected_ranks, expected, expected_written = found["stock"]
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks, expected_ranks, rtol=1e-5, atol=1e-5)
    assert written == expected_written
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5 * largest)


def test_a_change_that_reads_other_tokens_gets_the_rows_of_the_stock_pass(folder: Path) -> None:
    """Whatever a change does within a row, at every kind of place: the packed pass asks it as the stock pass does."""
    texts, found = batch(), {}
    for forward in ("stock", "packed"):
        backbone = loading.load(str(folder))
        trained = [torch.ones(1, requires_grad=True) for _ in range(3)]

        def first(_x: Tensor, y: Tensor, trained: list[Tensor] = trained) -> Tensor:
            return y + 0.1 * trained[0] * y[:, :1].tanh()  # of the first token of each row

        backbone.wrap_linear(lambda _place, first=first: first, ("q", "k", "o", "wi", "wo", "lm_head"))
        backbone.wrap_norm(lambda _place, trained=trained: lambda x, y: y * trained[1] + 0.1 * x[:, :1].to(y.dtype))
        for residual in (False, True):
            backbone.wrap_sublayer(
                lambda _place, trained=trained: lambda x, y: (y * trained[2]).tanh() + x,
                ("self_attention", "cross_attention", "feed_forward"),
                residual=residual,
            )
        if forward == "packed":
            backbone.use_packed_pass("eager")
            assert backbone.packed_pass_for(3) is not None
        passed = backbone.log_likelihood(texts, lambda embeds: torch.stack([embeds, -embeds]), "token_mean", states=True)
        passed.log_likelihood.sum().backward()
        ranked = backbone.rank(texts, torch.tensor([[10, 1], [11, 1]]), lambda embeds: embeds[None])
        written = backbone.generate(texts, lambda embeds: torch.stack([embeds, -embeds]), 5)
        found[forward] = ([passed.log_likelihood.detach(), ranked, *(tensor.grad for tensor in trained)], written)
    for ours, theirs in zip(found["packed"][0], found["stock"][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert found["packed"][1] == found["stock"][1]


@pytest.mark.parametrize("name", NAMES)
def test_a_t5_in_bfloat16_is_adapted_by_float32_tensors(folder: Path, name: str) -> None:
    exact, half = (inserted.begun(folder, name, TASKS, dtype=dtype) for dtype in ("fp32", "bf16"))
    shake(exact, std=0.05)
    shake(half, std=0.05)
    tiny_run.assert_same(half.snapshot(), exact.snapshot())
    torch.testing.assert_close(
        log_likelihood(half, batch(TASK_INDEX)), log_likelihood(exact, batch(TASK_INDEX)), rtol=0.05, atol=0.2
    )
    for name_, gradient in gradients(half).items():
        assert gradient.dtype is torch.float32, name_
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


def test_the_next_target_starts_from_the_stock_t5(folder: Path) -> None:
    for name in NAMES:
        method = inserted.begun(folder, name)
        expected = log_likelihood(method, batch())
        shake(method)
        again: Any = [type("Task", (), {"name": "mood"})()]
        method.begin_target(None, again, [32], None)
        assert torch.equal(log_likelihood(method, batch()), expected)
        method.end()
        assert not any(module._forward_hooks for module in method.backbone.model.modules())
