"""Splits have the published sizes and shuffles; groups are never cut under the fixed protocol."""

from __future__ import annotations

import pytest
import torch

from bpt_dist.data.splits import capped, split_indices
from bpt_dist.errors import DataError
from bpt_dist.tasks.catalogue import TASKS

# Sizes of the published train and validation splits, and of the splits DePT reports to have made of them.
PUBLISHED = (
    ("cola", 8_551, 1_043, (8_551, 521, 522)),
    ("rte", 2_490, 277, (2_490, 138, 139)),
    ("mrpc", 3_668, 408, (3_668, 204, 204)),
    ("stsb", 5_749, 1_500, (5_749, 750, 750)),
    ("boolq", 9_427, 3_270, (9_427, 1_635, 1_635)),
    ("wic", 5_428, 638, (5_428, 319, 319)),
    ("wsc", 554, 104, (554, 52, 52)),
    ("cb", 250, 56, (250, 28, 28)),
    ("multirc", 27_243, 4_848, (27_243, 2_424, 2_424)),
    ("sst2", 67_349, 872, (66_349, 1_000, 872)),
    ("qnli", 104_743, 5_463, (103_743, 1_000, 5_463)),
    ("qqp", 363_846, 40_430, (362_846, 1_000, 40_430)),
)


@pytest.mark.parametrize(("task", "train", "validation", "sizes"), PUBLISHED)
def test_split_sizes_are_the_published_ones(task: str, train: int, validation: int, sizes: tuple[int, int, int]) -> None:
    rule = TASKS[task].splits
    published = {"train": train, "validation": validation, "test": validation}
    plan = split_indices(rule.kind, published, 42, task)
    assert tuple(len(indices) for _, indices in plan.values()) == sizes


def test_mnli_validates_on_mismatched_and_tests_on_matched() -> None:
    rule = TASKS["mnli"].splits
    assert (rule.kind, rule.validation, rule.test) == ("official", ("validation_mismatched",), ("validation_matched",))
    sizes = {"train": 392_702, "validation": 9_832, "test": 9_815}
    plan = split_indices(rule.kind, sizes, 42, "mnli")
    assert {split: len(indices) for split, (_, indices) in plan.items()} == sizes


def test_halves_are_disjoint_cover_the_split_and_use_the_published_shuffle() -> None:
    plan = split_indices("halves", {"train": 10, "validation": 277}, 42, "rte")
    validation, test = plan["validation"][1], plan["test"][1]
    order = torch.randperm(277, generator=torch.Generator().manual_seed(42)).tolist()
    assert validation + test == order
    assert sorted(order) == list(range(277))


def test_carved_rows_leave_train() -> None:
    plan = split_indices("carve", {"train": 20_000, "test": 5}, 42, "qnli")
    assert (plan["validation"][0], plan["test"]) == ("train", ("test", [0, 1, 2, 3, 4]))
    assert sorted(plan["train"][1] + plan["validation"][1]) == list(range(20_000))


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"task 'x': the published train split \(5 rows\) leaves no validation row"):
        split_indices("carve", {"train": 5, "test": 5}, 42, "x")


GROUPS = [f"question {i // 5}" for i in range(50)]


def whole(indices: list[int], groups: list[str]) -> bool:
    """Return whether every group that has a row here has all of its rows here, one after the other."""
    names = list(dict.fromkeys(groups[i] for i in indices))
    return indices == [i for name in names for i, group in enumerate(groups) if group == name]


@pytest.mark.parametrize(("kind", "cut"), [("halves", "validation"), ("carve", "train")])
@pytest.mark.parametrize("seed", [0, 42])
def test_groups_stay_whole_in_halves_and_in_carved_rows(kind: str, cut: str, seed: int) -> None:
    plan = split_indices(kind, {"train": 50, "validation": 50, "test": 3}, seed, "x", {cut: GROUPS})  # type: ignore[arg-type]
    parts = [indices for source, indices in plan.values() if source == cut]
    assert len(parts) == 2
    assert all(whole(part, GROUPS) for part in parts)
    assert sorted(index for part in parts for index in part) == list(range(50))
    assert [len(part) for part in parts] == ([25, 25] if kind == "halves" else [45, 5])


def test_interleaved_and_uneven_groups_stay_whole() -> None:
    groups = ["a", "b", "a", "c", "b", "a", "a", "d"]
    plan = split_indices("halves", {"train": 1, "validation": 8}, 3, "x", {"validation": groups})
    first, second = plan["validation"][1], plan["test"][1]
    assert whole(first, groups)
    assert whole(second, groups)
    assert sorted(first + second) == list(range(8))


def test_without_groups_the_cut_is_inside_of_them() -> None:
    """What the published code does, and `protocol: attempt` keeps."""
    plan = split_indices("halves", {"train": 1, "validation": 50}, 42, "x")
    assert not whole(plan["validation"][1], GROUPS)


def test_one_group_alone_cannot_be_halved() -> None:
    with pytest.raises(DataError, match="leaves no test row"):
        split_indices("halves", {"train": 1, "validation": 4}, 0, "x", {"validation": ["a"] * 4})


@pytest.mark.parametrize(("cap", "num_kept"), [(1, 5), (5, 5), (12, 10), (49, 45), (50, 50), (None, 50)])
def test_a_cap_takes_whole_groups(cap: int | None, num_kept: int) -> None:
    for indices in (list(range(50)), list(reversed(range(50)))):
        kept = capped(indices, cap, 42, GROUPS)
        assert len(kept) == num_kept
        assert {i for i in indices if GROUPS[i] in {GROUPS[k] for k in kept}} == set(kept)
