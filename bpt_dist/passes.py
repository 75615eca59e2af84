"""How the work of a step is divided over ranks and cut into passes: numbers of tokens in, ranges of particles and texts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bpt_dist.mesh import deal

# Enough to keep a core or a GPU busy, little enough that activations fit. The weights are frozen, so a backward pass for each
# part costs no arithmetic more than one for all.
TOKENS_A_PASS = 8192
# Texts are dealt whole where that leaves no rank more than this many times the mean: particles of a text then share a pass.
BALANCED = 1.05

Cut = tuple[slice, list[int]]  # a range of particles and the texts they read in one pass


class Passes(NamedTuple):
    """What limits the passes of a stage.

    `size` is the most sequences in a pass, or None. `num_added` tokens stand before every text. `padding_for`: a pass pads its
    texts to the longest, and costs as much as so many tokens before it reads the first; 0 where a pass does not pad. `together`:
    every pass is made by all ranks at once, because each gathers the parts of the T5.
    """

    size: int | None = None
    num_added: int = 0
    padding_for: float = 0.0
    together: bool = False


def divide(tokens: Sequence[int], num_particles: int, num_ranks: int, passes: Passes) -> list[list[Cut]]:
    """Return the passes of each rank for `num_particles` that read texts of so many `tokens`; every rank computes the same."""
    # The number of passes must not depend on the tokens where ranks with other texts (of other particles) make them together.
    shares = _deal_evenly(tokens, num_ranks) if passes.together and passes.size is not None else deal(tokens, num_ranks)
    loads = [sum(tokens[text] for text in share) for share in shares]
    balanced = all(shares) and max(loads) * num_ranks <= BALANCED * sum(loads)
    if passes.together or num_particles == 1 or balanced:
        blocks = [[(slice(0, num_particles), share)] if share else [] for share in shares]
    else:
        blocks = _cells(tokens, num_particles, num_ranks)
    return [[part for block in of_rank for part in _cut(*block, tokens, passes)] for of_rank in blocks]


def sequences_at_once(num_particles: int, num_texts: int, longest: int, passes: Passes) -> tuple[int, int]:
    """Return the most particles and texts that meet in a pass when every text has `longest` tokens, prompt included."""
    limit = passes.size
    if limit is None:
        limit = num_particles * num_texts if passes.together else max(1, TOKENS_A_PASS // longest)
    particles = min(num_particles, limit)
    return particles, min(num_texts, max(1, limit // particles))


def _deal_evenly(tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal as many texts to each rank, up to one: forth and back over the ranks from the longest text down."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, text in enumerate(sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))):
        turn, rank = divmod(place, num_ranks)
        shares[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(text)
    return [sorted(share) for share in shares]


def _cells(tokens: Sequence[int], num_particles: int, num_ranks: int) -> list[list[Cut]]:
    """Deal single (particle, text) cells, and join those of a rank that form blocks again."""
    shares = deal([cost for cost in tokens for _ in range(num_particles)], num_ranks)
    found = []
    for share in shares:
        of_text: dict[int, list[int]] = {}
        for cell in share:
            of_text.setdefault(cell // num_particles, []).append(cell % num_particles)
        blocks: dict[tuple[int, int], list[int]] = {}
        for text, particles in of_text.items():
            for run in _runs(particles):
                blocks.setdefault(run, []).append(text)
        found.append([(slice(*run), texts) for run, texts in sorted(blocks.items())])
    return found


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges (first, behind the last)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _cut(particles: slice, texts: Sequence[int], tokens: Sequence[int], passes: Passes) -> list[Cut]:
    """Return one block of work as passes within the limits."""
    num_particles = particles.stop - particles.start
    if passes.together and passes.size is None:
        return [(particles, sorted(texts))]
    groups = _alike(texts, tokens, num_particles, passes.padding_for) if passes.padding_for else [sorted(texts)]
    found: list[Cut] = []
    for group in groups:
        if passes.size is not None:
            in_pass = min(num_particles, passes.size)
            parts = [group[n : n + max(1, passes.size // in_pass)] for n in range(0, len(group), max(1, passes.size // in_pass))]
        else:
            longest = max(tokens[text] for text in group)
            in_pass = min(num_particles, max(1, TOKENS_A_PASS // longest))
            parts = _within_budget(group, [longest] * len(tokens) if passes.padding_for else tokens, in_pass)
        for first in range(particles.start, particles.stop, in_pass):
            some = slice(first, min(first + in_pass, particles.stop))
            found += [(some, part) for part in parts]
    return found


def _within_budget(texts: Sequence[int], tokens: Sequence[int], num_particles: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    room = TOKENS_A_PASS
    for text in texts:
        need = num_particles * tokens[text]
        if parts[-1] and need > room:
            parts.append([])
            room = TOKENS_A_PASS
        parts[-1].append(text)
        room -= need
    return parts


def _alike(texts: Sequence[int], tokens: Sequence[int], num_particles: int, padding_for: float) -> list[list[int]]:
    """Return texts in groups of similar length, such that padding to the longest plus the cost of each pass is least."""
    order = sorted(texts, key=lambda text: tokens[text])
    best, before = [0.0], [0]
    for end in range(1, len(order) + 1):
        width = num_particles * tokens[order[end - 1]]
        costs = [best[begin] + (end - begin) * width + padding_for for begin in range(end)]
        least = min(range(end), key=costs.__getitem__)
        best.append(costs[least])
        before.append(least)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[before[end] : end]))
        end = before[end]
    return groups[::-1]
