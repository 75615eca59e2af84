"""Divide the work of a step over ranks and cut it into passes: numbers of tokens in, ranges of particles and texts out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh

# Enough to keep a core or a GPU busy, and few enough that activations fit. The weights are frozen, so several small backward
# passes cost no more arithmetic than a large one; on a GPU each costs its launches again.
TOKENS_A_PASS = 8192
TOKENS_A_PASS_ON_GPU = 32768
# Texts are dealt whole where no rank gets more than this many times the mean: the particles of a text then share a pass.
BALANCED = 1.05

Assignment = tuple[slice, list[int]]  # a range of particles and the texts they read in one pass


class MicroBatchLimits(NamedTuple):
    """What limits the passes of a stage.

    `size` is the most sequences in a pass, or None. `num_added` tokens are put before every text. `padding_overhead`: a pass pads
    its texts to the longest, and costs as much as so many tokens before it reads the first; 0 where a pass does not pad.
    `together`: all ranks make every pass at the same time, because each pass gathers the sharded backbone. `tokens` is about how
    many a pass reads where neither of them decides.
    """

    size: int | None = None
    num_added: int = 0
    padding_overhead: float = 0.0
    together: bool = False
    tokens: int = TOKENS_A_PASS


def tokens_a_pass(kind: str) -> int:
    """Return about how many tokens a pass reads on a `cpu` or on a GPU (`cuda`)."""
    return TOKENS_A_PASS_ON_GPU if kind == "cuda" else TOKENS_A_PASS


def assign(tokens: Sequence[int], num_particles: int, num_ranks: int, passes: MicroBatchLimits) -> list[list[Assignment]]:
    """Return the passes of each rank for `num_particles` that read texts of so many `tokens`; every rank computes the same."""
    if passes.together:
        blocks = _blocks(tokens, num_particles, num_ranks, passes)
        return [_cut_equally(*block, tokens, passes.size) for block in blocks]
    shares = deal(tokens, num_ranks)
    loads = [sum(tokens[text] for text in share) for share in shares]
    balanced = all(shares) and max(loads) * num_ranks <= BALANCED * sum(loads)
    if num_particles == 1 or balanced:
        of_ranks = [[(slice(0, num_particles), share)] if share else [] for share in shares]
    else:
        of_ranks = _cells(tokens, num_particles, num_ranks)
    return [[part for block in of_rank for part in _cut(*block, tokens, passes)] for of_rank in of_ranks]


def sequences_at_once(num_particles: int, num_texts: int, longest: int, passes: MicroBatchLimits) -> tuple[int, int]:
    """Return the most particles and texts that meet in a pass when every text has `longest` tokens, prompt included."""
    limit = passes.size
    if limit is None:
        limit = num_particles * num_texts if passes.together else max(1, passes.tokens // longest)
    particles = min(num_particles, limit)
    return particles, min(num_texts, max(1, limit // particles))


def _blocks(tokens: Sequence[int], num_particles: int, num_ranks: int, passes: MicroBatchLimits) -> list[Assignment]:
    """Give each rank one block, some particles times some texts, such that the largest block has the fewest tokens.

    One block is one pass: a pass gathers the whole backbone, so a rank should make few. Particles are split into consecutive
    groups; each group has ranks of its own, which share its texts.
    """
    if num_particles == 1 and passes.size is not None:
        # Particles may have texts of their own: the number of passes must not depend on the tokens of the texts.
        return [(slice(0, 1), share) for share in _deal_evenly(tokens, num_ranks)]
    best: tuple[tuple[int, int, int], list[Assignment]] | None = None
    shares: dict[int, list[list[int]]] = {}
    for num_groups in range(1, min(num_particles, num_ranks) + 1):
        bounds = [num_particles * group // num_groups for group in range(num_groups + 1)]
        groups = [slice(first, end) for first, end in itertools.pairwise(bounds)]
        blocks: list[Assignment] = []
        for group, ranks in zip(groups, _ranks_of_groups(groups, num_ranks, len(tokens)), strict=True):
            if ranks not in shares:
                shares[ranks] = deal(tokens, ranks)
            blocks += [(group, share) for share in shares[ranks]]
        blocks += [(slice(0, 1), []) for _ in range(num_ranks - len(blocks))]
        loads = [(block.stop - block.start) * sum(tokens[text] for text in texts) for block, texts in blocks]
        key = (max(loads), loads.count(0), num_groups)
        if best is None or key < best[0]:
            best = key, blocks
        if 0 not in loads and max(loads) * num_ranks <= BALANCED * sum(loads):
            break
    assert best is not None
    return best[1]


def _ranks_of_groups(groups: Sequence[slice], num_ranks: int, num_texts: int) -> list[int]:
    """Return how many ranks share the texts of each group of particles: in proportion to its size, at most one a text."""
    ranks = [1] * len(groups)
    for _ in range(num_ranks - len(groups)):
        open_groups = [index for index in range(len(groups)) if ranks[index] < num_texts]
        if not open_groups:
            break
        ranks[max(open_groups, key=lambda index: ((groups[index].stop - groups[index].start) / ranks[index], -index))] += 1
    return ranks


def _cut_equally(particles: slice, texts: Sequence[int], tokens: Sequence[int], size: int | None) -> list[Assignment]:
    """Return a block as passes of at most `size` sequences, whose number depends on the shape of the block alone."""
    if size is None or not texts:
        return [(particles, sorted(texts))] if texts else []
    by_length = sorted(texts, key=lambda text: (tokens[text], text))
    in_pass = min(particles.stop - particles.start, size)
    step = size // in_pass
    parts = [sorted(by_length[first : first + step]) for first in range(0, len(by_length), step)]
    ranges = [slice(first, min(first + in_pass, particles.stop)) for first in range(particles.start, particles.stop, in_pass)]
    return [(some, part) for some in ranges for part in parts]


def _deal_evenly(tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal as many texts to each rank, up to one: forth and back over the ranks from the longest text down."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, text in enumerate(sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))):
        turn, rank = divmod(place, num_ranks)
        shares[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(text)
    return [sorted(share) for share in shares]


def _cells(tokens: Sequence[int], num_particles: int, num_ranks: int) -> list[list[Assignment]]:
    """Deal single (particle, text) cells, and join those of a rank that form blocks again."""
    shares = deal([cost for cost in tokens for _ in range(num_particles)], num_ranks)
    of_ranks = []
    for share in shares:
        of_text: dict[int, list[int]] = {}
        for cell in share:
            of_text.setdefault(cell // num_particles, []).append(cell % num_particles)
        blocks: dict[tuple[int, int], list[int]] = {}
        for text, particles in of_text.items():
            for run in _runs(particles):
                blocks.setdefault(run, []).append(text)
        of_ranks.append([(slice(*run), texts) for run, texts in sorted(blocks.items())])
    return of_ranks


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges (first, behind the last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _cut(particles: slice, texts: Sequence[int], tokens: Sequence[int], passes: MicroBatchLimits) -> list[Assignment]:
    """Return one block of work as passes within the limits."""
    num_particles = particles.stop - particles.start
    groups = _alike(texts, tokens, num_particles, passes.padding_overhead) if passes.padding_overhead else [sorted(texts)]
    cut: list[Assignment] = []
    for group in groups:
        if passes.size is not None:
            in_pass = min(num_particles, passes.size)
            parts = [group[n : n + max(1, passes.size // in_pass)] for n in range(0, len(group), max(1, passes.size // in_pass))]
        else:
            longest = max(tokens[text] for text in group)
            in_pass = min(num_particles, max(1, passes.tokens // longest))
            widths = [longest] * len(tokens) if passes.padding_overhead else tokens
            parts = _within_budget(group, widths, in_pass, passes.tokens)
        for first in range(particles.start, particles.stop, in_pass):
            some = slice(first, min(first + in_pass, particles.stop))
            cut += [(some, part) for part in parts]
    return cut


def _within_budget(texts: Sequence[int], tokens: Sequence[int], num_particles: int, budget: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    room = budget
    for text in texts:
        need = num_particles * tokens[text]
        if parts[-1] and need > room:
            parts.append([])
            room = budget
        parts[-1].append(text)
        room -= need
    return parts


def _alike(texts: Sequence[int], tokens: Sequence[int], num_particles: int, padding_overhead: float) -> list[list[int]]:
    """Return texts in groups of similar length, such that padding to the longest plus the cost of each pass is least."""
    order = sorted(texts, key=lambda text: tokens[text])
    best, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        width = num_particles * tokens[order[end - 1]]
        costs = [best[begin] + (end - begin) * width + padding_overhead for begin in range(end)]
        least = min(range(end), key=costs.__getitem__)
        best.append(costs[least])
        begins.append(least)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return groups[::-1]


class MicroBatch(NamedTuple):
    """One forward and backward pass: `particles` (counted on this rank) times the texts of `batch`.

    `is_filler`: the pass only keeps this rank in step with the others; its texts are another pass's, weigh nothing and are not
    counted. The weight alone says nothing: annealing may give a real text the weight 0. `round_tasks` is used by ordered sums
    only: the task of the text each replica evaluates in this pass, in the order of the replicas; shorter than the data axis when
    the texts have run out.
    """

    particles: slice
    batch: Batch
    is_filler: bool = False
    round_tasks: tuple[int, ...] = ()


def shared_microbatches(batch: Batch, particles: slice, mesh: Mesh, passes: MicroBatchLimits) -> Iterator[MicroBatch]:
    """Yield this rank's share of (particle, text) cells, dealt by their tokens, in passes within the limits."""
    tokens = [cost + passes.num_added for cost in batch.costs().tolist()]
    of_ranks = assign(tokens, len(range(particles.start, particles.stop)), mesh.data.size, passes)
    assigned, most = of_ranks[mesh.data.index], max(map(len, of_ranks))
    for some, texts in assigned:
        yield MicroBatch(slice(particles.start + some.start, particles.start + some.stop), batch.select(texts))
    for _ in range(most - len(assigned) if passes.together else 0):
        cheapest = min(range(len(batch)), key=tokens.__getitem__)
        yield _filler(batch, cheapest, particles.start)


