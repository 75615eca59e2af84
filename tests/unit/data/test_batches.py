"""Batches are a pure function of (seed, step): laws of the permutation, of task sampling, and of the weights."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from bpt_dist.data.batches import Batch, Batches
from bpt_dist.data.tokens import TokenisedTask
from bpt_dist.errors import ConfigError


def task(name: str, num_rows: int) -> TokenisedTask:
    lengths = [2 + (7 * i + len(name)) % 5 for i in range(num_rows)]
    return TokenisedTask(
        name=name,
        source_ids=tuple(np.arange(1, length + 1, dtype=np.int32) + i for i, length in enumerate(lengths)),
        target_ids=tuple(np.full(1 + i % 3, 9, dtype=np.int32) for i in range(num_rows)),
        row_ids=tuple(f"train:{i + 1}" for i in range(num_rows)),
        label_ids=(),
        num_truncated_sources=0,
        num_truncated_targets=0,
    )


def same(one: Batch, other: Batch) -> bool:
    tensors = ("source_ids", "source_mask", "target_ids", "task_index", "weight")
    return one.row_ids == other.row_ids and all(torch.equal(getattr(one, n), getattr(other, n)) for n in tensors)


TASKS = (task("a", 7), task("bb", 12), task("ccc", 5))


def test_every_row_comes_once_an_epoch_and_epochs_differ() -> None:
    batches = Batches([task("a", 12)], batch_size=3, seed=0)
    epochs = [[row for step in range(4 * e, 4 * e + 4) for row in batches.at(step).row_ids] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"a/train:{i + 1}" for i in range(12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_may_end_inside_a_batch() -> None:
    batches = Batches([task("a", 7)], batch_size=3, seed=0)
    rows = [row for step in range(7) for row in batches.at(step).row_ids]
    assert Counter(rows[:7]) == Counter(rows[7:14]) == Counter(rows[14:]) == Counter(f"a/train:{i + 1}" for i in range(7))


def test_a_step_is_the_same_from_a_fresh_object_in_any_order() -> None:
    forward = Batches(TASKS, batch_size=2, seed=3, tasks_per_step=2)
    steps = {step: forward.at(step) for step in range(30)}
    backward = Batches(TASKS, batch_size=2, seed=3, tasks_per_step=2)
    for step in reversed(range(30)):
        assert same(backward.at(step), steps[step])
        assert same(Batches(TASKS, batch_size=2, seed=3, tasks_per_step=2).at(step), steps[step])


def test_rows_of_a_task_do_not_depend_on_its_neighbours() -> None:
    alone = Batches([TASKS[1]], batch_size=2, seed=3).at(17).row_ids
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        among = Batches([TASKS[i] for i in order], batch_size=2, seed=3).at(17)
        assert tuple(row for row in among.row_ids if row.startswith("bb/")) == alone


def test_seeds_and_tasks_have_their_own_orders() -> None:
    def order(name: str, seed: int) -> tuple[str, ...]:
        rows = Batches([task(name, 50)], batch_size=50, seed=seed).at(0).row_ids
        return tuple(row.split("/")[1] for row in rows)

    assert len({order("a", 0), order("a", 1), order("b", 0)}) == 3


def test_the_order_is_pinned_for_ever() -> None:
    """A change of these numbers breaks the resuming of every run in the world."""
    assert Batches([task("a", 6)], batch_size=6, seed=0).at(0).row_ids == PINNED


PINNED = tuple(f"a/train:{i}" for i in (2, 4, 6, 3, 1, 5))


def test_permutations_are_uniform() -> None:
    batches = Batches([task("a", 3)], batch_size=3, seed=0)
    orders = Counter(batches.at(step).row_ids for step in range(3000))
    assert len(orders) == 6
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_task_sampling_is_uniform_without_replacement() -> None:
    batches = Batches([task(name, 3) for name in "abcd"], batch_size=1, seed=1, tasks_per_step=2)
    drawn = Counter(batches.tasks_at(step) for step in range(6000))
    assert set(drawn) == set(combinations(range(4), 2))
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


@pytest.mark.parametrize("tasks_per_step", [1, 2, 3, None])
def test_the_expected_weight_of_a_task_is_its_own(tasks_per_step: int | None) -> None:
    """κ-of-K sampling is unbiased: on average over steps, task k weighs w_k, spread over its B rows."""
    wanted = (1.0, 0.5, 2.0)
    batches = Batches(TASKS, batch_size=2, seed=0, tasks_per_step=tasks_per_step, task_weight=wanted)
    total = torch.zeros(3, dtype=torch.float64)
    for step in range(1500):
        batch = batches.at(step)
        total.index_add_(0, batch.task_index, batch.weight.double())
    assert torch.allclose(total / 1500, torch.tensor(wanted, dtype=torch.float64), rtol=0.12)
    if tasks_per_step is None:
        assert torch.equal(total / 1500, torch.tensor(wanted, dtype=torch.float64))


def test_particles_with_their_own_texts_share_none_and_cover_the_data() -> None:
    batches = Batches([task("a", 24)], batch_size=2, seed=0, num_particles=3)
    seen = [[row for step in range(4) for row in batches.at(step, particle=m).row_ids] for m in range(3)]
    assert Counter(row for rows in seen for row in rows) == Counter(f"a/train:{i + 1}" for i in range(24))
    assert batches.at(0, particle=1).weight.tolist() == batches.at(0).weight.tolist()
    with pytest.raises(ValueError, match="particle 3 of 3"):
        batches.at(0, particle=3)


def test_one_particle_alone_has_the_shared_texts() -> None:
    batches = Batches(TASKS, batch_size=2, seed=0)
    assert all(same(batches.at(step), batches.at(step, particle=0)) for step in range(5))


def test_a_batch_is_task_major_padded_and_masked() -> None:
    batch = Batches(TASKS, batch_size=2, seed=0).at(0)
    assert batch.task_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.source_ids.dtype == batch.target_ids.dtype == torch.int64
    assert batch.weight.dtype == torch.float32
    for n, row in enumerate(batch.row_ids):
        name, line = row.split("/train:")
        own = next(each for each in TASKS if each.name == name)
        source, target = own.source_ids[int(line) - 1], own.target_ids[int(line) - 1]
        assert batch.source_ids[n].tolist() == [*source, *[0] * (batch.source_ids.shape[1] - len(source))]
        assert batch.source_mask[n].tolist() == [1] * len(source) + [0] * (batch.source_ids.shape[1] - len(source))
        assert batch.target_ids[n].tolist() == [*target, *[-100] * (batch.target_ids.shape[1] - len(target))]
        assert int(batch.costs()[n]) == len(source) + len(target)


def test_shares_of_a_batch_put_together_are_the_batch() -> None:
    batch = Batches(TASKS, batch_size=3, seed=0).at(4)
    shares = [batch.select(range(r, len(batch), 2)) for r in range(2)]
    rows = [row for share in shares for row in share.row_ids]
    assert sorted(rows) == sorted(batch.row_ids)
    for share in shares:
        assert share.source_mask.sum(1).max() == share.source_ids.shape[1]
        assert (share.target_ids != -100).sum(1).max() == share.target_ids.shape[1]
    whole = batch.select(torch.arange(len(batch)))
    assert same(whole, batch)
    assert len(batch.select([])) == 0


def test_impossible_batches_are_refused() -> None:
    for settings in ({"batch_size": 0}, {"tasks_per_step": 4}, {"tasks_per_step": 0}, {"task_weight": (1.0,)}):
        with pytest.raises(ConfigError):
            Batches(TASKS, **{"batch_size": 1, "seed": 0, **settings})
    with pytest.raises(ConfigError, match="names a task twice"):
        Batches([TASKS[0], TASKS[0]], batch_size=1, seed=0)
