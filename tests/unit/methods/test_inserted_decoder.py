"""What methods insert into a decoder-only model acts on packed tokens as in transformers' modules, recomputed or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import inserted
import pytest
import tiny_decoder
import torch
from plain_t5 import shake
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.decoder.model import DecoderBackbone
from bpt_dist.backbones.insertion import Change, Site, each_token, of_rows
from bpt_dist.backbones.prompts import prepend
from bpt_dist.config import DistributionConfig
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement

TASKS = ("mood", "count", "truth")
CANDIDATES = torch.tensor([[9, 12, 1], [9, 12, 14], [9, 1, -100], [30, -100, -100]])
VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("lora", {"targets": ("q", "k", "v", "o", "wi", "wo")}, TASKS),
    ("lora", {"targets": ("q", "v")}, TASKS),
    ("bitfit", {}, TASKS),
    ("adapters", {}, TASKS),
    ("adapters", {"shared": True}, TASKS),
    ("adapters", {}, TASKS[:1]),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SEEDS = (1, 2, 4)  # of random texts; the first have a long source and a long target


@pytest.fixture(scope="module", params=tiny_decoder.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.make(tmp_path_factory.mktemp("gemma"), "gemma3_text")


def prepared(backbone: Any, form: str) -> DecoderBackbone:
    """Let a backbone read texts by transformers' modules (`stock`), or by our pass, which may be `recomputed`."""
    if form != "stock":
        placement.place(backbone, DistributionConfig(activation_checkpointing=form == "recomputed"), World())
        backbone.use_packed_pass("eager")
        assert backbone.packed_pass() is backbone.packed
    found: DecoderBackbone = backbone
    return found