def ordered_microbatches(batch: Batch, particles: slice, mesh: Mesh) -> Iterator[MicroBatch]:
    """Yield one particle and one text at a time; in each round the replicas take the next texts in turn, whatever the world size.

    A pass then has the same shape wherever it runs, so its gradient has the same bits on every world size.
    """
    num_replicas, tasks = mesh.data.size, batch.task_index.tolist()
    for particle in range(particles.start, particles.stop):
        for first in range(0, len(batch), num_replicas):
            text, round_tasks = first + mesh.data.index, tuple(tasks[first : first + num_replicas])
            if text < len(batch):
                yield MicroBatch(slice(particle, particle + 1), batch.select([text]), round_tasks=round_tasks)
            else:
                yield _filler(batch, first, particle)._replace(round_tasks=round_tasks)


def _filler(batch: Batch, text: int, particle: int) -> MicroBatch:
    """Return a pass that weighs nothing, so that this rank makes as many passes as the others."""
    texts = batch.select([text])
    return MicroBatch(slice(particle, particle + 1), replace(texts, weight=texts.weight * 0), is_filler=True)


def idle_ranks_warning(key: str, num_texts: int, num_particles: int, mesh_shape: tuple[int, int]) -> str | None:
    """Return a warning where a step has fewer (particle, text) pairs than there are ranks to share them; None where all have work.

    `key` is the stage's section, `num_particles` how many particles of a rank share a text; `mesh_shape` is (particle, data).
    """
    num_blocks, num_sharers = mesh_shape
    idle = num_sharers - num_texts * num_particles
    if idle <= 0:
        return None
    pairs = f"{num_texts} text(s)" if num_particles == 1 else f"{num_texts} text(s) x {num_particles} particles"
    return (
        f"{key}.batch_size: a step has {pairs} for {num_sharers} ranks of the data axis, so {idle * num_blocks} of "
        f"{num_blocks * num_sharers} ranks have no texts and only take part in the collectives; raise {key}.batch_size or start "
        f"{num_texts * num_particles * num_blocks} processes to use them all"
    )


def deal(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal texts to `num_shares` ranks by cost, largest first to the least loaded; ascending indices within a share.

    Deterministic (ties go to the lower rank), so every rank computes the same deal without communication.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min(range(num_shares), key=lambda share: (loads[share], share))
        shares[target].append(index)
        loads[target] += costs[index]
    return [sorted(share) for share in shares]
