"""Weights made whole over gloo: what another rank holds is received at the place where a product will read it.

DeepSpeed, FSDP2 and gloo each pass a gathered weight on by a copy: own parts into a buffer, the buffer into one of gloo's, that
one back, and the parts of each weight out of it. On a CPU those copies take as long as the messages themselves. Here each rank
sends its part to every other rank and receives theirs in place, the same bytes as a ring. Only the own part is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Work

TAG = 0x77  # of these messages; the order of those with one tag between two ranks is kept
# Keys of a DeepSpeed file that say how weights are to be gathered; DeepSpeed reads two of them by either name.
GATHERING_KEYS = {
    "allgather_sequential",
    "stage3_allgather_sequential",
    "stage3_use_all_reduce_for_fetch_params",
    "use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
}


class Exchange(Work):
    """Messages that are under way."""

    def __init__(self, messages: Iterable[Work | None]) -> None:
        super().__init__()
        self.messages = [message for message in messages if message is not None]

    def wait(self, *_: Any) -> bool:
        """Return once everything has arrived and been sent."""
        while self.messages:
            self.messages[0].wait()
            del self.messages[0]
        return True


def exchange(parts: Sequence[Float[Tensor, " n"]], own: Float[Tensor, " n"], ranks: Any) -> list[Work | None]:
    """Start to send this rank's part to the others and to receive theirs into `parts` (collective: every rank of `ranks`)."""
    rank, size = dist.get_rank(ranks), len(parts)
    messages = []
    for distance in range(1, size):
        source, target = (rank - distance) % size, (rank + distance) % size
        if parts[source].numel():
            messages.append(dist.irecv(parts[source], group=ranks, group_src=source, tag=TAG))
        if own.numel():
            messages.append(dist.isend(own, group=ranks, group_dst=target, tag=TAG))
    return messages


# --- ZeRO ------------------------------------------------------------------------------------------------------------


def gather_in_place(parameters: Iterable[Any], ranks: Any, settings: Mapping[str, Any]) -> None:
    """Let ZeRO's parameters be gathered by messages in place if they travel by gloo, unless its `settings` choose how."""
    offload = (settings.get("offload_param") or {}).get("device")
    if settings.keys() & GATHERING_KEYS or offload == "nvme" or not _is_gloo(ranks):
        return
    for parameter in parameters:
        if parameter.ds_tensor.device.type == "cpu":
            parameter.all_gather_coalesced = partial(_gather, ranks=ranks, theirs=parameter.all_gather_coalesced)


def _is_gloo(ranks: Any) -> bool:
    return dist.get_backend(ranks) == dist.Backend.GLOO and dist.get_world_size(ranks) > 1


def _gather(parameters: Iterable[Any], *, ranks: Any, theirs: Callable[..., Any], **options: Any) -> Any:
    """Start to make parameters whole, and return what DeepSpeed waits for."""
    gathered = list(parameters)
    # Options and another type on the way (`torch_autocast`) are DeepSpeed's.
    if not gathered or any(options.values()) or any(hasattr(parameter, "comm_dtype") for parameter in gathered):
        return theirs(gathered, **options)
    return GatheredWeights(gathered, ranks)


class GatheredWeights:
    """The handle of weights that are being gathered, each of which lies in one piece."""

    def __init__(self, parameters: Sequence[Any], ranks: Any) -> None:
        # Sets have other orders on other ranks.
        self.parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
        self.wholes: list[Tensor] = []
        messages: list[Work | None] = []
        size, rank, own = dist.get_world_size(ranks), dist.get_rank(ranks), []
        for run in neighbours(self.parameters):
            numbers = [parameter.ds_numel for parameter in run]
            for parameter, whole in zip(run, run[0].ds_tensor.new_empty(sum(numbers)).split(numbers), strict=True):
                assert parameter.ds_status.name == "NOT_AVAILABLE", parameter.ds_summary()
                parameter.ds_status = type(parameter.ds_status).INFLIGHT
                # All parts of a weight have the length of the first, and what no number is left for is not sent.
                parts = list(whole.split(parameter.ds_tensor.ds_numel))
                parts += [whole[:0]] * (size - len(parts))
                held = parameter.ds_tensor.detach()[: len(parts[rank])]
                messages += exchange(parts, held, ranks)
                own.append((parts[rank], held))
                self.wholes.append(whole)
        for part, held in own:
            part.copy_(held)
        self.exchange = Exchange(messages)

    def wait(self, **_: Any) -> None:
        """Make the weights available, once."""
        self.exchange.wait()
        for parameter, whole in zip(self.parameters, self.wholes, strict=False):
            parameter.data = whole.view(parameter.ds_shape)
            parameter.ds_status = type(parameter.ds_status).AVAILABLE
        self.wholes.clear()


def neighbours(parameters: Sequence[Any]) -> list[list[Any]]:
    """Return the parameters in runs that lie in one piece: weights of the same inputs, which one product may read together.

    Memory is freed as a piece, so only weights that are released together share one: those of a leaf, but for small weights, which
    stay whole on every rank.
    """
    runs: list[list[Any]] = []
    for parameter in parameters:
        before = runs[-1][-1] if runs else None
        if before is not None and _may_join(before, parameter):
            runs[-1].append(parameter)
        else:
            runs.append([parameter])
    return runs


def _may_join(first: Any, second: Any) -> bool:
    leaf = getattr(first, "ds_z3_leaf_module", None)
    return (
        leaf is not None
        and leaf is getattr(second, "ds_z3_leaf_module", None)
        and len(first.ds_shape) == len(second.ds_shape) > 1
        and first.ds_shape[1:] == second.ds_shape[1:]
        and second.ds_id == first.ds_id + 1
        and first.ds_tensor.dtype == second.ds_tensor.dtype
        and not (first.ds_persist or second.ds_persist)
    )


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


class InPlaceAllGather:
    """FSDP2's all-gather by messages in place (`torch.distributed.fsdp._fully_shard._fsdp_api.AllGather`)."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Work:
        """Start to gather `output_tensor`, in which `input_tensor` is the own part (collective: every rank of the group)."""
        parts = output_tensor.chunk(dist.get_world_size(group))
        # Also without `async_op`: FSDP2 waits when it reads the weights, so that those of the next block travel meanwhile.
        return Exchange(exchange(parts, input_tensor, group))


def gather_modules_in_place(modules: Iterable[nn.Module], ranks: Any) -> None:
    """Let FSDP2's modules be gathered by messages in place if they travel by gloo."""
    if not _is_gloo(ranks):
        return
    for module in modules:
        set_comm: Any = module.set_custom_all_gather
        set_comm(InPlaceAllGather())
