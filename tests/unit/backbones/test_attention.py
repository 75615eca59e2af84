"""Both ways of attention compute the same; the choice is a rule."""

from __future__ import annotations

import inspect

import pytest
import torch

from bpt_dist.backbones import attention as packed_attention
from bpt_dist.backbones.attention import ATTENTIONS, default_attention


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


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "sdpa"),
        ("cpu", torch.bfloat16, "eager"),
        ("cuda", torch.float32, "sdpa"),
        ("cuda", torch.bfloat16, "sdpa"),
    ],
)
def test_the_choice_is_a_rule(device: str, dtype: torch.dtype, expected: str) -> None:
    assert default_attention(torch.device(device), dtype) == expected


def test_the_choice_needs_no_clock_and_no_file() -> None:
    """What a busy machine measures differs from start to start, and with it would the last bits of a run."""
    modules = {word.split(".")[0] for line in inspect.getsource(packed_attention).splitlines() for word in line.split()[1:2]
               if line.startswith(("import ", "from "))}  # fmt: skip
    assert modules <= {"__future__", "collections", "torch", "jaxtyping"}
