"""The published splits of a task, opened: JSONL files of a folder or data sets of the hub, without the rows a task leaves out.

Both kinds follow one rule: `TaskSpec.unlabelled_rows` and `TaskSpec.empty_texts` decide what happens to rows without a
label and to empty texts, and a split without any labelled row counts as missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bpt_dist.data import row_checks
from bpt_dist.distributed.hub import reach_hub
from bpt_dist.errors import DataError
from bpt_dist.tasks.spec import TaskSpec, column
from bpt_dist.tasks.text_to_text import ROW_ID, Row

HubParts = Mapping[tuple[str | None, str], Any]  # data sets of the hub by (configuration, split); None where the hub has none


class Part(Protocol):
    """One file or one split of one hub configuration."""

    @property
    def name(self) -> str:
        """Return what row ids begin with."""
        ...

    @property
    def dropped(self) -> Counter[str]:
        """Return how many rows are left out, by reason."""
        ...

    def __len__(self) -> int:
        """Return the number of rows that are used."""
        ...

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by their index among those used, each with its id."""
        ...

    def values(self, path: str) -> list[object]:
        """Return the values of a (dotted) column of all rows that are used."""
        ...


@dataclass(frozen=True)
class LocalPart:
    """The rows of a JSONL file."""

    name: str
    rows: list[Row]
    dropped: Counter[str]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by their index."""
        return [self.rows[i] for i in indices]

    def values(self, path: str) -> list[object]:
        """Return the values of a column."""
        return [column(row, path) for row in self.rows]


@dataclass(frozen=True)
class HubPart:
    """The rows of a data set of the hub; rows that are not taken never become Python objects."""

    name: str
    dataset: Any
    lines: Sequence[int]  # of the rows that are used, from 0
    dropped: Counter[str]

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by their index among those used."""
        lines = [self.lines[i] for i in indices]
        rows = self.dataset.select(lines).to_list()
        return [{**row, ROW_ID: f"{self.name}:{line + 1}"} for line, row in zip(lines, rows, strict=True)]

    def values(self, path: str) -> list[object]:
        """Return the values of a column."""
        top = path.split(".", maxsplit=1)[0]
        if top not in self.dataset.column_names:
            return [None] * len(self)
        cells = self.dataset[top][:]
        return [column({top: cells[line]}, path) for line in self.lines]


@dataclass(frozen=True)
class Published:
    """The rows of one published split: one part a file or hub configuration, in order."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Return rows by their index in the concatenated parts, in the order of `indices`."""
        places = [(number, i) for number, part in enumerate(self.parts) for i in range(len(part))]
        rows: dict[int, Row] = {}
        for number, part in enumerate(self.parts):
            wanted = [index for index in indices if places[index][0] == number]
            rows |= zip(wanted, part.take([places[index][1] for index in wanted]), strict=True)
        return [rows[index] for index in indices]

    def groups(self, path: str) -> list[str]:
        """Return the group of every row as text."""
        return [str(value) for part in self.parts for value in part.values(path)]


def local_folders(spec: TaskSpec, root: Path | None) -> dict[str, Path]:
    """Return the folders a task is read from, by the prefix of their row ids (empty unless there are several)."""
    if spec.folder is not None:
        return {"": spec.folder}
    assert root is not None
    assert spec.local_name is not None
    several = len(spec.hub_configs) > 1
    folder = Path(root) / spec.local_name
    return {f"{name}/" if several else "": folder / (name or "default") for name in spec.hub_configs}


class LocalFiles:
    """The JSONL files of a task. `read` checks every row; what is wrong is added to `problems`."""

    def __init__(self, spec: TaskSpec, root: Path | None, problems: row_checks.Problems) -> None:
        self.spec, self.problems = spec, problems
        self.folders = local_folders(spec, root)
        for folder in self.folders.values():
            if not folder.is_dir():
                raise DataError(how_to_get(spec, folder))

    def has(self, name: str) -> bool:
        """Return whether every folder has the file of that split."""
        return all((folder / self.label(name)).is_file() for folder in self.folders.values())

    def read(self, names: Sequence[str]) -> Published:
        """Return the rows of the named splits, concatenated folder by folder."""
        parts = []
        for prefix, folder in self.folders.items():
            for name in names:
                numbered, dropped = row_checks.read_jsonl(folder / self.label(name), self.spec, self.problems)
                rows = [{**row, ROW_ID: f"{prefix}{name}:{line}"} for line, row in numbered]
                parts.append(LocalPart(f"{prefix}{name}", rows, dropped))
        return Published(tuple(parts))

    def label(self, name: str) -> str:
        """Return what a message calls the split."""
        return f"{name}.jsonl"

    def where(self) -> str:
        """Return what a message calls the place of the splits."""
        return " and ".join(map(str, self.folders.values()))


