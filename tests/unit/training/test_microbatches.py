"""Every cell of a step is read once, in passes within the limits, and no rank waits long for another."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from bpt_dist.training.microbatches import (
    TOKENS_A_PASS,
    Assignment,
    MicroBatchLimits,
    assign,
    idle_ranks_warning,
    sequences_at_once,
)

ISSUE = [128, 140, 148, 162, 290, 356]  # tokens with their prompt: six tasks at P = 100


def cells(plan: list[list[Assignment]]) -> list[tuple[int, int]]:
    return sorted(
        (particle, text) for part in plan for some, texts in part for particle in range(some.start, some.stop) for text in texts
    )


def loads(plan: list[list[Assignment]], tokens: list[int]) -> list[int]:
    return [sum((some.stop - some.start) * tokens[text] for some, texts in part for text in texts) for part in plan]


@pytest.mark.parametrize(
    "passes",
    [
        MicroBatchLimits(),
        MicroBatchLimits(size=3),
        MicroBatchLimits(padding_overhead=40.0),
        MicroBatchLimits(together=True),
        MicroBatchLimits(5, 100, 9.0, True),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_cell_is_read_once(num_ranks: int, passes: MicroBatchLimits) -> None:
    draw = np.random.default_rng(num_ranks)
    for num_particles, num_texts in itertools.product((1, 3, 5), (8, 13)):
        tokens = draw.integers(1, 400, num_texts).tolist()
        plan = assign(tokens, num_particles, num_ranks, passes)
        assert cells(plan) == list(itertools.product(range(num_particles), range(num_texts)))
        if passes.size is not None:
            assert all((some.stop - some.start) * len(texts) <= passes.size for part in plan for some, texts in part)


@pytest.mark.parametrize(("num_ranks", "efficiency"), [(2, 0.95), (4, 0.96), (8, 0.93)])
def test_cells_keep_many_ranks_equally_busy(num_ranks: int, efficiency: float) -> None:
    plan = assign(ISSUE, 5, num_ranks, MicroBatchLimits())
    assert sum(loads(plan, ISSUE)) / num_ranks / max(loads(plan, ISSUE)) >= efficiency


@pytest.mark.parametrize(("num_ranks", "imbalance"), [(2, 1.1), (4, 1.2), (8, 1.15), (16, 1.15), (30, 2.0)])
def test_ranks_that_make_passes_together_share_particles_in_one_pass_each(num_ranks: int, imbalance: float) -> None:
    """Whole texts would leave two of eight ranks idle, and one of them with 356 x 5 of 6120 tokens."""
    plan = assign(ISSUE, 5, num_ranks, MicroBatchLimits(together=True))
    assert [len(part) for part in plan] == [1] * num_ranks
    assert max(loads(plan, ISSUE)) * num_ranks <= imbalance * sum(loads(plan, ISSUE))
    assert cells(plan) == list(itertools.product(range(5), range(6)))


def test_ranks_without_cells_have_no_passes() -> None:
    plan = assign([10, 20], 2, 7, MicroBatchLimits(together=True))
    assert sum(not part for part in plan) == 3
    assert [len(part) for part in assign([10, 20], 2, 7, MicroBatchLimits())].count(0) == 3


@pytest.mark.parametrize(("num_texts", "num_ranks"), [(31, 32), (20, 21), (62, 64)])
def test_no_rank_is_idle_where_cells_are_enough(num_texts: int, num_ranks: int) -> None:
    plan = assign([356] * num_texts, 5, num_ranks, MicroBatchLimits())
    assert all(plan)
    assert len(cells(plan)) == 5 * num_texts


def test_passes_made_together_are_as_many_whatever_the_lengths() -> None:
    draw = np.random.default_rng(1)
    for num_texts, num_ranks, size in itertools.product((4, 9, 16), (2, 3), (1, 2, 5)):
        counts = set()
        for _ in range(30):  # a particle with texts of its own, on a mesh whose other rows read other texts
            limits = MicroBatchLimits(size=size, padding_overhead=50.0, together=True)
            plan = assign(draw.integers(1, 400, num_texts).tolist(), 1, num_ranks, limits)
            counts.add(max(map(len, plan)))
        assert len(counts) == 1, (num_texts, num_ranks, size)


@pytest.mark.parametrize(
    ("num_texts", "num_particles", "mesh_shape", "expected"),
    [
        (3, 1, (1, 4), "target.batch_size: a step has 3 text(s) for 4 ranks of the data axis, so 1 of 4 ranks have no texts"),
        (2, 3, (5, 8), "2 text(s) x 3 particles for 8 ranks of the data axis, so 10 of 40 ranks have no texts"),
        (4, 1, (1, 4), None),
        (1, 5, (1, 4), None),
    ],
)
def test_idle_ranks_are_counted_and_the_remedy_uses_them(
    num_texts: int, num_particles: int, mesh_shape: tuple[int, int], expected: str | None
) -> None:
    warning = idle_ranks_warning("target", num_texts, num_particles, mesh_shape)
    if expected is None:
        assert warning is None
        return
    assert warning is not None
    assert expected in warning
    num_used = int(re.search(r"start (\d+) processes", warning)[1])  # type: ignore[index]
    assert idle_ranks_warning("target", num_texts, num_particles, (mesh_shape[0], num_used // mesh_shape[0])) is None


def test_padding_counts_where_a_pass_pads() -> None:
    (part,) = assign(
        [10] * 40 + [1000], 1, 1, MicroBatchLimits(padding_overhead=1e9)
    )  # no pass is worth it: all are padded to the longest
    for _, texts in part:
        assert len(texts) * 1000 <= TOKENS_A_PASS


def test_even_texts_stay_whole() -> None:
    for part in assign([100] * 8, 5, 4, MicroBatchLimits()):
        assert [some for some, _ in part] == [slice(0, 5)]


def test_passes_hold_a_budget_of_tokens_unless_a_single_sequence_is_longer() -> None:
    tokens = [TOKENS_A_PASS // 3] * 7 + [2 * TOKENS_A_PASS]
    (part,) = assign(tokens, 2, 1, MicroBatchLimits())
    for some, texts in part:
        num = some.stop - some.start
        assert sum(num * tokens[text] for text in texts) <= TOKENS_A_PASS or (num == 1 and len(texts) == 1)
    assert cells([part]) == list(itertools.product(range(2), range(8)))


def test_padding_is_weighed_against_passes_as_in_all_ways_to_group() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        tokens = draw.integers(1, 300, 6).tolist()
        padding_overhead = float(draw.integers(1, 400))
        (part,) = assign(tokens, 2, 1, MicroBatchLimits(padding_overhead=padding_overhead))

        def cost(groups: list[list[int]], padding_overhead: float = padding_overhead) -> float:
            return sum(2 * len(group) * max(group) + padding_overhead for group in groups)

        found = cost([[tokens[text] for text in texts] for _, texts in part])
        ordered = sorted(tokens)
        cuts = (cut for number in range(6) for cut in itertools.combinations(range(1, 6), number))
        ways = ([ordered[a:b] for a, b in itertools.pairwise((0, *cut, 6))] for cut in cuts)
        assert found == pytest.approx(min(map(cost, ways)))


def test_the_plan_knows_the_largest_pass() -> None:
    assert sequences_at_once(5, 6, 356, MicroBatchLimits()) == (5, 4)
    assert sequences_at_once(64, 6, 356, MicroBatchLimits()) == (23, 1)
    assert sequences_at_once(64, 6, 356, MicroBatchLimits(together=True)) == (64, 6)
    assert sequences_at_once(5, 6, 356, MicroBatchLimits(size=7)) == (5, 1)
    assert sequences_at_once(2, 2, 3 * TOKENS_A_PASS, MicroBatchLimits()) == (1, 1)
