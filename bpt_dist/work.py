"""Divide one step: which particles meet which texts on this rank, pass by pass.

Where the T5 is partitioned every rank makes the same number of passes, whatever its share, because it is gathered in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from bpt_dist.data.batches import Batch
from bpt_dist.mesh import Mesh
from bpt_dist.passes import Passes, divide


class Unit(NamedTuple):
    """One forward and backward pass: `particles` (counted on this rank) times the texts of `batch`.

    `round_tasks` is used by ordered sums only: the task of the text each replica evaluates in this pass, in the order of the
    replicas; shorter than the data axis when the texts have run out.
    """

    particles: slice
    batch: Batch
    round_tasks: tuple[int, ...] = ()


def shared_units(batch: Batch, particles: slice, mesh: Mesh, passes: Passes) -> Iterator[Unit]:
    """Yield this rank's share of (particle, text) cells, dealt by their tokens, in passes within the limits."""
    tokens = [cost + passes.num_added for cost in batch.costs().tolist()]
    of_ranks = divide(tokens, len(range(particles.start, particles.stop)), mesh.data.size, passes)
    own, most = of_ranks[mesh.data.index], max(map(len, of_ranks))
    for some, texts in own:
        yield Unit(slice(particles.start + some.start, particles.start + some.stop), batch.select(texts))
    for _ in range(most - len(own) if passes.together else 0):
        cheapest = min(range(len(batch)), key=tokens.__getitem__)
        yield Unit(slice(particles.start, particles.start + 1), _padded(batch, [], [cheapest]))


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
