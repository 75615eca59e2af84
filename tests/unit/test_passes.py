"""Every cell of a step is read once, in passes within the limits, and no rank waits long for another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bpt_dist.passes import TOKENS_A_PASS, Cut, Passes, divide, sequences_at_once

ISSUE = [128, 140, 148, 162, 290, 356]  # tokens with their prompt: six tasks at P = 100


def cells(plan: list[list[Cut]]) -> list[tuple[int, int]]:
    return sorted(
        (particle, text) for part in plan for some, texts in part for particle in range(some.start, some.stop) for text in texts
    )


def loads(plan: list[list[Cut]], tokens: list[int]) -> list[int]:
    return [sum((some.stop - some.start) * tokens[text] for some, texts in part for text in texts) for part in plan]


@pytest.mark.parametrize(
    "passes", [Passes(), Passes(size=3), Passes(padding_for=40.0), Passes(together=True), Passes(5, 100, 9.0, True)]
)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_cell_is_read_once(num_ranks: int, passes: Passes) -> None:
    draw = np.random.default_rng(num_ranks)
    for num_particles, num_texts in itertools.product((1, 3, 5), (8, 13)):
        tokens = draw.integers(1, 400, num_texts).tolist()
        plan = divide(tokens, num_particles, num_ranks, passes)
        assert cells(plan) == list(itertools.product(range(num_particles), range(num_texts)))
        if passes.size is not None:
            assert all((some.stop - some.start) * len(texts) <= passes.size for part in plan for some, texts in part)


@pytest.mark.parametrize(("num_ranks", "efficiency"), [(2, 0.95), (4, 0.96), (8, 0.93)])
def test_cells_keep_many_ranks_equally_busy(num_ranks: int, efficiency: float) -> None:
    plan = divide(ISSUE, 5, num_ranks, Passes())
    assert sum(loads(plan, ISSUE)) / num_ranks / max(loads(plan, ISSUE)) >= efficiency
    whole = divide(ISSUE, 5, num_ranks, Passes(together=True))  # whole texts, as ranks that make passes together need
    assert max(loads(plan, ISSUE)) <= max(loads(whole, ISSUE))
    assert num_ranks < 8 or max(loads(plan, ISSUE)) < 0.5 * max(loads(whole, ISSUE))


@pytest.mark.parametrize(("num_texts", "num_ranks"), [(31, 32), (20, 21), (62, 64)])
def test_no_rank_is_idle_where_cells_are_enough(num_texts: int, num_ranks: int) -> None:
    plan = divide([356] * num_texts, 5, num_ranks, Passes())
    assert all(plan)
    assert len(cells(plan)) == 5 * num_texts


def test_passes_made_together_are_as_many_whatever_the_lengths() -> None:
    draw = np.random.default_rng(1)
    for num_texts, num_ranks, size in itertools.product((4, 9, 16), (2, 3), (1, 2, 5)):
        counts = set()
        for _ in range(30):
            plan = divide(draw.integers(1, 400, num_texts).tolist(), 2, num_ranks, Passes(size=size, together=True))
            counts.add(max(map(len, plan)))
        assert len(counts) == 1, (num_texts, num_ranks, size)


def test_padding_counts_where_a_pass_pads() -> None:
    (part,) = divide([10] * 40 + [1000], 1, 1, Passes(padding_for=1e9))  # no pass is worth it: all are padded to the longest
    for _, texts in part:
        assert len(texts) * 1000 <= TOKENS_A_PASS


def test_even_texts_stay_whole() -> None:
    for part in divide([100] * 8, 5, 4, Passes()):
        assert [some for some, _ in part] == [slice(0, 5)]


def test_passes_hold_a_budget_of_tokens_unless_a_single_sequence_is_longer() -> None:
    tokens = [TOKENS_A_PASS // 3] * 7 + [2 * TOKENS_A_PASS]
    (part,) = divide(tokens, 2, 1, Passes())
    for some, texts in part:
        num = some.stop - some.start
        assert sum(num * tokens[text] for text in texts) <= TOKENS_A_PASS or (num == 1 and len(texts) == 1)
    assert cells([part]) == list(itertools.product(range(2), range(8)))


def test_padding_is_weighed_against_passes_as_in_all_ways_to_group() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        tokens = draw.integers(1, 300, 6).tolist()
        padding_for = float(draw.integers(1, 400))
        (part,) = divide(tokens, 2, 1, Passes(padding_for=padding_for))

        def cost(groups: list[list[int]], padding_for: float = padding_for) -> float:
            return sum(2 * len(group) * max(group) + padding_for for group in groups)

        found = cost([[tokens[text] for text in texts] for _, texts in part])
        ordered = sorted(tokens)
        cuts = (cut for number in range(6) for cut in itertools.combinations(range(1, 6), number))
        ways = ([ordered[a:b] for a, b in itertools.pairwise((0, *cut, 6))] for cut in cuts)
        assert found == pytest.approx(min(map(cost, ways)))


def test_the_plan_knows_the_largest_pass() -> None:
    assert sequences_at_once(5, 6, 356, Passes()) == (5, 4)
    assert sequences_at_once(64, 6, 356, Passes()) == (23, 1)
    assert sequences_at_once(64, 6, 356, Passes(together=True)) == (64, 6)
    assert sequences_at_once(5, 6, 356, Passes(size=7)) == (5, 1)
    assert sequences_at_once(2, 2, 3 * TOKENS_A_PASS, Passes()) == (1, 1)