class HubSplits:
    """The data sets of a task on the hub, opened by `open_hub`."""

    def __init__(self, spec: TaskSpec, opened: HubParts) -> None:
        self.spec, self.opened = spec, opened

    def has(self, name: str) -> bool:
        """Return whether every configuration has the split."""
        return all(self.opened.get((config, name)) is not None for config in self.spec.hub_configs)

    def read(self, names: Sequence[str]) -> Published:
        """Return the rows of the named splits, concatenated configuration by configuration."""
        several = len(self.spec.hub_configs) > 1
        parts = []
        for config in self.spec.hub_configs:
            for name in names:
                dataset = self.opened[config, name]
                lines, dropped = _used_lines(self.spec, dataset)
                parts.append(HubPart(f"{config}/{name}" if several else name, dataset, lines, dropped))
        return Published(tuple(parts))

    def label(self, name: str) -> str:
        """Return what a message calls the split."""
        return f"{name} split"

    def where(self) -> str:
        """Return what a message calls the place of the splits."""
        return str(self.spec.hub_name)


def _used_lines(spec: TaskSpec, dataset: Any) -> tuple[Sequence[int], Counter[str]]:
    """Return the rows of a data set that are used, from 0, and how many are left out by reason."""
    every = range(len(dataset))
    paths = [spec.target_column] if spec.unlabelled_rows == "drop" else []
    paths += [field.column for field in spec.fields] if spec.empty_texts == "drop" else []
    columns = {top for path in paths if (top := path.split(".")[0]) in dataset.column_names}
    if not paths:
        return every, Counter()
    cells = {name: dataset[name][:] for name in columns}
    reasons = [row_checks.left_out(spec, {name: cells[name][line] for name in columns}) for line in every]
    dropped = Counter(reason for reason in reasons if reason is not None)
    return ([line for line in every if reasons[line] is None] if dropped else every), dropped


def open_hub(spec: TaskSpec, names: Sequence[str], cache: Path | None) -> dict[tuple[str | None, str], Any]:
    """Return data sets of the hub by (configuration, split), None where a configuration has no such split.

    Raises DataError with what to download when the hub cannot be reached or has no such data set.
    """
    import datasets  # one second of import that local folders do not need

    assert spec.hub_name is not None
    if not Path(spec.hub_name).is_dir():
        reach_hub()
    opened: dict[tuple[str | None, str], Any] = {}
    for config in spec.hub_configs:
        for name in names:
            try:
                opened[config, name] = datasets.load_dataset(
                    spec.hub_name, config, split=name, cache_dir=None if cache is None else str(cache)
                )
            except Exception as error:  # of datasets, of the hub's client, of the client's transport
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if not (isinstance(error, ValueError) and reason.startswith("Unknown split")):
                    raise DataError(f"{how_to_get(spec, None)} (the hub said: {reason})") from error
                opened[config, name] = None
    return opened


def how_to_get(spec: TaskSpec, folder: Path | None) -> str:
    """Return the remedy for missing data: what to download, where it goes, and what a local copy looks like."""
    if spec.hub_name is None:
        return f"task {spec.name!r} reads train.jsonl and validation.jsonl (and test.jsonl if there is one) in {folder}"
    names = " and ".join(f"{spec.local_name}/{config or 'default'}" for config in spec.hub_configs)
    missing = f"no folder {folder}" if folder else f"could not load {spec.hub_name} from the hub"
    return (
        f"task {spec.name!r}: {missing}. With a network, leave data.root empty: huggingface.co/datasets/{spec.hub_name} "
        f"is downloaded to data.cache. Without one, set data.root to a folder holding {names}, each with train.jsonl "
        f"and validation.jsonl: one JSON object a line, the hub's columns (Dataset.to_json writes this form)"
    )
