"""Which rows of the published splits become train, validation and test.

The split rules (`SplitRule`) and their shuffles are those of ATTEMPT, MPT and DePT: `torch.randperm` seeded by
`split_seed`, so the halves hold the very rows behind the published tables. A task with groups (the questions of MultiRC)
is cut between groups under `protocol: fixed`, because a score over whole groups has no meaning for a part of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch

from bpt_dist.errors import DataError
from bpt_dist.tasks.spec import SplitKind, TaskSpec, column
from bpt_dist.tasks.text_to_text import Row

Split = Literal["train", "validation", "test"]
CARVED_ROWS = 1000


def shuffled(num_rows: int, seed: int) -> list[int]:
    """Return the permutation that ATTEMPT and its descendants split by."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()


def split_indices(
    kind: SplitKind, sizes: Mapping[str, int], split_seed: int, task: str, groups: Mapping[str, Sequence[str]] | None = None
) -> dict[Split, tuple[str, list[int]]]:
    """Return, for each split, the published split it is cut from and the indices of its rows, in order.

    `sizes` counts the rows of the published splits by their role: `halves` needs train and validation, `carve`
    train and test, `official` all three. `groups` holds the group of every row of a published split; rows of one group stay
    in one split. Raises DataError if a split would have no row.
    """
    train = list(range(sizes["train"]))
    groups = groups or {}
    if kind == "official":
        plan: dict[Split, tuple[str, list[int]]] = {
            "train": ("train", train),
            "validation": ("validation", list(range(sizes["validation"]))),
            "test": ("test", list(range(sizes["test"]))),
        }
    elif kind == "halves":
        first, second = _cut(sizes["validation"], sizes["validation"] // 2, split_seed, groups.get("validation"))
        plan = {"train": ("train", train), "validation": ("validation", first), "test": ("validation", second)}
    else:
        carved, rest = _cut(sizes["train"], min(CARVED_ROWS, sizes["train"] // 10), split_seed, groups.get("train"))
        plan = {"train": ("train", rest), "validation": ("train", carved), "test": ("test", list(range(sizes["test"])))}
    for split, (source, indices) in plan.items():
        if not indices:
            raise DataError(f"task {task!r}: the published {source} split ({sizes[source]} rows) leaves no {split} row")
    return plan


def _cut(num_rows: int, num_first: int, split_seed: int, groups: Sequence[str] | None) -> tuple[list[int], list[int]]:
    """Return a shuffle of the rows in two parts.

    The first part has `num_first` rows. With groups the groups are shuffled, each group stays whole, and the first part ends
    with the group that fills it.
    """
    if groups is None:
        order = shuffled(num_rows, split_seed)
        return order[:num_first], order[num_first:]
    first: list[int] = []
    second: list[int] = []
    for members in _shuffled_groups(range(num_rows), groups, split_seed):
        (first if len(first) < num_first else second).extend(members)
    return first, second


def _members(indices: Sequence[int], groups: Sequence[str]) -> list[list[int]]:
    """Return the indices of each group; groups are in the order of their first row."""
    members: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        members[groups[index]].append(index)
    return list(members.values())


def _shuffled_groups(indices: Sequence[int], groups: Sequence[str], split_seed: int) -> list[list[int]]:
    members = _members(indices, groups)
    return [members[i] for i in shuffled(len(members), split_seed)]


def capped(indices: list[int], cap: int | None, split_seed: int, groups: Sequence[str] | None = None) -> list[int]:
    """Return the first `cap` rows of the split's shuffle, as ATTEMPT does; rows a rule has shuffled keep their order.

    With groups, whole groups are taken while they fit into `cap` rows, at least one.
    """
    if cap is None or cap >= len(indices):
        return indices
    is_shuffled = any(here > there for here, there in pairwise(indices))
    if groups is None:
        return indices[:cap] if is_shuffled else [indices[i] for i in shuffled(len(indices), split_seed)[:cap]]
    kept: list[int] = []
    for members in _members(indices, groups) if is_shuffled else _shuffled_groups(indices, groups, split_seed):
        if kept and len(kept) + len(members) > cap:
            break
        kept += members
    return kept


def few_shot(spec: TaskSpec, rows: list[Row], shots: int, seed: int) -> list[Row]:
    """Return `shots` rows of every class that train has, or `shots` rows in all where there are no classes.

    Raises DataError if a class has fewer rows.
    """
    drawn = [rows[i] for i in shuffled(len(rows), seed)]
    by_class: dict[object, list[Row]] = defaultdict(list)
    for row in drawn:
        by_class[column(row, spec.target_column) if spec.kind == "classification" else None].append(row)
    for label, members in by_class.items():
        if len(members) < shots:
            which = "" if label is None else f" of label {label!r}"
            raise DataError(
                f"task {spec.name!r}: data.shots is {shots}, but train has {len(members)} rows{which}; lower data.shots"
            )
    few = {id(row) for members in by_class.values() for row in members[:shots]}
    return [row for row in drawn if id(row) in few]
