"""Both ways of attention compute the same; the choice is measured once a machine and left for a clear gain only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bpt_dist.backbones import attention as packed_attention
from bpt_dist.backbones.attention import ATTENTIONS, CLEARLY, default_attention, measured_attention

CPU = torch.device("cpu")


def test_both_ways_and_their_gradients_equal_the_definition_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=draw) for _ in range(3))
    bias = torch.randn(1, 3, 7, 7, generator=draw)
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    answer = torch.einsum("rhqd,rhkd->rhqk", exact[0], exact[1]).add(bias.double()).softmax(-1) @ exact[2]
    answer.square().sum().backward()
    for attention in ATTENTIONS.values():
        own = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        found = attention(*own, bias)
        found.square().sum().backward()
        torch.testing.assert_close(found.double(), answer, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(own, exact, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain", [1.0, CLEARLY - 0.05, CLEARLY + 0.05])
def test_the_usual_way_is_left_for_a_clear_gain_and_the_choice_kept(
    tmp_path: Path, dtype: torch.dtype, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = default_attention(CPU, dtype)
    other = next(kind for kind in ATTENTIONS if kind != usual)
    monkeypatch.setattr(packed_attention, "_seconds", lambda *_: {usual: gain, other: 1.0})
    assert measured_attention(CPU, dtype, tmp_path / "cache") == (other if gain > CLEARLY else usual)
    monkeypatch.setattr(packed_attention, "_seconds", lambda *_: pytest.fail("measured a second time"))
    assert measured_attention(CPU, dtype, tmp_path / "cache") == (other if gain > CLEARLY else usual)


def test_damaged_and_unwritable_caches_are_measured_again(tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text("{")
    assert measured_attention(CPU, torch.float32, tmp_path) in ATTENTIONS
    assert set(json.loads((tmp_path / "attention.json").read_text()).values()) <= set(ATTENTIONS)
    (tmp_path / "file").write_text("")
    assert measured_attention(CPU, torch.float32, tmp_path / "file" / "cache") in ATTENTIONS
