"""What every rank of the job has, on every rank: for numbers one gather to rank 0 and one broadcast.

gloo's own all-gather hands rows on around a ring, W - 1 messages one after the other. Here rank 0 receives all rows at once, and
the broadcast is a tree: 1 + log2 W messages one after the other, for the small rows that ranks compare in every step. Up to three
ranks the ring is as short.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

RING_RANKS = 3


def gather_rows(own: Shaped[Tensor, " n"], size: int, group: Any) -> Shaped[Tensor, "W n"]:
    """Return the rows of all `size` ranks in rank order (collective: every rank; `group` holds all of them)."""
    rows = own.new_empty((size, len(own)))
    if size <= RING_RANKS:
        dist.all_gather(list(rows.unbind()), own, group=group)
        return rows
    dist.gather(own, list(rows.unbind()) if dist.get_rank(group) == 0 else None, dst=0, group=group)
    dist.broadcast(rows, src=0, group=group)
    return rows


def gather_objects(value: Any, size: int, group: Any) -> list[Any]:
    """Return the values of all ranks in rank order (collective: every rank). They may be long; steps do not send them."""
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values
