"""Put the T5 where it belongs: whole on every rank, or partitioned over all ranks or those of one host.

DeepSpeed holds the frozen T5 in ZeRO stage 3 without an optimizer. The prompts never belong to the DeepSpeed engine: it would
average their gradients over the ranks, and SVGD needs each particle's own. A method that trains the T5 itself gets ZeRO, or FSDP2,
with the optimizer of its stage: `updater`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bpt_dist.allocator import keep_pages
from bpt_dist.backbone import Backbone
from bpt_dist.config import Distribution, Stage
from bpt_dist.engine_update import OPTIMIZERS, Updater, schedule
from bpt_dist.errors import ConfigError
from bpt_dist.mesh import World
from bpt_dist.methods.base import Method

__all__ = ["OPTIMIZERS", "Partition", "Updater", "host_groups", "place", "schedule", "updater"]


class Partition(Protocol):
    """How the weights of a T5 lie on the ranks."""

    def updater(self, method: Method, stage: Stage) -> Updater:
        """Return the optimizer of a method that trains the partitioned weights."""


def place(backbone: Backbone, distribution: Distribution, world: World, *, trained: bool = False) -> None:
    """Move the T5 to this rank's device, whole (`none`) or partitioned (`deepspeed`, `fsdp2`); `trained`: a method will change it.

    Collective: every rank. Raises ConfigError when there is no process group to partition over.
    """
    if distribution.activation_checkpointing:
        for block in backbone.blocks:
            _recompute_in_backward(block)
    backbone.device = world.device
    if world.device.type == "cpu":
        keep_pages()
    if distribution.shard == "none":
        backbone.core.to(world.device)
        return
    if not torch.distributed.is_initialized():
        raise ConfigError(
            f"distribution.shard: {distribution.shard} needs a process group; start with `deepspeed launcher/train.py` or torchrun"
        )
    backbone.packed = None
    # Not moved to the device first: partitioning goes block by block, so that no GPU ever holds the whole T5.
    own, largest = None, world.size
    if distribution.scope == "node":
        hosts = host_groups(world.hosts)
        largest = max(map(len, hosts))
        # Every rank creates every group, also those of other hosts.
        groups = [torch.distributed.new_group(ranks) for ranks in hosts]
        own = next(group for ranks, group in zip(hosts, groups, strict=True) if world.rank in ranks)
    if distribution.shard == "fsdp2":
        from bpt_dist.engine_fsdp import partition_with_fsdp2

        partition_with_fsdp2(backbone, distribution, world, own)
    else:
        from bpt_dist.engine_zero import partition_with_deepspeed

        partition_with_deepspeed(backbone, distribution, own, trained=trained)
    # Asked of the largest host: generation is kept in step over all ranks, so all must agree on whether it is.
    backbone.synced = largest > 1
    backbone.remember_partition()


def host_groups(names: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each host, given the host name of every rank; hosts in the order of their first rank."""
    return [[rank for rank, name in enumerate(names) if name == host] for host in dict.fromkeys(names)]


def updater(method: Method, stage: Stage) -> Updater:
    """Return the optimizer of one stage over what this rank trains (collective where the T5 itself is trained in parts)."""
    partition: Partition | None = getattr(method.backbone, "partition", None)
    if partition is None or not method.config.TRAINS_BACKBONE:
        return Updater(method, stage)
    return partition.updater(method, stage)


def _recompute_in_backward(block: nn.Module) -> None:
    """Keep only the inputs of a block for the backward pass, which runs it again.

    transformers' own switch acts in train mode only. `forward` is replaced rather than the block wrapped: no module is renamed,
    hooks of the block run outside and those of its layers inside, once more in the second pass. Recomputing needs no dropout
    state, because the T5 stays in eval mode.
    """
    run = block.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward
