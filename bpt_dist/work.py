"""Divide one step: which particles meet which texts on this rank, pass by pass.

Every rank makes the same number of passes, whatever its share, because a partitioned T5 is gathered in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from bpt_dist.data.batches import Batch
from bpt_dist.mesh import Mesh, deal


class Unit(NamedTuple):
    """One forward and backward pass: `particles` (counted on this rank) times the texts of `batch`.

    `round_tasks` is used by ordered sums only: the task of the text each replica evaluates in this pass, in the order of the
    replicas; shorter than the data axis when the texts have run out.
    """

    particles: slice
    batch: Batch
    round_tasks: tuple[int, ...] = ()


def shared_units(batch: Batch, particles: slice, mesh: Mesh, pass_size: int | None) -> Iterator[Unit]:
    """Yield this rank's share of the texts, dealt by cost, in passes of at most `pass_size` sequences (particles x texts)."""
    shares = deal(batch.costs().tolist(), mesh.data.size)
    own, most = shares[mesh.data.index], max(len(share) for share in shares)
    size = len(range(particles.start, particles.stop))
    in_pass = size if pass_size is None else min(size, pass_size)
    texts = most if pass_size is None else max(1, pass_size // in_pass)
    for first in range(particles.start, particles.stop, in_pass):
        some = slice(first, min(first + in_pass, particles.stop))
        for place in range(0, most, texts):
            yield Unit(some, _padded(batch, own[place : place + texts], own[:1]))


def ordered_units(batch: Batch, particles: slice, mesh: Mesh) -> Iterator[Unit]:
    """Yield one particle and one text at a time; in each round the replicas take the next texts in turn, whatever the world size.

    A pass then has the same shape wherever it runs, so its gradient has the same bits on every world size.
    """
    num_replicas, tasks = mesh.data.size, batch.task_index.tolist()
    for particle in range(particles.start, particles.stop):
        for first in range(0, len(batch), num_replicas):
            own = first + mesh.data.index
            texts = _padded(batch, [own] if own < len(batch) else [], [first])
            yield Unit(slice(particle, particle + 1), texts, tuple(tasks[first : first + num_replicas]))


def _padded(batch: Batch, texts: Sequence[int], filler: Sequence[int]) -> Batch:
    """Return some texts, or, so that this rank makes as many passes as the others, a text that weighs nothing."""
    if texts:
        return batch.select(texts)
    idle = batch.select(filler)
    return replace(idle, weight=idle.weight * 0)
