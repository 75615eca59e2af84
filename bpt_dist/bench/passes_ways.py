"""The passes that stand before and after an optimisation, each a whole gradient of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bpt_dist.backbone import Backbone
from bpt_dist.bench import gradients
from bpt_dist.bench.gradients import Gradients
from bpt_dist.bench.source import Models
from bpt_dist.bench.work import Work


def with_attention(models: Models, dtype: str, kind: str, run: Callable[[], Gradients]) -> Gradients:
    """Run with the stock modules set to a kind of attention."""
    models.stock(dtype, kind)
    return run()


def stock_loop(models: Models, work: Work) -> Gradients:
    """The padded loop over particles, through the stock T5."""
    return gradients.padded_by_particle(models.stock("fp32", "sdpa"), work)


def grouped(models: Models, work: Work, dtype: str, kind: str) -> Gradients:
    """Rows of one length together, through the stock T5."""
    return gradients.grouped(models.stock(dtype, kind), work)


def padded(models: Models, work: Work) -> Gradients:
    """All rows in one padded batch, through the stock T5."""
    return gradients.padded(models.stock("fp32", "sdpa"), work)


def packed(models: Models, work: Work, dtype: str) -> Gradients:
    """Our pass."""
    return gradients.packed(models.backbone(dtype), models.packed(dtype), work)


def dropout(models: Models, work: Work) -> Gradients:
    """PEFT's loop in train mode."""
    models.stock("fp32", "sdpa")
    return models.peft("fp32").gradients(work, dropout=True)


def trainable(models: Models, work: Work) -> Gradients:
    """The padded loop with a gradient for every weight, as it comes when nobody freezes the T5."""
    model: nn.Module = models.stock("fp32", "sdpa").model
    model.requires_grad_(True)
    try:
        return stock_loop(models, work)
    finally:
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None


def checkpointed(models: Models, work: Work) -> Gradients:
    """Rows of one length together, every block run again in the backward pass."""
    with recomputing(models.stock("fp32", "sdpa")):
        return grouped(models, work, "fp32", "sdpa")


@contextmanager
def recomputing(backbone: Backbone) -> Iterator[None]:
    """Let every block of the stock T5 keep its input only, as `distribution.activation_checkpointing` does."""
    usual: dict[nn.Module, Callable[..., object]] = {}
    for block in backbone.blocks:
        usual[block] = block.forward
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in usual.items():
            block.forward = forward
