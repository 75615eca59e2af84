"""Count what this process receives: by collectives, ours, DeepSpeed's and FSDP2's, and from the memory of its host."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHTS = "weights"  # the purpose of what is sent for DeepSpeed and FSDP2
SENDERS = ("/deepspeed/runtime/", "/torch/distributed/fsdp/", "/training/sharding/gather.py")
OURS = "/bpt_dist/"


class Traffic(TorchDispatchMode):
    """While it is entered, adds up calls and bytes of collectives by purpose: WEIGHTS, or the function of ours that called.

    Bytes are those a rank receives from the others: of an all-gather the parts of the others, of an all-reduce 2 (W - 1)/W of the
    tensor, as a ring sends it. Barriers count nothing. `messages` are the bytes of each collective, in order, and `reads` those of
    each part that was read from another rank's memory; they count as if they had been sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.messages: list[int] = []

    def __enter__(self) -> Traffic:
        """Begin to count."""
        _counting.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)
        _counting.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operator, and count it if it is a collective."""
        if func.namespace == "c10d":
            received = _received(func._schema.name.partition("::")[2], args)
            if received is not None:
                purpose = _purpose()
                self.bytes[purpose] += received
                self.calls[purpose] += 1
                self.messages.append(received)
        return func(*args, **(kwargs or {}))


_counting: list[Traffic] = []


def note_read(purpose: str, number: int) -> None:
    """Count bytes that were read from the memory of another rank."""
    for traffic in _counting:
        traffic.bytes[purpose] += number
        traffic.calls[purpose] += 1
        traffic.reads.append(number)


def _received(name: str, args: Sequence[Any]) -> int | None:
    """Return the bytes that a collective brings this rank, by its signature in torch's C++; None for what moves no tensors."""
    group = next((found for found in map(_group, args) if found is not None), None)
    if group is None or name == "barrier":
        return None
    first, others = _bytes(args[0]), (group.size() - 1) / group.size()
    if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "gather_"):
        return max(0, first - _bytes(args[1]))  # of a gather only the root receives
    if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
        return _bytes(args[1]) - first
    if name in ("broadcast_", "send", "recv_"):
        return first if name == "recv_" or (name == "broadcast_" and args[2] != group.rank()) else 0
    if name == "alltoall_base_":
        splits = args[3] or [1] * group.size()
        return round(first * (1 - splits[group.rank()] / max(1, sum(splits))))
    return round(2 * first * others)  # of an all-reduce


def _group(value: Any) -> Any:
    return dist.ProcessGroup.unbox(value) if isinstance(value, torch.ScriptObject) else None


def _bytes(value: Tensor | Iterable[Any]) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value))


def _purpose() -> str:
    """Return the purpose of the running collective."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if any(part in file for part in SENDERS):
            return WEIGHTS
        if OURS in file:
            return str(frame.f_code.co_name)
        frame = frame.f_back
    return "others"
