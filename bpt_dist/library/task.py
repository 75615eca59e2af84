"""A task from rows in memory: checked at once, and written as the files that every training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpt_dist.errors import ConfigError
from bpt_dist.storage.files import write_atomic
from bpt_dist.tasks.user_tasks import task_of

FOLDER = "tasks"  # below `output`, beside the runs
DIGEST = 12
HEADLINES = {"label": "accuracy", "target": "accuracy", "score": "pearson"}


class Task:
    """A text-to-text task whose rows are in memory.

        Task("tickets", train=rows, validation=more, fields=["subject", "body"], label="queue",
             label_words={"b": "billing", "t": "technical"})

    Rows are mappings from column to value: a list of dictionaries, a `datasets.Dataset`, `frame.to_dict("records")`. `settings` are
    the keys of a task file: `fields`; `label` with `label_words` or `score`, or `target`; `metrics` (accuracy, or pearson of
    scores, if left out), `id`, `group`, `max_source_length` and the others. Without `test`, the rows of `validation` are the test
    and a part of `train` is held back for validation.

    Raises ConfigError for settings that describe no task, and DataError that names each bad row as `train[3]: field 'body' is
    missing`.
    """

    def __init__(
        self,
        name: str,
        train: Iterable[Mapping[str, Any]],
        validation: Iterable[Mapping[str, Any]],
        test: Iterable[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.settings = _plain({"metrics": _headline(settings), **settings})
        if unwanted := [key for key in ("folder", "hub", "config") if key in settings]:
            raise ConfigError(f"task {name!r}.{unwanted[0]}: says where rows are, and these are in memory; remove it")
        spec = task_of(name, self.settings, Path(name if isinstance(name, str) and name else "task"))
        from bpt_dist.data.row_checks import Problems, left_out, parse_line

        problems = Problems()
        self.lines: dict[str, list[bytes]] = {}
        for split, rows in (("train", train), ("validation", validation), ("test", test)):
            if rows is None:
                continue
            lines = self.lines[split] = []
            for number, given in enumerate(rows):
                place = f"{split}[{number}]"
                try:
                    lines.append(_line(given))
                    row = parse_line(lines[-1])
                except ValueError as error:
                    problems.add(place, str(error))
                    continue
                if left_out(spec, row) is None:
                    problems.add_row(spec, row, place)
            if not lines:
                problems.add(split, "there are no rows")
        problems.raise_any(name)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(lines):,} {split}" for split, lines in self.lines.items())
        return f"<Task {self.name!r}: {sizes} rows>"

    @property
    def digest(self) -> str:
        """Return a hash over rows and settings: the same task is written to the same place."""
        whole = hashlib.sha256(self._entry().encode())
        for split, lines in self.lines.items():
            whole.update(f"\n{split}\n".encode())
            whole.update(b"".join(lines))
        return whole.hexdigest()[:DIGEST]

    def write(self, folder: Path) -> Path:
        """Write rows and task file below `folder`, unless they are there, and return the task file for `data.task_files`."""
        place = folder / f"{self.name}-{self.digest}"
        file = place / "tasks.yaml"
        if not file.is_file():  # it is written last
            for split, lines in self.lines.items():
                write_atomic(place / self.name / f"{split}.jsonl", b"".join(lines))
            write_atomic(file, self._entry().encode())
        return file

    def _entry(self) -> str:
        return _yaml({self.name: {"folder": self.name, **self.settings}})


def write_tasks(tasks: Sequence[Task], output: Path) -> list[str]:
    """Write tasks beside the runs in `output` and return their task files."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tasks: two of them are named {name!r}; give each a name of its own")
    return [str(task.write(output / FOLDER)) for task in tasks]


def _headline(settings: Mapping[str, Any]) -> list[str]:
    kind = "score" if "score" in settings else "target" if "target" in settings else "label"
    return [HEADLINES[kind]]


def _plain(value: Any) -> Any:
    """Return a value as YAML would give it; keys of mappings stay numbers, which labels may be."""
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _line(row: Any) -> bytes:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a mapping from column to value, this is {type(row).__name__}")
    try:
        return json.dumps(dict(row), default=_number, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    except (TypeError, RecursionError) as error:
        raise ValueError(f"holds a value that is no text, number, list or mapping ({error})") from None


def _number(value: Any) -> Any:
    """Return the plain number of a NumPy scalar."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    raise TypeError(type(value).__name__)


def _yaml(value: Any) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        """Writes values that occur twice twice: task files have no aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(value, Dumper=Plain, sort_keys=False, allow_unicode=True, width=10_000)
