"""Mixtures of tasks: the frequencies are those of the closed form, and any step can be asked for alone."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from scipy import stats

from bpt_dist.data.batches import Batches
from bpt_dist.data.sampling import BLOCK, Mixture, Sampling
from bpt_dist.data.tokens import TokenisedTask
from bpt_dist.errors import ConfigError

SIZES = (40, 90, 250)
KINDS = [
    Sampling("proportional"),
    Sampling("proportional", cap=60),
    Sampling("temperature", temperature=2.0),
    Sampling("stochastic"),
]


def expected(sampling: Sampling) -> np.ndarray:
    """The probabilities written out for SIZES."""
    weights = {
        ("proportional", 2**18): [40, 90, 250],
        ("proportional", 60): [40, 60, 60],
        ("temperature", 2**18): [40**0.5, 90**0.5, 250**0.5],
        ("stochastic", 2**18): [40, 90, 250],
    }[sampling.kind, sampling.cap]
    return np.array(weights) / sum(weights)


def task(name: str, num_rows: int) -> TokenisedTask:
    row = np.array([5, 6], dtype=np.int32)
    rows = tuple(f"train:{i + 1}" for i in range(num_rows))
    return TokenisedTask(name, (row,) * num_rows, (row,) * num_rows, rows, (), 0, 0)


TASKS = tuple(task(name, size) for name, size in zip("abc", SIZES, strict=True))


def counts(sampling: Sampling, num_steps: int, num_texts: int = 12) -> np.ndarray:
    mixture = Mixture(sampling, SIZES, num_texts, seed=3)
    return np.array([mixture.at(step)[1] for step in range(num_steps)])


@pytest.mark.parametrize("sampling", KINDS, ids=lambda sampling: f"{sampling.kind}-{sampling.cap}")
def test_tasks_come_as_often_as_the_closed_form_says(sampling: Sampling) -> None:
    drawn_counts = counts(sampling, 6000)
    assert set(drawn_counts.sum(axis=1)) == {12}  # the texts of a step are as many at every step
    share = drawn_counts.sum(axis=0) / drawn_counts.sum()
    # Steps are independent: the mean over them has a known standard error.
    error = drawn_counts.std(axis=0) / 12 / 6000**0.5
    assert (abs(share - expected(sampling)) < 4 * error).all()


@pytest.mark.parametrize("sampling", [*KINDS, Sampling()], ids=lambda sampling: f"{sampling.kind}-{sampling.cap}")
def test_the_share_of_a_task_is_the_expected_weight_of_its_texts(sampling: Sampling) -> None:
    batches = Batches(TASKS, 4, 1, task_weight=[1 / 3] * 3, sampling=sampling)
    weight = np.zeros(3)
    for step in range(3000):
        batch = batches.at(step)
        weight += np.bincount(batch.task_index.numpy(), batch.weight.numpy(), minlength=3)
    assert weight / 3000 == pytest.approx(sampling.shares(SIZES), abs=0.03)
    assert sum(sampling.shares(SIZES)) == pytest.approx(1)


@pytest.mark.parametrize("sampling", [*KINDS, Sampling()], ids=lambda sampling: f"{sampling.kind}-{sampling.cap}")
def test_a_stage_goes_on_behind_the_texts_of_its_preludes(sampling: Sampling) -> None:
    """Preludes of 5 and 2 steps take 4 rows of every task at every step; all stages together read each task's rows in order."""
    batches, read = Batches(TASKS, 4, 1, sampling=sampling), {task.name: list[str]() for task in TASKS}

    def take(drawn_counts: Batches, steps: int) -> None:
        for row in (row for step in range(steps) for row in drawn_counts.at(step).row_ids):
            read[row[0]].append(row)

    for steps in (5, 2):
        take(batches.of_all_tasks(), steps)
        batches = batches.after(steps)
    assert {name: len(rows) for name, rows in read.items()} == {"a": 28, "b": 28, "c": 28}
    take(batches, 20)
    for task in TASKS:
        alone = Batches([task], 1, 1)
        assert read[task.name] == [alone.at(step).row_ids[0] for step in range(len(read[task.name]))]
    assert sum(map(len, read.values())) == 3 * 28 + 20 * 12


def test_texts_of_a_proportional_step_are_drawn_one_by_one() -> None:
    """The number of texts of a task is binomial: no step is forced to its expectation."""
    drawn_counts, share = counts(Sampling("proportional"), 6000)[:, 1], expected(KINDS[0])[1]
    seen = [int((drawn_counts == n).sum()) for n in range(8)] + [int((drawn_counts >= 8).sum())]
    law = [6000 * stats.binom.pmf(n, 12, share) for n in range(8)] + [6000 * stats.binom.sf(7, 12, share)]
    assert stats.chisquare(seen, law).pvalue > 1e-3


def test_temperature_takes_one_task_a_step() -> None:
    assert set(np.sort(counts(KINDS[2], 500), axis=1).ravel().tolist()) == {0, 12}


