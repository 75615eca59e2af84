"""Weights made whole on CPUs: what another rank holds arrives at the place where a product will read it.

DeepSpeed, FSDP2 and gloo each pass a gathered weight on by a copy: own parts into a buffer, the buffer into one of gloo's, that
one back, and the parts of each weight out of it. On a CPU those copies take as long as the messages themselves. Here each rank
reads the parts of the ranks of its host from their memory, sends its part to every rank of another host and receives theirs in
place, the same bytes as a ring. Weights that are trained are sent to all: a rank cannot know whether another has updated its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.distributed_c10d import Work

from bpt_dist.training.sharding.host_memory import HostMemory

TAG = 0x77  # of these messages; the order of those with one tag between two ranks is kept


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


class Place(NamedTuple):
    """Where a weight is made whole: its number, the part that this rank holds, and where the part of each rank goes."""

    number: int
    held: Float[Tensor, " n"]
    parts: Sequence[Float[Tensor, " n"]]

    @classmethod
    def within(cls, whole: Float[Tensor, " numbers"], number: int, held: Float[Tensor, " n"], size: int) -> Place:
        """Return the place for a weight whose parts all have the length of `held`, but for the last ones, which may be padded."""
        parts = list(whole.split(len(held)))
        return cls(number, held, parts + [whole[:0]] * (size - len(parts)))


class Parts:
    """The way to the parts of numbered weights that the other ranks hold."""

    def __init__(self, held: Sequence[Float[Tensor, " n"]], ranks: Any, hosts: Sequence[str], *, trained: bool) -> None:
        """Let the ranks of a host read each other's parts, unless they are `trained` (collective: every rank of `ranks`).

        What this rank holds has moved to `self.held` then. `hosts` are those of all ranks of the job.
        """
        self.ranks, self.rank, self.size = ranks, dist.get_rank(ranks), dist.get_world_size(ranks)
        self._memory = HostMemory(held, ranks, hosts, offered=not trained)
        self.held = self._memory.parts

    def gather(self, places: Iterable[Place]) -> Exchange:
        """Start to fill places (collective: every rank, the same weights)."""
        places, messages = list(places), []
        for place in places:
            for distance in range(1, self.size):
                source, target = (self.rank - distance) % self.size, (self.rank + distance) % self.size
                if place.parts[source].numel() and not self._memory.may_read(source):
                    messages.append(dist.irecv(place.parts[source], group=self.ranks, group_src=source, tag=TAG))
                own = place.held[: len(place.parts[self.rank])]  # without padding
                if own.numel() and not self._memory.is_read_by(target):
                    messages.append(dist.isend(own, group=self.ranks, group_dst=target, tag=TAG))
        # While the messages travel.
        for place in places:
            for source, part in enumerate(place.parts):
                if source == self.rank:
                    part.copy_(place.held[: len(part)])
                elif part.numel() and self._memory.may_read(source):
                    self._memory.read(place.number, source, part)
        return Exchange(messages)


def is_gloo(ranks: Any) -> bool:
    """Return whether several ranks send their weights by gloo."""
    return dist.get_backend(ranks) == dist.Backend.GLOO and dist.get_world_size(ranks) > 1
