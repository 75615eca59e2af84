"""FSDP2's weights of a module, made whole in place (`gather.py` says why)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Private to torch, whose version is pinned: FSDP2 lets others send the messages, but not choose where they arrive.
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from bpt_dist.training.sharding.gather import Parts, Place, is_gloo


class _Numbered(NamedTuple):
    """A weight of a group, its number among those of all groups, and its place."""

    number: int
    parameter: Any
    whole: Float[Tensor, " numbers"]


class InPlaceGroup(FSDPParamGroup):
    """The weights of a module lie one behind the other, so q, k and v are one matrix, and arrive there.

    FSDP2 itself gathers into a buffer and copies each weight out of it into memory of its own.
    """

    parts: Parts
    memory: list[Float[Tensor, " numbers"]]
    places: list[_Numbered]

    def unshard(self, async_op: bool = False) -> None:
        """Start to gather the weights, unless they are whole or on their way (collective: every rank of the group).

        Also without `async_op` nothing is waited for: FSDP2 waits when it reads them, so the next block travels meanwhile.
        """
        if self._all_gather_result is not None or self.is_unsharded:
            return
        for memory in self.memory:
            memory.untyped_storage().resize_(memory.nbytes)
        places = [
            Place.within(whole, number, parameter.all_gather_inputs[0], self.parts.size) for number, parameter, whole in self.places
        ]
        self._all_gather_result = AllGatherResult(self.memory[0], None, self.parts.gather(places), [], [], [])

    def wait_for_unshard(self) -> None:
        """Return once the weights are whole."""
        under_way = self._all_gather_result
        if under_way is not None:
            assert under_way.all_gather_work is not None
            under_way.all_gather_work.wait()
            self._to_unsharded()
            self._all_gather_result = None

    def finalize_backward(self) -> None:
        """Free also what was gathered for a backward pass that did not need it: no tensor before it asked for a gradient."""
        super().finalize_backward()
        self._free_unused()

    def _reset_iter_state(self) -> None:
        super()._reset_iter_state()
        self._free_unused()

    def _free_unused(self) -> None:
        if self.is_sharded:
            for memory in self.memory:
                memory.untyped_storage().resize_(0)

    def lay_out(self, parts: Parts, first: int) -> None:
        """Reserve the place of each weight; FSDP2 frees the memory by resizing it, and the graph refers to the same tensors.

        `first` is the number of the first weight of the group.
        """
        self.parts, self.memory, self.places = parts, [], []
        of_dtype = defaultdict(list)
        for number, parameter in enumerate(self.fsdp_params, first):
            of_dtype[parameter.sharded_param.dtype].append((number, parameter))
        for dtype, weights in of_dtype.items():
            lengths = [parameter._orig_size.numel() for _, parameter in weights]
            memory = torch.empty(sum(lengths), dtype=dtype, device=self.device)
            self.memory.append(memory)
            for (number, parameter), whole in zip(weights, memory.split(lengths), strict=True):
                parameter.all_gather_outputs = [whole]
                weight = whole.view(parameter._orig_size)
                parameter._unsharded_param = nn.Parameter(weight, requires_grad=parameter.sharded_param.requires_grad)
                # What arrives is no change that autograd should see: `data` counts its versions by itself.
                self.places.append(_Numbered(number, parameter, whole.data))
            memory.untyped_storage().resize_(0)


def gather_modules_in_place(modules: Iterable[Any], ranks: Any, hosts: Sequence[str], *, trained: bool) -> None:
    """Let FSDP2's modules be gathered in place if their weights travel by gloo from CPU to CPU (collective: every rank).

    `hosts` are those of all ranks of the job.
    """
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups if group.device.type == "cpu"]
    if not groups or not is_gloo(ranks):
        return
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    parts = Parts([parameter._sharded_param_data for parameter in parameters], ranks, hosts, trained=trained)
    for parameter, held in zip(parameters, parts.held, strict=True):
        local = parameter._sharded_local_tensor
        parameter._sharded_param_data, local.data = held, held[: local.numel()].view(local.shape)
    first = 0
    for group in groups:
        group.__class__ = InPlaceGroup
        group.lay_out(parts, first)
        first += len(group.fsdp_params)
