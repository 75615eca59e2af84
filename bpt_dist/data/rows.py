"""Rows of a task, split into train, validation and test: from the hub or from local JSONL, checked before use.

The split rules (`SplitRule`) and their shuffles are those of ATTEMPT, MPT and DePT: `torch.randperm` seeded by
`split_seed`, so the halves hold the very rows behind the published tables. Where local data lack a split the rule
names, the rule becomes `carve` with the local validation file as the test, and a note says so.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from bpt_dist.data import checks
from bpt_dist.data.spec import SplitKind, SplitRule, TaskSpec, column
from bpt_dist.data.text_to_text import ROW_ID, Row
from bpt_dist.errors import DataError

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
_Parts = list[tuple[str, Any]]  # data sets that stand one after the other, each with the name its row ids begin with
CARVED_ROWS = 1000


@runtime_checkable
class DataOptions(Protocol):
    """The part of the configuration that decides which rows are read."""

    root: Path | None
    cache: Path | None
    max_train_rows: int | None
    max_eval_rows: int | None
    shots: int | None
    split_seed: int


class Splits(dict[str, list[Row]]):
    """Rows by split; `notes` are the sentences a report must repeat, because a default was not possible."""

    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where the rows of a task come from, before any is read; other rows have another `fingerprint` ("" where it is unknown)."""

    fingerprint: str
    num_bytes: int
    hub: Mapping[str, _Parts] | None = None  # opened data sets of the hub, by their role in the split rule


@dataclass(frozen=True)
class _Published:
    """The rows of one published split: how many there are, and a way to take some of them."""

    num_rows: int
    take: Callable[[Sequence[int]], list[Row]]


def origin_of(spec: TaskSpec, data: DataOptions) -> Origin:
    """Return where the rows of a task come from; opens data sets of the hub. Raises DataError when the hub has none."""
    if spec.folder is None and data.root is None:
        parts = _open_hub(spec, data.cache)
        facts = [f"{role} {name} {part._fingerprint} {len(part)}" for role, each in parts.items() for name, part in each]
        num_bytes = sum(part.data.nbytes for each in parts.values() for _, part in each)
        return Origin(_sha256("\n".join([f"datasets {version('datasets')}", *facts])), num_bytes, parts)
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
            except OSError:  # `load` says what is wrong
                return Origin("", 0)
    return Origin(_sha256("\n".join(facts)) if facts else "", num_bytes)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load(spec: TaskSpec, data: DataOptions, *, seed: int = 0, origin: Origin | None = None) -> Splits:
    """Return the checked rows of train, validation and test, each with a stable id in `_row_id`.

    `seed` draws the `shots` training rows; an `origin` that is open already is not opened again. Raises DataError naming the
    first ten bad rows as file:line: field, or what to download and where to put it.
    """
    local = spec.folder is not None or data.root is not None
    problems = checks.Problems()
    if local:
        published, rule, notes = _open_local(spec, data.root, problems)
        problems.raise_any(spec.name)
    else:
        parts = _open_hub(spec, data.cache) if origin is None or origin.hub is None else origin.hub
        published, rule, notes = {role: _published(each) for role, each in parts.items()}, spec.splits, []
    splits = Splits()
    sizes = {name: published[name].num_rows for name in published}
    for split, (source, indices) in split_indices(rule.kind, sizes, data.split_seed, spec.name).items():
        cap = data.max_train_rows if split == "train" else data.max_eval_rows
        splits[split] = published[source].take(_capped(indices, cap, data.split_seed))
    if data.shots is not None:
        splits["train"] = _few(spec, splits["train"], data.shots, seed)
    if not local:
        _check_hub(spec, splits, problems, notes)
    splits.notes = tuple(f"task {spec.name!r}: {note}" for note in notes)
    for note in splits.notes:
        log.warning("%s", note)
    return splits


