"""Insertion points against a T5 with other weights and against the plain T5; removal leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_t5
import torch
from plain_t5 import PlainT5, batch, rows
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.insertion import Change, Site, of_rows, rms_normalised
from bpt_dist.backbones.prompts import prepend
from bpt_dist.errors import ConfigError

SUBLAYERS = ("self_attention", "cross_attention", "feed_forward")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return loading.load(str(folder))


@torch.no_grad()
def logits(backbone: Backbone) -> Tensor:
    return backbone.log_likelihood(batch(), lambda embeds: embeds[None], "token_sum").logits[0]


@torch.no_grad()
def log_likelihood(backbone: Backbone) -> Tensor:
    return backbone.log_likelihood(batch(), lambda embeds: embeds[None], "token_sum").log_likelihood[0]


def unchanged(_place: Site) -> Change:
    return lambda _x, y: y


def assert_equal_to(plain: PlainT5, backbone: Backbone) -> None:
    expected = torch.stack([plain.log_likelihood(*row) for row in rows(batch())])
    torch.testing.assert_close(log_likelihood(backbone).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_plain_t5_is_the_t5_of_transformers(folder: Path, backbone: Backbone) -> None:
    assert_equal_to(PlainT5(folder), backbone)


def test_insertions_that_change_nothing_change_no_bit_and_leave_without_trace(backbone: Backbone) -> None:
    before = logits(backbone)
    # 2 + 2 blocks: self-attention in each, cross-attention in the decoder's, feed-forward in each.
    assert backbone.wrap_sublayer(unchanged, SUBLAYERS) == 10
    assert backbone.wrap_sublayer(unchanged, SUBLAYERS, residual=True) == 10
    assert backbone.wrap_sublayer(unchanged, ["feed_forward"], stack="decoder") == 2
    assert backbone.wrap_linear(unchanged, ["q", "v"]) == 12
    assert backbone.wrap_linear(unchanged, None) == 24 + 8 + 1
    assert backbone.wrap_norm(unchanged) == 10 + 2
    backbone.after_encoder(lambda states, mask: None)
    assert torch.equal(logits(backbone), before)
    backbone.wrap_sublayer(lambda place: lambda x, y: 2 * y, ["feed_forward"])
    assert not torch.equal(logits(backbone), before)
    backbone.detach()
    assert torch.equal(logits(backbone), before)
    assert not any(module._forward_hooks for module in backbone.model.modules())


@pytest.mark.parametrize("residual", [False, True])
def test_around_a_sublayer_x_and_y_are_what_they_are_called(folder: Path, backbone: Backbone, residual: bool) -> None:
    class Changed(PlainT5):
        def sublayer(self, place: str, hidden: Tensor, normed: Tensor, output: Tensor) -> Tensor:
            number = int(place.split(".")[2])
            return output + (0.3 + number) * (hidden if residual else normed).tanh()

    def change(place: Site) -> Change:
        return lambda x, y: y + (0.3 + place.block) * x.tanh()

    backbone.wrap_sublayer(change, SUBLAYERS, residual=residual)
    assert_equal_to(Changed(folder), backbone)


@torch.no_grad()
def test_a_low_rank_pair_around_a_linear_layer_is_a_changed_weight(folder: Path, backbone: Backbone) -> None:
    a, b = 0.1 * torch.randn(2, 32), 0.1 * torch.randn(32, 2)
    backbone.wrap_linear(lambda place: lambda x, y: y + x @ a.T @ b.T, ["q", "v"])
    changed = T5ForConditionalGeneration.from_pretrained(folder).eval()
    for name, parameter in changed.named_parameters():
        if name.endswith((".q.weight", ".v.weight")):
            parameter.add_(b @ a)
    for n, (ids, target) in enumerate(rows(batch())):
        expected = changed(input_ids=ids[None], labels=target[None]).logits[0]
        torch.testing.assert_close(logits(backbone)[n, : len(target)], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_trained_gain_around_a_norm_is_a_changed_gain(folder: Path, backbone: Backbone) -> None:
    changed, generator = T5ForConditionalGeneration.from_pretrained(folder).eval(), torch.Generator().manual_seed(0)
    deltas = {
        name.removesuffix(".weight"): torch.randn(32, generator=generator)
        for name, _ in changed.named_parameters()
        if "layer_norm" in name
    }
    backbone.wrap_norm(lambda place: lambda x, y: y + deltas[place.name] * rms_normalised(x, 1e-6))
    for name, delta in deltas.items():
        changed.get_parameter(f"{name}.weight").add_(delta)
    for n, (ids, target) in enumerate(rows(batch())):
        expected = changed(input_ids=ids[None], labels=target[None]).logits[0]
        torch.testing.assert_close(logits(backbone)[n, : len(target)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["log_likelihood", "rank", "generate"])
@torch.no_grad()
def test_the_encoder_is_seen_once_a_pass_with_its_mask(backbone: Backbone, run: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    backbone.after_encoder(lambda states, mask: seen.append((states, mask)))
    particles = torch.randn(2, 3, 32)

    def inputs(embeds: Tensor) -> Tensor:
        return prepend(particles, embeds)

    texts = batch(pad=77)
    {
        "log_likelihood": lambda: backbone.log_likelihood(texts, inputs, "token_sum"),
        "rank": lambda: backbone.rank(texts, torch.tensor([[5, 1], [6, 1]]), inputs),
        "generate": lambda: backbone.generate(texts, inputs, 4),
    }[run]()
    ((states, mask),) = seen
    ones = torch.ones(2 * len(texts), 3, dtype=torch.long)
    assert torch.equal(mask, torch.cat([ones, texts.source_mask.repeat(2, 1)], dim=1))
    model = backbone.model
    embeds = torch.cat([particles[1], model.shared(rows(texts)[2][0])])[None]
    alone = model.encoder(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]))[0][0]
    torch.testing.assert_close(states[len(texts) + 2][: len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_what_belongs_to_a_text_is_found_at_its_rows() -> None:
    values = torch.arange(3.0)[:, None]
    assert of_rows(values, 6).flatten().tolist() == [0, 1, 2, 0, 1, 2]  # two particles
    assert of_rows(values, 3) is values


def test_a_selector_that_matches_nothing_is_refused(backbone: Backbone) -> None:
    for attach, missing in (
        (lambda: backbone.wrap_sublayer(unchanged, ["self_atention"]), "self_atention"),
        (lambda: backbone.wrap_sublayer(unchanged, ["cross_attention"], stack="encoder"), "EncDecAttention"),
        (lambda: backbone.wrap_linear(unchanged, ["q", "query"]), "query"),
    ):
        with pytest.raises(ConfigError, match=rf"of this backbone matches {missing}; its layers are called .*SelfAttention"):
            attach()
    assert not any(module._forward_hooks for module in backbone.model.modules())