def assert_gradients_are(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in found.items():
        torch.testing.assert_close(
            gradient / largest, expected[key] / largest, **CLOSE, msg=lambda text, k=key: f"{name}, {k}: {text}"
        )


def answers(method: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor, Any]:
    """Return log-likelihoods, gradients of what is inserted, a ranking, and what is written."""
    method.zero_grad(set_to_none=True)
    passed = method(batch)
    method.loss(passed, batch).backward()
    gradients = {key: tensor.grad.clone() for key, tensor in method.named_parameters()}
    return passed.log_likelihood.detach(), gradients, method.rank(batch, CANDIDATES, "map"), method.generate(batch, 6)


@pytest.mark.parametrize(("name", "options", "tasks"), VARIANTS, ids=str)
def test_the_packed_pass_reads_what_is_inserted(folder: Path, name: str, options: dict[str, Any], tasks: tuple[str, ...]) -> None:
    methods = {form: inserted.begun(folder, name, tasks, **options) for form in ("stock", "packed", "recomputed")}
    for form, method in methods.items():
        shake(method, std=0.1)
        prepared(method.backbone, form)
    for seed in SEEDS:
        batch, _ = tiny_decoder.random_batch(seed)
        batch.task_index.remainder_(len(tasks))
        scores, gradients, ranked, written = answers(methods["stock"], batch)
        for form in ("packed", "recomputed"):
            found = answers(methods[form], batch)
            torch.testing.assert_close(found[0], scores, **CLOSE)
            assert_gradients_are(found[1], gradients, form)
            torch.testing.assert_close(found[2], ranked, rtol=1e-5, atol=2e-5)
            assert found[3] == written


@pytest.mark.parametrize("seed", SEEDS)
def test_a_recomputed_pass_gives_prompts_the_gradients_of_a_kept_one(folder: Path, seed: int) -> None:
    batch, prompts = tiny_decoder.random_batch(seed)
    found = {}
    for form in ("stock", "packed", "recomputed"):
        backbone, theta = prepared(loading.load(str(folder)), form), prompts.clone().requires_grad_()
        passed = backbone.log_likelihood(batch, partial(prepend, theta), "token_sum")
        passed.log_likelihood.sum().backward()
        assert theta.grad is not None
        found[form] = (passed.log_likelihood.detach(), {"prompt": theta.grad})
    assert torch.equal(found["recomputed"][0], found["packed"][0])
    assert torch.equal(found["recomputed"][1]["prompt"], found["packed"][1]["prompt"])
    torch.testing.assert_close(found["packed"][0], found["stock"][0], **CLOSE)
    if found["stock"][1]["prompt"].any():  # behind several short windows a prompt is out of sight
        assert_gradients_are(found["packed"][1], found["stock"][1], "packed")


Make = Callable[[Tensor], Callable[[Site], Change]]


def of_each_token(weight: Tensor) -> Callable[[Site], Change]:
    return lambda _place: each_token(lambda x, y: y * (1 + 0.3 * weight[0]) + 0.1 * weight[1] * x.mean(-1, keepdim=True))


def of_each_text(weight: Tensor) -> Callable[[Site], Change]:
    """Every text has a factor of its own, known by its row: prompts have other states before each of them."""
    return lambda _place: lambda x, y: y * of_rows(1 + weight, len(y))[:, None, None] + 0.1 * x.mean(-1, keepdim=True)


@pytest.mark.parametrize("make", [of_each_token, of_each_text], ids=["token", "text"])
@pytest.mark.parametrize("place", ["linear", "norm", "sublayer", "residual", "lm_head"])
def test_prompts_and_what_is_inserted_act_together(gemma: Path, make: Make, place: str) -> None:
    batch, prompts = tiny_decoder.random_batch(4)
    start = torch.linspace(-0.4, 0.4, len(batch) if make is of_each_text else 2)
    found = {}
    for form in ("stock", "packed", "recomputed"):
        backbone = loading.load(str(gemma))
        weight, theta = start.clone().requires_grad_(), prompts.clone().requires_grad_()
        {
            "linear": lambda b, change: b.wrap_linear(change, ("q", "v", "wo")),
            "norm": lambda b, change: b.wrap_norm(change),
            "sublayer": lambda b, change: b.wrap_sublayer(change, ("self_attention", "feed_forward")),
            "residual": lambda b, change: b.wrap_sublayer(change, ("feed_forward",), residual=True),
            "lm_head": lambda b, change: b.wrap_linear(change, ("lm_head",)),
        }[place](backbone, make(weight))
        ours = prepared(backbone, form)
        assert ours.reads_prompts_once is (form != "stock" and make is of_each_token)
        passed = ours.log_likelihood(batch, partial(prepend, theta), "token_sum")
        passed.log_likelihood.sum().backward()
        assert theta.grad is not None
        assert weight.grad is not None
        ranked = ours.rank(batch, CANDIDATES, partial(prepend, prompts))
        written = ours.generate(batch, partial(prepend, prompts), 5)
        found[form] = (passed.log_likelihood.detach(), {"prompt": theta.grad, "weight": weight.grad}, ranked, written)
        assert backbone.rows is None
    expected = found.pop("stock")
    for form, answer in found.items():
        torch.testing.assert_close(answer[0], expected[0], **CLOSE)
        assert_gradients_are(answer[1], expected[1], form)
        torch.testing.assert_close(answer[2], expected[2], rtol=1e-5, atol=2e-5)
        assert answer[3] == expected[3]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_prompt_is_read_once_where_each_token_is_changed_alike(gemma: Path, recomputed: bool) -> None:
    batch, prompts = tiny_decoder.random_batch(4)
    counts: list[int] = []

    def count(_place: Site) -> Change:
        def change(x: Tensor, y: Tensor) -> Tensor:
            counts.append(x.shape[0] * x.shape[1])
            return y

        return each_token(change)

    backbone = loading.load(str(gemma))
    backbone.wrap_linear(count, ("q",))
    theta = prompts.clone().requires_grad_()
    passed = prepared(backbone, "recomputed" if recomputed else "packed").log_likelihood(
        batch, partial(prepend, theta), "token_sum"
    )
    passed.log_likelihood.sum().backward()
    own = int(batch.source_mask.sum() + (batch.target_ids >= 0).sum()) - len(batch)
    num_layers = backbone.num_blocks["model"]
    assert counts == [len(prompts) * (prompts.shape[1] + own)] * num_layers * (1 + recomputed)


@torch.no_grad()
def test_texts_with_prompts_of_their_own_read_what_is_inserted(gemma: Path) -> None:
    """Prompts and limits differ from text to text; what belongs to a text alone is left to one pass for each kind of text."""
    batch, _ = tiny_decoder.random_batch(4)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randn(2, 2 + row % 2, tiny_decoder.WIDTH, generator=draw) for row in range(len(batch))]
    candidates, limits = [CANDIDATES[: 2 + row % 2] for row in range(len(batch))], [3 + row % 3 for row in range(len(batch))]
    found = {}
    for form in ("stock", "packed"):
        backbone: Backbone = loading.load(str(gemma))
        for points in (partial(backbone.wrap_linear, which=None), backbone.wrap_norm):
            points(of_each_token(torch.tensor([0.5, -0.5])))
        ours: Any = prepared(backbone, form)
        found[form] = (ours.rank_each(batch, prompts, candidates), ours.generate_each(batch, prompts, limits))
    for ours, theirs in zip(found["packed"][0], found["stock"][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert found["packed"][1] == found["stock"][1]


def test_a_model_left_by_what_was_inserted_is_the_stock_one_bit_for_bit(gemma: Path) -> None:
    batch, prompts = tiny_decoder.random_batch(4)
    backbone = prepared(loading.load(str(gemma)), "packed")

    def score() -> Tensor:
        return backbone.log_likelihood(batch, partial(prepend, prompts), "token_sum").log_likelihood

    before = score()
    backbone.wrap_norm(of_each_token(torch.tensor([0.5, -0.5])))
    assert not torch.equal(score(), before)
    backbone.detach()
    assert torch.equal(score(), before)
    assert not any(module._forward_hooks for module in backbone.model.modules())