def shuffled(num_rows: int, seed: int) -> list[int]:
    """Return the permutation that ATTEMPT and its descendants split by."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()


def split_indices(kind: SplitKind, sizes: dict[str, int], split_seed: int, task: str) -> dict[Split, tuple[str, list[int]]]:
    """Return, for each split, the published split it is cut from and which of its rows it takes, in order.

    `sizes` counts the rows of the published splits by their role: `halves` needs train and validation, `carve`
    train and test, `official` all three.
    """
    train = list(range(sizes["train"]))
    if kind == "official":
        plan: dict[Split, tuple[str, list[int]]] = {
            "train": ("train", train),
            "validation": ("validation", list(range(sizes["validation"]))),
            "test": ("test", list(range(sizes["test"]))),
        }
    elif kind == "halves":
        order = shuffled(sizes["validation"], split_seed)
        half = len(order) // 2
        plan = {"train": ("train", train), "validation": ("validation", order[:half]), "test": ("validation", order[half:])}
    else:
        order = shuffled(sizes["train"], split_seed)
        carved = min(CARVED_ROWS, len(order) // 10)
        test = list(range(sizes["test"]))
        plan = {"train": ("train", order[carved:]), "validation": ("train", order[:carved]), "test": ("test", test)}
    for split, (source, indices) in plan.items():
        if not indices:
            raise DataError(f"task {task!r}: the published {source} split ({sizes[source]} rows) leaves no {split} row")
    return plan


def _capped(indices: list[int], cap: int | None, split_seed: int) -> list[int]:
    """Return the first `cap` rows of the split's shuffle, as ATTEMPT does; rows a rule has shuffled keep their order."""
    if cap is None or cap >= len(indices):
        return indices
    is_shuffled = any(here > there for here, there in pairwise(indices))
    return indices[:cap] if is_shuffled else [indices[i] for i in shuffled(len(indices), split_seed)[:cap]]


def _few(spec: TaskSpec, rows: list[Row], shots: int, seed: int) -> list[Row]:
    """Return `shots` rows of every class that train has, or `shots` rows in all where there are no classes."""
    drawn = [rows[i] for i in shuffled(len(rows), seed)]
    by_class: dict[object, list[Row]] = defaultdict(list)
    for row in drawn:
        by_class[column(row, spec.target_column) if spec.kind == "classification" else None].append(row)
    for label, members in by_class.items():
        if len(members) < shots:
            which = "" if label is None else f" of label {label!r}"
            raise DataError(f"task {spec.name!r}: data.shots is {shots}, but train has {len(members)} rows{which}")
    few = {id(row) for members in by_class.values() for row in members[:shots]}
    return [row for row in drawn if id(row) in few]


def _open_local(spec: TaskSpec, root: Path | None, problems: checks.Problems) -> tuple[dict[str, _Published], SplitRule, list[str]]:
    folders = local_folders(spec, root)
    for folder in folders.values():
        if not folder.is_dir():
            raise DataError(_how_to_get(spec, folder))
    wanted, rule, notes = _local_splits(spec, folders)
    published = {}
    for role, names in wanted.items():
        rows: list[Row] = []
        for prefix, folder in folders.items():
            for name in names:
                found = checks.read_jsonl(folder / f"{name}.jsonl", spec, problems)
                rows += [{**row, ROW_ID: f"{prefix}{name}:{line}"} for line, row in enumerate(found, 1)]
        published[role] = _Published(len(rows), partial(_pick, rows))
    return published, rule, notes


def _pick(rows: list[Row], indices: Sequence[int]) -> list[Row]:
    return [rows[i] for i in indices]


def local_folders(spec: TaskSpec, root: Path | None) -> dict[str, Path]:
    """Return the folders a task is read from, by the prefix of their row ids (empty unless there are several)."""
    if spec.folder is not None:
        return {"": spec.folder}
    assert root is not None
    assert spec.local_name is not None
    several = len(spec.hub_configs) > 1
    folder = Path(root) / spec.local_name
    return {f"{name}/" if several else "": folder / (name or "default") for name in spec.hub_configs}


