"""Rows of a task, split into train, validation and test: from the hub or from local JSONL, checked before use.

Where the data lack a split the rule names, or none of its rows has a label, the rule becomes `carve` with the validation
split as the test, and a note records it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from bpt_dist.data import row_checks
from bpt_dist.data.published import HubParts, HubSplits, LocalFiles, Published, local_folders, open_hub
from bpt_dist.data.splits import CARVED_ROWS, capped, few_shot, split_indices
from bpt_dist.errors import DataError
from bpt_dist.tasks.spec import SplitRule, TaskSpec
from bpt_dist.tasks.text_to_text import ROW_ID, Row

log = logging.getLogger(__name__)


@runtime_checkable
class DataOptions(Protocol):
    """The part of the configuration that decides which rows are read."""

    root: Path | None
    cache: Path | None
    protocol: Literal["fixed", "attempt"]
    max_train_rows: int | None
    max_eval_rows: int | None
    shots: int | None
    split_seed: int


class Splits(dict[str, list[Row]]):
    """Rows by split; `notes` are the sentences a report must repeat, because the data were not used as they are."""

    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where the rows of a task come from, before any is read; other rows have another `fingerprint` ("" where it is unknown)."""

    fingerprint: str
    num_bytes: int
    hub: HubParts | None = None


