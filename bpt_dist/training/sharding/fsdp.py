"""PyTorch's FSDP2, block by block: the cross-check of ZeRO, and the fallback without DeepSpeed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bpt_dist.backbones.base import Backbone
from bpt_dist.config import DistributionConfig, StageConfig
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.methods.base import Method
from bpt_dist.training.optimizer import StageOptimizer, entries_of
from bpt_dist.training.sharding.fsdp_gather import gather_modules_in_place
from bpt_dist.training.sharding.rows import send_rows, tables


def partition_with_fsdp2(backbone: Backbone, distribution: DistributionConfig, world: World, group: Any, *, trained: bool) -> None:
    """Partition the backbone over `group` (None: all ranks); collective over the group.

    Of a backbone that will not be `trained` the head is gathered by itself, and of the word embeddings the rows that are looked up.
    """
    # A T5 block returns the position biases as a view, which nothing changes in place.
    warnings.filterwarnings("ignore", category=UserWarning, message="FSDP2-wrapped module .* returned a view tensor")
    kind = world.device.type
    ranks = init_device_mesh(kind, (world.size,)) if group is None else DeviceMesh.from_group(group, kind)
    pinned = CPUOffloadPolicy(pin_memory=kind == "cuda")
    policy = pinned if distribution.offload == "cpu" else OffloadPolicy()
    # Gradients of a trained backbone are summed over the ranks in float32, whatever it computes in.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    blocks: list[Any] = backbone.blocks
    for block in blocks:
        # The last block and the head stay gathered for the backward pass, where they come first.
        is_kept = not trained and block is blocks[-1]
        fully_shard(block, mesh=ranks, reshard_after_forward=not is_kept, offload_policy=policy, mp_policy=precision)
    others = set()
    if not trained:
        head, looked_up = backbone.model.get_output_embeddings(), tables(backbone)
        is_tied = head.weight is looked_up[0].weight
        fully_shard(head, mesh=ranks, reshard_after_forward=False, offload_policy=policy, mp_policy=precision)
        for kept in (blocks[-1], head):
            kept.register_forward_hook(_release)
        # FSDP2 would gather a table of its own with the rest.
        table = head.weight if is_tied else _cut_rows(looked_up[0].weight, ranks)
        for each in looked_up:
            each.weight = table
        send_rows(looked_up, ranks.get_group())
        others.add(table)
        _prefetch(backbone, head)
    # By default the root stays gathered between forward and backward.
    fully_shard(
        backbone.core, mesh=ranks, reshard_after_forward=True, offload_policy=policy, mp_policy=precision, ignored_params=others
    )
    sharded = [module for module in backbone.core.modules() if isinstance(module, FSDPModule)]
    gather_modules_in_place(sharded, ranks.get_group(), world.hosts, trained=trained)
    for module in sharded:
        # The loss is a sum over texts, wherever they are, and gloo knows no mean.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    backbone.partition = FsdpPartition()


def _prefetch(backbone: Backbone, head: Any) -> None:
    """Let the next block be gathered while one computes; FSDP2 does so by itself in the backward pass, where the order is known.

    Not from one stack to the next: a pass may end with the encoder, and what is gathered then would stay.
    """
    blocks: list[Any] = backbone.blocks
    ends = set(itertools.accumulate(backbone.num_blocks.values()))
    for number, pair in enumerate(itertools.pairwise(blocks), 1):
        if number not in ends:
            pair[0].set_modules_to_forward_prefetch([pair[1]])
    blocks[-1].set_modules_to_forward_prefetch([head])


def _release(module: Any, _args: Any, output: Any) -> None:
    """Leave nothing gathered for a backward pass that will not follow."""
    found = output[0] if isinstance(output, tuple) else output
    if not found.requires_grad:
        module.reshard()


def _cut_rows(weight: Tensor, ranks: DeviceMesh) -> nn.Parameter:
    """Return a weight sharded as FSDP2 does it; every rank has the same one, so nothing is sent."""
    part = distribute_tensor(weight.detach().to(ranks.device_type), ranks, [Shard(0)], src_data_rank=None)
    local = part.to_local().clone()  # not a view of the whole
    return nn.Parameter(
        DTensor.from_local(local, ranks, [Shard(0)], shape=weight.shape, stride=weight.stride()), requires_grad=False
    )


@dataclass
class FsdpPartition:
    """A backbone whose weights are DTensors, each rank holding a slice of rows."""

    def make_optimizer(self, method: Method, stage: StageConfig) -> StageOptimizer:
        """Return the optimizer of a method that trains the backbone."""
        return FsdpOptimizer(method, stage)

    def close(self) -> None:
        """Do nothing: FSDP2 keeps nothing outside the modules."""


class FsdpOptimizer(StageOptimizer):
    """The plain optimizer on this rank's rows of the weights; FSDP2 sums and scatters the gradients in the backward pass."""

    @property
    def replicated(self) -> list[nn.Parameter]:
        """No gradient is left to be summed."""
        return []

    def gradients(self) -> list[Tensor]:
        """Return this rank's rows of the step's gradients."""
        return [_rows(gradient) for gradient in super().gradients()]

    def _largest_norm(self) -> Tensor:
        """Return the norm over all weights (collective: every rank)."""
        square = torch.stack([gradient.double().square().sum() for gradient in self.gradients()]).sum()
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def _clip(self, limit: float) -> None:
        """Scale the gradients of all weights to norm <= limit (collective: every rank)."""
        factor = float((limit / (self._largest_norm() + 1e-6)).clamp(max=1.0))
        for gradient in self.gradients():
            gradient.mul_(factor)

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of a snapshot on rank 0 (collective: every rank)."""
        whole = {name: _gather(tensor) for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in whole.items() if tensor is not None}

    def take_shard(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's rows of whole tensors."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        return {name: _cut(tensor, parameters[name]) for name, tensor in tensors.items()}

    def state_dict(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return weights and optimizer state, whole, on rank 0 (collective: every rank)."""
        return self.gather_full(super().state_dict(mesh))

    def load(self, state: dict[str, Tensor], mesh: Mesh) -> None:
        """Take over what `state_dict` returned, also on another number of ranks."""
        parts = {}
        for parameter, name in self.names.items():
            for key, value in entries_of(name, state).items():
                parts[f"{name}/{key}"] = _cut(value, parameter) if value.dim() else value
        super().load(parts, mesh)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(tensor: Tensor) -> Tensor | None:
    """Return the whole tensor on rank 0's CPU, None elsewhere (collective: every rank)."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return None if torch.distributed.get_rank() else whole.cpu()


def _cut(whole: Tensor, like: Any) -> Tensor:
    """Return a whole tensor partitioned as `like` is; every rank has read the same one, so nothing is sent."""
    return distribute_tensor(whole.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)
