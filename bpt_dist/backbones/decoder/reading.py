"""What is ours in transformers' modules: blocks that know the pass they are called in, linear layers that keep no gathered weight.

A block may be called a second time, by a backward pass that recomputes it, when the pass itself is over. So each block is told by
an argument what it needs, and sets it up for as long as its `forward` takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.decoder.attention import Reader, our_attention
from bpt_dist.backbones.insertion import InsertionPoints, Rows
from bpt_dist.backbones.mixin import mix_in


@contextmanager
def inserted_at(insertions: InsertionPoints | None, rows: Rows) -> Iterator[None]:
    """Let what is inserted know the places of the tokens that modules are called with."""
    if insertions is None:
        yield
        return
    usual, insertions.rows = insertions.rows, rows
    try:
        yield
    finally:
        insertions.rows = usual


class Reading:
    """Tokens that a pass reads: who computes their attention, and their places for what is inserted."""

    def __init__(self, config: Any, reader: Reader, insertions: InsertionPoints | None, rows: Rows) -> None:
        self.config, self.reader, self.insertions, self.rows = config, reader, insertions, rows

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Let modules that are called compute what they do in this pass."""
        with our_attention(self.config), inserted_at(self.insertions, self.rows):
            yield


class Reads(nn.Module):
    """A block that reads packed tokens where a `reading` is given, and is the stock one otherwise."""

    def forward(self, *args: Any, reading: Reading | None = None, **kwargs: Any) -> Any:
        """Return what the block computes."""
        stock: Any = super().forward
        if reading is None:
            return stock(*args, **kwargs)
        with reading.under_way():
            return stock(*args, reader=reading.reader, **kwargs)


class Released(nn.Linear):
    """A linear layer whose frozen weight, gathered by ZeRO, is asked for again by the backward pass instead of kept for it.

    What a graph keeps is not freed when ZeRO releases it, and the model would be whole on every rank between the two passes.
    """

    def forward(self, input: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Return W x, plus the bias where there is one."""
        if self.weight.requires_grad or not hasattr(self.weight, "ds_tensor"):
            return super().forward(input)
        product: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.layer.weight, None


def let_read(model: Any) -> None:
    """Make the blocks of a model `Reads`, and its linear layers `Released`."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Released
    mix_in(Reads, *model.model.layers)