def origin_of(spec: TaskSpec, data: DataOptions) -> Origin:
    """Return where the rows of a task come from; opens data sets of the hub. Raises DataError when the hub has none."""
    if spec.folder is None and data.root is None:
        return _hub_origin(spec, data.cache)
    # All files a split rule may look at: which of them are there decides how splits are made.
    names = dict.fromkeys(("train", "validation", *spec.splits.train, *spec.splits.validation, *spec.splits.test))
    facts, num_bytes = [], 0
    for prefix, folder in local_folders(spec, data.root).items():
        for path in (folder / f"{name}.jsonl" for name in names):
            try:
                with path.open("rb") as file:
                    facts.append(f"{prefix}{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
                    num_bytes += file.tell()
            except FileNotFoundError:
                continue
            except OSError:  # `load` reports it
                return Origin("", 0)
    return Origin(_sha256("\n".join(facts)) if facts else "", num_bytes)


def _hub_origin(spec: TaskSpec, cache: Path | None) -> Origin:
    names = dict.fromkeys(name for names in _needed(spec.splits).values() for name in names)
    opened = open_hub(spec, tuple(names), cache)
    if None in opened.values() and "validation" not in names:
        opened |= open_hub(spec, ("validation",), cache)
    parts = {key: part for key, part in opened.items() if part is not None}
    facts = [f"{config} {name} {part._fingerprint} {len(part)}" for (config, name), part in parts.items()]
    num_bytes = sum(part.data.nbytes for part in parts.values())
    return Origin(_sha256("\n".join([f"datasets {version('datasets')}", *facts])), num_bytes, opened)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load(spec: TaskSpec, data: DataOptions, *, seed: int = 0, origin: Origin | None = None) -> Splits:
    """Return the checked rows of train, validation and test, each with a stable id in `_row_id`.

    `seed` draws the `shots` training rows; an `origin` that is open already is not opened again. Raises DataError naming the
    first ten bad rows as file:line: field, or what to download and where to put it.
    """
    problems = row_checks.Problems()
    if spec.folder is not None or data.root is not None:
        place: LocalFiles | HubSplits = LocalFiles(spec, data.root, problems)
    else:
        opened = origin.hub if origin is not None and origin.hub is not None else _hub_origin(spec, data.cache).hub
        assert opened is not None
        place = HubSplits(spec, opened)
    published, rule, notes = _published_splits(spec, place, problems)
    sizes = {role: len(rows) for role, rows in published.items()}
    # The published code cuts between rows, so only `fixed` keeps the rows of a group together.
    by_group = spec.group_column is not None and data.protocol == "fixed"
    groups = {role: rows.groups(spec.group_column or "") for role, rows in published.items()} if by_group else {}
    splits = Splits()
    for split, (role, indices) in split_indices(rule.kind, sizes, data.split_seed, spec.name, groups).items():
        if split == "train":
            taken = capped(indices, data.max_train_rows, data.split_seed)
        else:
            taken = capped(indices, data.max_eval_rows, data.split_seed, groups.get(role))
        splits[split] = published[role].take(taken)
    if data.shots is not None:
        splits["train"] = few_shot(spec, splits["train"], data.shots, seed)
    if isinstance(place, HubSplits):
        _check_hub(spec, splits, problems)
    notes += [*_left_out_notes(published.values()), *_empty_notes(spec, splits)]
    splits.notes = tuple(f"task {spec.name!r}: {note}" for note in notes)
    for note in splits.notes:
        log.warning("%s", note)
    return splits


def _needed(rule: SplitRule) -> dict[str, tuple[str, ...]]:
    """Return which published splits a rule reads, by their role in it."""
    if rule.kind == "halves":
        return {"train": rule.train, "validation": rule.validation}
    if rule.kind == "carve":
        return {"train": rule.train, "test": rule.test}
    return {"train": rule.train, "validation": rule.validation, "test": rule.test}


def _published_splits(
    spec: TaskSpec, place: LocalFiles | HubSplits, problems: row_checks.Problems
) -> tuple[dict[str, Published], SplitRule, list[str]]:
    """Return the rows behind train, validation and test, the rule that applies, and notes where it differs from the task's."""
    rule, notes = spec.splits, []

    def there(names: Iterable[str]) -> bool:
        return all(map(place.has, names))

    needed = _needed(rule)
    if not there(rule.train) and there(("train",)):
        needed["train"] = ("train",)
        notes.append(f"{place.label('train')} is used in place of {' + '.join(rule.train)}")
    missing = [f"no {place.label(name)}" for names in needed.values() for name in names if not place.has(name)]
    if missing and not there(("train", "validation")):
        raise DataError(f"task {spec.name!r}: {' and '.join(missing)} in {place.where()}; add what is missing")
    published = {} if missing else {role: place.read(names) for role, names in needed.items()}
    problems.raise_any(spec.name)
    missing += [
        f"no row of {' and '.join(map(place.label, needed[role]))} has a label"
        for role, rows in published.items()
        if role != "train" and not len(rows)
    ]
    if missing:
        if not there(("validation",)) or not len(published.get("validation", (None,))):
            raise DataError(f"task {spec.name!r}: {' and '.join(missing)}; fix the column {spec.target_column!r} of the task")
        notes.append(
            f"{', '.join(missing)}: a tenth of train (at most {CARVED_ROWS:,} rows) is the validation split "
            f"and {place.label('validation')} is the test"
        )
        rule = replace(rule, kind="carve")
        published = {
            "train": published["train"] if published else place.read(needed["train"]),
            "test": published.get("validation") or place.read(("validation",)),
        }
        problems.raise_any(spec.name)
    empty = [role for role, rows in published.items() if not len(rows)]
    if empty:
        raise DataError(
            f"task {spec.name!r}: no row of {' and '.join(empty)} has a label in column {spec.target_column!r} "
            f"({place.where()}); name the column of the labels in the task"
        )
    return published, rule, notes


def _left_out_notes(published: Iterable[Published]) -> list[str]:
    """Return one sentence for each reason why rows were left out."""
    by_reason: dict[str, list[str]] = {}
    total: Counter[str] = Counter()
    for part in (part for rows in published for part in rows.parts):
        for reason, count in part.dropped.items():
            total[reason] += count
            by_reason.setdefault(reason, []).append(f"{count:,} of {part.name}")
    return [f"left out {total[reason]:,} rows {reason} ({', '.join(places)})" for reason, places in by_reason.items()]


def _empty_notes(spec: TaskSpec, splits: Mapping[str, list[Row]]) -> list[str]:
    num_empty = sum(len(row_checks.empty_fields(spec, row)) for rows in splits.values() for row in rows)
    return [f"{num_empty} empty text fields in the published data were kept"] if num_empty else []


def _check_hub(spec: TaskSpec, splits: Splits, problems: row_checks.Problems) -> None:
    """Raise DataError on unusable rows of the hub."""
    for rows in splits.values():
        for row in rows:
            problems.add_row(spec, row, f"{spec.hub_name}:{row[ROW_ID]}")
    problems.raise_any(spec.name)