def test_stochastic_steps_have_the_law_of_mpt() -> None:
    """Every outcome (texts of each task) against the sum over c in {2, 3}, c draws with replacement and who takes the rest."""
    share, law = expected(KINDS[3]), Counter[tuple[int, ...]]()
    for num_drawn in (2, 3):
        for drawn in product(range(3), repeat=num_drawn):
            for extra in range(num_drawn):
                texts = [0, 0, 0]
                for each in drawn:
                    texts[each] += 11 // num_drawn
                texts[drawn[extra]] += 11 % num_drawn
                law[tuple(texts)] += float(np.prod(share[list(drawn)])) / num_drawn / 2
    seen = Counter(map(tuple, counts(Sampling("stochastic"), 8000, num_texts=11).tolist()))
    assert set(seen) <= set(law)
    outcomes = [each for each in law if law[each] * 8000 >= 5]
    rest = 8000 - sum(seen[each] for each in outcomes)
    frequencies = [seen[each] for each in outcomes] + ([rest] if len(outcomes) < len(law) else [])
    chances = [8000 * law[each] for each in outcomes]
    chances += [8000 - sum(chances)] if len(outcomes) < len(law) else []
    assert stats.chisquare(frequencies, chances).pvalue > 1e-3


@pytest.mark.parametrize("sampling", KINDS, ids=lambda sampling: f"{sampling.kind}-{sampling.cap}")
def test_any_step_can_be_asked_for_alone(sampling: Sampling) -> None:
    forward = Batches(TASKS, batch_size=4, seed=1, sampling=sampling)
    for step in (0, 1, 2, BLOCK - 1, BLOCK, 3 * BLOCK + 5):
        rows = forward.at(step).row_ids
        assert Batches(TASKS, batch_size=4, seed=1, sampling=sampling).at(step).row_ids == rows
        assert len(rows) == 12
    assert forward.at(0).row_ids == Batches(TASKS, batch_size=4, seed=1, sampling=sampling).at(0).row_ids  # after later ones
    assert forward.at(1).row_ids != Batches(TASKS, batch_size=4, seed=2, sampling=sampling).at(1).row_ids


@pytest.mark.parametrize("sampling", KINDS, ids=lambda sampling: f"{sampling.kind}-{sampling.cap}")
def test_every_row_of_a_task_comes_once_an_epoch(sampling: Sampling) -> None:
    batches = Batches(TASKS, batch_size=4, seed=0, sampling=sampling)
    seen: dict[str, list[str]] = {each.name: [] for each in TASKS}
    for step in range(300):
        for row in batches.at(step).row_ids:
            seen[row.split("/")[0]].append(row)
    for each in TASKS:
        rows, size = seen[each.name], len(each.row_ids)
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert epochs
        assert all(len(set(epoch)) == size for epoch in epochs)


def test_the_objective_of_a_step_is_the_mean_over_its_texts() -> None:
    batch = Batches(TASKS, batch_size=4, seed=0, task_weight=[1 / 3] * 3, sampling=Sampling("proportional")).at(0)
    torch.testing.assert_close(batch.weight, torch.full((12,), 1 / 12))


def test_own_texts_of_particles_are_steps_of_their_own() -> None:
    batches = Batches(TASKS, batch_size=4, seed=0, num_particles=2, sampling=Sampling("proportional"))
    shared = Batches(TASKS, batch_size=4, seed=0, sampling=Sampling("proportional"))
    assert [batches.at(1, particle=m).row_ids for m in (0, 1)] == [shared.at(step).row_ids for step in (2, 3)]


def test_a_single_task_is_the_whole_mixture() -> None:
    for sampling in KINDS:
        assert Mixture(sampling, (7,), 5, seed=0).at(3)[1].tolist() == [5]


def test_the_draws_are_pinned_for_ever() -> None:
    """A change of these numbers breaks the resuming of every run with a mixture."""
    drawn_counts = {sampling.kind: Mixture(sampling, SIZES, 12, seed=0).at(BLOCK + 1)[0].tolist() for sampling in KINDS}
    assert drawn_counts == PINNED


PINNED = {"proportional": [3064, 4670, 4566], "temperature": [2568, 3660, 6072], "stochastic": [1270, 3020, 8010]}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"source": {"sampling": "proportional", "tasks_per_step": 1}}, r"source\.tasks_per_step: has no effect with sampling prop"),
    (
        {"source": {"sampling": "temperature", "likelihood_scale": "dataset"}},
        r"source\.likelihood_scale: dataset counts a task's rows",
    ),
    ({"source": {"sampling_cap": 5}}, r"source\.sampling_cap: has no effect with sampling all"),
    ({"source": {"sampling": "stochastic", "sampling_temperature": 2.0}}, r"source\.sampling_temperature: has no effect"),
    ({"target": {"sampling": "temperature"}}, r"target\.sampling: has no effect without target\.joint"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_settings_without_effect_are_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run.load(tmp_path, tiny_run.settings(tmp_path, {"name": "bpt"}, **sections))


def test_a_mixture_of_some_tasks_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="tasks_per_step is 2"):
        Batches(TASKS, batch_size=1, seed=0, tasks_per_step=2, sampling=Sampling("proportional"))
