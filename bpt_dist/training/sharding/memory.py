"""Measure what a rank holds of the backbone: the promise of partitioning in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bpt_dist.backbones.base import Backbone, local_shard
from bpt_dist.backbones.prompts import prepend
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement

MARGIN = 0.02  # of a rank's share: padding, and the tensors that are too small to be worth a message
STEPS = 3  # ZeRO learns the order of the layers first and keeps things only then
PROMPT, TEXT, TARGET = 8, 24, 4  # lengths of the step that is measured


@dataclass(frozen=True)
class Share:
    """The share of one of `ranks` ranks in a backbone of `whole` bytes; `gathered` bytes are whole there and unused."""

    shard: str
    scope: str
    ranks: int
    sharers: int  # ranks that hold one backbone between them
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


def measure(backbone: Backbone, distribution: DistributionConfig, world: World) -> Share:
    """Place the backbone, give a prompt its gradient a few times, and return what this rank holds then (collective: every rank).

    Bytes are those of storages, each counted once, so padding and tensors kept whole count in full.
    """
    whole = sum(weight.numel() * weight.element_size() for weight in backbone.model.parameters())
    placement.place(backbone, distribution, world)
    at_rest = sum(held(backbone).values())
    for _ in range(STEPS):
        _step(backbone)
    waiting = gathered(backbone)
    resident = max(at_rest, sum(held(backbone).values()))
    by_scope = {"world": world.size, "node": world.hosts.count(world.hosts[world.rank])}
    sharers = 1 if distribution.shard == "none" else by_scope[distribution.scope]
    return Share(distribution.shard, distribution.scope, world.size, sharers, whole, resident, waiting)


def held(backbone: Backbone) -> dict[int, int]:
    """Return the bytes of every storage that holds weights on this rank: partitions, and what is gathered besides."""
    storages = {}
    for weight in backbone.model.parameters():
        plain: list[Any] = [] if hasattr(weight, "to_local") else [weight.detach()]
        for tensor in (local_shard(weight), *plain):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return storages


def gathered(backbone: Backbone) -> int:
    """Return the bytes of weights that are whole on this rank besides its partition, without those ZeRO keeps whole on purpose."""
    whole = 0
    for weight in backbone.model.parameters():
        is_sharded = hasattr(weight, "ds_tensor") or hasattr(weight, "to_local")
        by_choice = getattr(weight, "ds_persist", False)
        if backbone.partition is not None and not by_choice and (hasattr(weight, "ds_tensor") or not is_sharded):
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
