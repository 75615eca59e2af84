"""How attention is computed in the packed pass: two ways with the same result, and which is usually faster.

The choice is a rule and no measurement: both ways differ in the last bits, and what a busy machine measures differs from start to
start and from host to host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_attention(
    q: Float[Tensor, "r H S d"], k: Float[Tensor, "r H K d"], v: Float[Tensor, "r H K d"], bias: Float[Tensor, "#r #H S K"]
) -> Float[Tensor, "r H S d"]:
    """Return softmax(q k^T + bias) v by matrix products; who wants scores divided by sqrt(d) divides the queries."""
    scores = q @ k.mT
    scores += bias
    return scores.softmax(-1) @ v


def sdpa_attention(
    q: Float[Tensor, "r H S d"], k: Float[Tensor, "r H K d"], v: Float[Tensor, "r H K d"], bias: Float[Tensor, "#r #H S K"]
) -> Float[Tensor, "r H S d"]:
    """Return the same by torch's fused kernel."""
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


ATTENTIONS: dict[str, Attention] = {"sdpa": sdpa_attention, "eager": plain_attention}


def default_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return what is usually faster: torch's kernel, but for bf16 on a CPU, where its products are plain loops."""
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
