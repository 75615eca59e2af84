"""Measure what a rank holds of the T5: the promise of a partitioned T5 in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bpt_dist import engine
from bpt_dist.backbone import Backbone, own_part
from bpt_dist.config import Distribution
from bpt_dist.mesh import World
from bpt_dist.prompts import prepend

MARGIN = 0.02  # of a rank's share: padding, and the tensors that are too small to be worth a message
STEPS = 3  # ZeRO learns the order of the layers first and keeps things only then
PROMPT, TEXT, TARGET = 8, 24, 4  # lengths of the step that is measured


@dataclass(frozen=True)
class Share:
    """What one of `ranks` ranks holds of a T5 of `whole` bytes; `gathered` bytes lie there whole although nobody uses them."""

    shard: str
    scope: str
    ranks: int
    sharers: int  # ranks that hold one T5 between them
    whole: int
    resident: int
    gathered: int

    @property
    def allowed(self) -> float:
        """Return the most a rank may hold."""
        return self.whole / self.sharers * (1 + MARGIN)

    @property
    def kept(self) -> bool:
        """Return whether the promise is kept: a share of the weights, and nothing left gathered."""
        return self.resident <= self.allowed and self.gathered == 0


def measure(backbone: Backbone, distribution: Distribution, world: World) -> Share:
    """Place the T5, give a prompt its gradient a few times, and return what this rank holds then (collective: every rank).

    Bytes are those of storages, each counted once, so padding and tensors kept whole count in full.
    """
    whole = sum(weight.numel() * weight.element_size() for weight in backbone.model.parameters())
    engine.place(backbone, distribution, world)
    before = sum(held(backbone).values())
    for _ in range(STEPS):
        _step(backbone)
    waiting = gathered(backbone)
    resident = max(before, sum(held(backbone).values()))
    by_scope = {"world": world.size, "node": world.hosts.count(world.hosts[world.rank])}
    sharers = 1 if distribution.shard == "none" else by_scope[distribution.scope]
    return Share(distribution.shard, distribution.scope, world.size, sharers, whole, resident, waiting)


def held(backbone: Backbone) -> dict[int, int]:
    """Return the bytes of every storage that holds weights on this rank: partitions, and what is gathered besides."""
    storages = {}
    for weight in backbone.model.parameters():
        plain: list[Any] = [] if hasattr(weight, "to_local") else [weight.detach()]
        for tensor in (own_part(weight), *plain):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return storages


def gathered(backbone: Backbone) -> int:
    """Return the bytes of weights that lie whole on this rank besides its partition; those ZeRO keeps whole on purpose are none."""
    whole = 0
    for weight in backbone.model.parameters():
        in_parts = hasattr(weight, "ds_tensor") or hasattr(weight, "to_local")
        by_choice = getattr(weight, "ds_persist", False)
        if backbone.partition is not None and not by_choice and (hasattr(weight, "ds_tensor") or not in_parts):
            whole += weight.numel() * weight.element_size()
    return whole


def _step(backbone: Backbone) -> None:
    """Run one forward and backward pass to a soft prompt."""
    ids = torch.arange(3, 3 + TEXT)[None]
    texts = SimpleNamespace(source_ids=ids, source_mask=torch.ones_like(ids), target_ids=ids[:, :TARGET])
    prompt = torch.zeros(1, PROMPT, backbone.width, device=backbone.device, requires_grad=True)

    def inputs(embeds: Tensor) -> Tensor:
        return prepend(prompt, embeds)

    backbone.log_likelihood(texts, inputs, "token_mean").log_likelihood.sum().backward()