def _local_splits(spec: TaskSpec, folders: dict[str, Path]) -> tuple[dict[str, tuple[str, ...]], SplitRule, list[str]]:
    """Return the file names behind train, validation and test, the rule that applies, and notes where it had to give."""
    rule, notes = spec.splits, []

    def there(names: tuple[str, ...]) -> bool:
        return all((folder / f"{name}.jsonl").is_file() for folder in folders.values() for name in names)

    needed = _needed(rule)
    if not there(rule.train) and there(("train",)):
        needed["train"] = ("train",)
        notes.append(f"train.jsonl stands for {' + '.join(rule.train)}")
    missing = [f"{name}.jsonl" for names in needed.values() for name in names if not there((name,))]
    if not missing:
        return needed, rule, notes
    if not there(("train", "validation")):
        raise DataError(f"task {spec.name!r}: no {' and '.join(missing)} in {' and '.join(map(str, folders.values()))}")
    notes.append(
        f"no {', '.join(missing)}: a tenth of train (at most {CARVED_ROWS:,} rows) is the validation split "
        f"and validation.jsonl is the test"
    )
    return {"train": needed["train"], "test": ("validation",)}, replace(rule, kind="carve"), notes


def _needed(rule: SplitRule) -> dict[str, tuple[str, ...]]:
    """Return which published splits a rule reads, by the role they play in it."""
    if rule.kind == "halves":
        return {"train": rule.train, "validation": rule.validation}
    if rule.kind == "carve":
        return {"train": rule.train, "test": rule.test}
    return {"train": rule.train, "validation": rule.validation, "test": rule.test}


def _published(parts: _Parts) -> _Published:
    return _Published(sum(len(part) for _, part in parts), partial(_take, parts))


def _open_hub(spec: TaskSpec, cache: Path | None) -> dict[str, _Parts]:
    import datasets  # one second of import that local folders do not need

    assert spec.hub_name is not None
    opened: dict[str, _Parts] = {}
    try:
        for role, names in _needed(spec.splits).items():
            opened[role] = [
                (f"{config}/{name}" if len(spec.hub_configs) > 1 else name,
                 datasets.load_dataset(spec.hub_name, config, split=name, cache_dir=None if cache is None else str(cache)))
                for config in spec.hub_configs for name in names
            ]  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{_how_to_get(spec, None)} (the hub said: {reason})") from error
    return opened


def _take(parts: _Parts, indices: Sequence[int]) -> list[Row]:
    """Return rows of the concatenated parts without turning the others into Python objects."""
    import datasets

    ids = [f"{name}:{line + 1}" for name, part in parts for line in range(len(part))]
    rows = datasets.concatenate_datasets([part for _, part in parts]).select(indices).to_list()
    return [{**row, ROW_ID: ids[i]} for i, row in zip(indices, rows, strict=True)]


def _check_hub(spec: TaskSpec, splits: Splits, problems: checks.Problems, notes: list[str]) -> None:
    """Raise on unusable rows of the hub; empty texts are only noted, because a user cannot mend published data."""
    num_empty = 0
    for rows in splits.values():
        for row in rows:
            for what in checks.row_problems(spec, row):
                if what.endswith("is empty"):
                    num_empty += 1
                else:
                    problems.add(f"{spec.hub_name}:{row[ROW_ID]}", what)
    problems.raise_any(spec.name)
    if num_empty:
        notes.append(f"{num_empty} empty text fields in the published data were kept")


def _how_to_get(spec: TaskSpec, folder: Path | None) -> str:
    """Return the remedy for missing data: what to download, where it goes, and what a local copy looks like."""
    if spec.hub_name is None:
        return f"task {spec.name!r} reads train.jsonl and validation.jsonl (and test.jsonl if there is one) in {folder}"
    names = " and ".join(f"{spec.local_name}/{config or 'default'}" for config in spec.hub_configs)
    found = f"no folder {folder}" if folder else f"could not load {spec.hub_name} from the hub"
    return (
        f"task {spec.name!r}: {found}. With a network, leave data.root empty: huggingface.co/datasets/{spec.hub_name} "
        f"is downloaded to data.cache. Without one, set data.root to a folder holding {names}, each with train.jsonl "
        f"and validation.jsonl: one JSON object a line, the hub's columns (Dataset.to_json writes this form)"
    )
