"""Place the backbone: whole on every rank, or partitioned over all ranks or those of one host.

DeepSpeed holds the frozen backbone in ZeRO stage 3 without an optimizer. The prompts never belong to the DeepSpeed engine: it would
average their gradients over the ranks, and SVGD needs each particle's own. A method that trains the backbone itself gets ZeRO, or
FSDP2, with the optimizer of its stage: `make_optimizer`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bpt_dist.backbones import loading
from bpt_dist.backbones.attention import default_attention
from bpt_dist.backbones.base import Backbone
from bpt_dist.config import DistributionConfig, RunConfig, StageConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import Method
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.tasks import mini
from bpt_dist.training.optimizer import StageOptimizer

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h
TOP_PAD = 100_000_000  # bytes asked of the kernel beyond what is needed


class Partition(Protocol):
    """How the weights of a backbone are spread over the ranks."""

    def make_optimizer(self, method: Method, stage: StageConfig) -> StageOptimizer:
        """Return the optimizer of a method that trains the partitioned weights."""

    def close(self) -> None:
        """Let go of what refers to the weights from outside the backbone."""


def place(backbone: Backbone, distribution: DistributionConfig, world: World, *, trained: bool = False) -> None:
    """Move the backbone to this rank's device, whole (`none`) or partitioned (`deepspeed`, `fsdp2`).

    `trained`: a method will change it. Collective: every rank. Raises ConfigError when there is no process group to partition over.
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
    backbone.use_stock_pass()
    for buffer in backbone.core.buffers():  # small, never partitioned
        buffer.data = buffer.data.to(world.device)
    # Not moved to the device first: partitioning goes block by block, so that no GPU ever holds the whole backbone.
    group, largest = None, world.size
    if distribution.scope == "node":
        group, largest = world.host_group()
    if distribution.shard == "fsdp2":
        from bpt_dist.training.sharding.fsdp import partition_with_fsdp2

        partition_with_fsdp2(backbone, distribution, world, group, trained=trained)
    else:
        from bpt_dist.training.sharding.zero import partition_with_deepspeed

        partition_with_deepspeed(backbone, distribution, world, group, trained=trained)
    if world.device.type == "cpu":
        _return_pages()
    # Asked of the largest host: generation is kept in step over all ranks, so all must agree on whether it is.
    backbone.synced = largest > 1
    backbone.any_rank = functools.partial(_any_rank, backbone.device) if backbone.synced else bool
    backbone.remember_partition()


def _any_rank(device: torch.device, holds: bool) -> bool:
    """Return whether something holds on any rank (collective: every rank)."""
    flag = torch.tensor([float(holds)], device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def release(backbone: Backbone) -> None:
    """Let go of what placing a backbone has left outside it, so that its weights are freed with it."""
    if backbone.partition is not None:
        backbone.partition.close()
        backbone.partition = None


def make_optimizer(method: Method, stage: StageConfig) -> StageOptimizer:
    """Return the optimizer of one stage over what this rank trains (collective where the backbone itself is trained sharded)."""
    partition: Partition | None = getattr(method.backbone, "partition", None)
    if partition is None or not method.config.TRAINS_BACKBONE:
        return StageOptimizer(method, stage)
    return partition.make_optimizer(method, stage)


def _recompute_in_backward(block: nn.Module) -> None:
    """Keep only the inputs of a block for the backward pass, which runs it again.

    transformers' own switch acts in train mode only. `forward` is replaced rather than the block wrapped: no module is renamed,
    hooks of the block run outside and those of its layers inside, once more in the second pass. Recomputing needs no dropout
    state, because the backbone stays in eval mode.
    """
    run = block.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward


def keep_pages() -> bool:
    """Let this process keep freed memory and take large blocks from it; return whether the C library understood.

    Activations of a pass are as large as those of the pass before, so what is kept is used. Other C libraries are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD)))


def _return_pages() -> None:
    """Give free memory back to the system once: what held the parts that have moved, and the loaded weights of the other ranks."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def load_backbone(config: RunConfig, world: World, attention: str | None = None) -> Backbone:
    """Load the backbone of the configuration and place it (collective: every rank).

    `attention` is what an earlier start of the run used (rank 0 knows): `backbone.attention: auto` takes it again, because another
    kind computes other bits.
    """
    path = mini.backbone_path(config.backbone.path)
    settings = config.backbone
    # Weights that stay on the CPU get memory of their own: passes read it faster, and nobody else can change it. What is moved to a
    # GPU or cut into shards is taken from the mapped file, so that a host never holds a copy for each of its ranks.
    moved = world.device.type != "cpu" or config.distribution.shard != "none"
    backbone = loading.load(
        path, name=settings.path, revision=settings.revision, dtype=settings.dtype, attention=settings.attention, mapped=moved,
        identify=lambda weights: world.once_a_host(weights.file_facts(), lambda: weights.identity),
    )  # fmt: skip
    fault_point("backbone.loaded")
    place(backbone, config.distribution, world, trained=config.method.TRAINS_BACKBONE)
    if _may_pack(config, world, backbone):
        # One rank chooses for all: ranks that compute differently would differ in the last bits.
        backbone.use_packed_pass(world.broadcast(_attention(backbone, config, world, attention)))
    return backbone


def padding_reason(config: RunConfig, backbone: Backbone) -> str | None:
    """Return why our own pass cannot replace transformers', which pad; None where it can."""
    given = config.distribution
    if given.activation_checkpointing and not backbone.packs_recomputed:
        return "distribution.activation_checkpointing is on"
    if given.shard != "none" and (config.method.TRAINS_BACKBONE or not backbone.packs_partitioned):
        return f"distribution.shard is {given.shard}" + (" and the backbone is trained" if config.method.TRAINS_BACKBONE else "")
    return None


def _may_pack(config: RunConfig, world: World, backbone: Backbone) -> bool:
    """Return whether our own pass replaces transformers', and log on rank 0 why not."""
    reason = padding_reason(config, backbone)
    if config.backbone.forward == "stock" or reason is None:
        return config.backbone.forward != "stock"
    if world.rank == 0:
        log.info("texts are read by transformers' modules, padded: %s", reason)
    return False


def _attention(backbone: Backbone, config: RunConfig, world: World, recorded: str | None) -> str | None:
    """Return how the packed pass computes attention: as set, as recorded by an earlier start, or by rule (rank 0)."""
    given = config.backbone.attention
    if world.rank:
        return None
    if given != "auto":
        if recorded not in (None, given):
            log.info("backbone.attention: %s -> %s; the last bits of the results change", recorded, given)
        return given
    if recorded is not None:
        return recorded
    return default_attention(world.device, backbone.dtype)
