"""ZeRO's weights, made whole in place (`gather.py` says why)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from bpt_dist.training.sharding.gather import Parts, Place, is_gloo

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


def gather_in_place(
    parameters: Iterable[Any], ranks: Any, hosts: Sequence[str], settings: Mapping[str, Any], *, trained: bool
) -> None:
    """Let ZeRO's parameters be gathered in place if they travel by gloo, unless its `settings` choose how (collective: every rank).

    `hosts` are those of all ranks of the job.
    """
    offload = (settings.get("offload_param") or {}).get("device")
    given = [parameter for parameter in parameters if parameter.ds_tensor.device.type == "cpu"]
    if settings.keys() & GATHERING_KEYS or offload == "nvme" or not is_gloo(ranks) or not given:
        return
    parts = Parts([parameter.ds_tensor for parameter in given], ranks, hosts, trained=trained)
    for number, (parameter, held) in enumerate(zip(given, parts.held, strict=True)):
        parameter.ds_tensor.data = held
        parameter.bpt_number = number
        parameter.all_gather_coalesced = partial(_gather, parts=parts, theirs=parameter.all_gather_coalesced)


def _gather(parameters: Iterable[Any], *, parts: Parts, theirs: Callable[..., Any], **options: Any) -> Any:
    """Start to make parameters whole, and return what DeepSpeed waits for."""
    gathered = list(parameters)
    # Options and another type on the way (`torch_autocast`) are DeepSpeed's.
    if not gathered or any(options.values()) or any(hasattr(parameter, "comm_dtype") for parameter in gathered):
        return theirs(gathered, **options)
    return GatheredWeights(gathered, parts)


class GatheredWeights:
    """The handle of weights that are being gathered, each of which lies in one piece."""

    def __init__(self, parameters: Sequence[Any], parts: Parts) -> None:
        # Sets have other orders on other ranks.
        self.parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
        self.wholes: list[Tensor] = []
        places = []
        for run in neighbours(self.parameters):
            numbers = [parameter.ds_numel for parameter in run]
            for parameter, whole in zip(run, run[0].ds_tensor.new_empty(sum(numbers)).split(numbers), strict=True):
                assert parameter.ds_status.name == "NOT_AVAILABLE", parameter.ds_summary()
                parameter.ds_status = type(parameter.ds_status).INFLIGHT
                places.append(Place.within(whole, parameter.bpt_number, parameter.ds_tensor.detach(), parts.size))
                self.wholes.append(whole)
        self.exchange = parts.gather(places)

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
