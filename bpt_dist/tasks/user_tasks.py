"""Read the tasks of a user from YAML, so that a new task needs no code.

    reviews:                      # the name in data.source_tasks, data.target_tasks and the results
      folder: reviews             # train.jsonl, validation.jsonl[, test.jsonl]; relative to this file. Or `hub: owner/name`
      fields: [title, text]       # printed as `title: … text: …`; {column: words} prints other words
      label: stars                # the column of the class …
      label_words: {1: bad, 2: good}   # … and the target text of each class; a list means classes 0, 1, 2 …
      metrics: [accuracy, macro_f1]    # the first is the headline

`target: column` instead of `label` is a free-text task (a text or a list of right answers); `score: [low, high, step]`
beside `label` is a regression. `unlabelled: drop | refuse` decides on rows whose label is null, -1, "" or "-", and
`empty_text: keep | drop | refuse` on rows with an empty field: a `folder` refuses both, of a `hub` the first are dropped and
the second kept. What is dropped or kept is counted in the log. `id: column` names ids that must differ within a file; without it
a column of that name means nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from bpt_dist.errors import ConfigError
from bpt_dist.tasks.spec import METRICS_OF_KIND, EmptyText, Kind, SplitRule, TaskSpec, TextField, Unlabelled, score_words

MAX_BYTES = 64_000
MAX_DEPTH = 8
MIN_STEP = 0.1  # scores are written with one decimal
LENGTHS = range(2, 4097)
BINARY = 2
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
COLUMN = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
KEYS = (
    "summary", "folder", "hub", "config", "fields", "label", "label_words", "target", "score", "metrics", "split",
    "id", "group", "max_source_length", "max_target_length", "unlabelled", "empty_text",
)  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, anchors, aliases and tags: nothing is built but texts, numbers, lists, mappings."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ConfigError(f"line {event.start_mark.line + 1}: anchors, aliases and tags are not allowed")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if lines.setdefault(str(key.value), line) != line:
                raise ConfigError(f"line {line}: {str(key.value)!r} is there twice, first in line {lines[str(key.value)]}")
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) != len(node.value):
            raise ConfigError(f"line {node.start_mark.line + 1}: a key is there twice")
        return mapping


def load_user_tasks(paths: Iterable[Path | str]) -> dict[str, TaskSpec]:
    """Return the tasks of YAML files by name. Raises one ConfigError naming file, key, value and remedy of every problem."""
    tasks: dict[str, TaskSpec] = {}
    problems: list[str] = []
    for path in map(Path, paths):
        for name, entry in _entries(path).items():
            reader = _Entry(f"{path}: {name}", entry)
            if not NAME.fullmatch(str(name)):
                reader.problem("", "task names are lower-case letters, digits, '.', '_', '-' (64 at most)")
            if name in tasks:
                reader.problem("", "an earlier task file defines this name")
            spec = reader.spec(str(name), path.parent)
            problems += reader.problems
            if spec is not None:
                tasks[str(name)] = spec
    if problems:
        raise ConfigError("\n".join(problems))
    return tasks


def task_of(name: str, entry: Mapping[str, Any], folder: Path) -> TaskSpec:
    """Return the task that an entry of a task file describes, `folder` and `hub` left out, with its rows in `folder`.

    Raises ConfigError with every problem, as `task 'name'.key: what is wrong`.
    """
    reader = _Entry(f"task {name!r}", {**entry, "folder": folder.name})
    if not NAME.fullmatch(name):
        reader.problem("", "task names are lower-case letters, digits, '.', '_', '-' (64 at most)")
    spec = reader.spec(name, folder.parent)
    if spec is None or reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return spec


def _entries(path: Path) -> dict[Any, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); data.task_files names it") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(content):,} bytes; a task file has {MAX_BYTES:,} at most")
    try:
        value = _StrictLoader(content.decode("utf-8")).get_single_data()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path}: a task file is a mapping from task names to tasks")
    return value


class _Entry:
    """One task of the file while it is read; `problems` collects what is wrong with it."""

    def __init__(self, place: str, entry: Any) -> None:
        self.place = place
        self.problems: list[str] = []
        self.entry: dict[str, Any] = entry if isinstance(entry, dict) else {}
        if not isinstance(entry, dict):
            self.problem("", "a task is a mapping with at least folder or hub, fields, label or target, metrics")
        for key in self.entry:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key), KEYS, n=1)
                self.problem(str(key), f"unknown key; did you mean {near[0]!r}?" if near else "unknown key")

    def problem(self, key: str, what: str) -> None:
        self.problems.append(f"{self.place}{'.' if key else ''}{key}: {what}")

    def spec(self, name: str, base: Path) -> TaskSpec | None:
        """Return the task, or None after noting what is wrong."""
        entry = self.entry
        kind = self._kind()
        words, values, score = self._labels(kind)
        if ("folder" in entry) == ("hub" in entry):
            self.problem("folder", "give either `folder` or `hub`")
        fields = self._fields()
        metrics = self._metrics(kind)
        split = entry.get("split", "official")
        if split not in ("official", "halves", "carve"):
            self.problem("split", f"{split!r} must be official, halves or carve")
        unlabelled = self._choice("unlabelled", get_args(Unlabelled))
        empty_text = self._choice("empty_text", get_args(EmptyText))
        text = {key: self._text(key) for key in ("summary", "folder", "hub", "config", "id", "group") if key in entry}
        column = self._column("target" if kind == "text" else "label")
        num_source, num_target = self._length("max_source_length", 256), self._length("max_target_length", 128)
        if self.problems:
            return None
        return TaskSpec(
            name=name, summary=text.get("summary", "a task of your own"), kind=kind, metrics=metrics, fields=fields,
            target_column=column, label_words=words, label_values=values, score_range=score,
            hub_name=text.get("hub"), hub_configs=(text.get("config"),), local_name=text.get("hub"),
            folder=base / text["folder"] if "folder" in text else None,
            splits=SplitRule(kind=split, test=("test",) if split == "official" else ("validation",)),
            id_column=text.get("id"), group_column=text.get("group"),
            max_source_length=num_source, max_target_length=num_target,
            unlabelled=unlabelled, empty_text=empty_text,
        )  # fmt: skip

    def _kind(self) -> Kind:
        if ("label" in self.entry) == ("target" in self.entry):
            self.problem("label", "give either `label` (classes or scores) or `target` (free text)")
        if "target" in self.entry:
            return "text"
        return "regression" if "score" in self.entry else "classification"

    def _labels(self, kind: Kind) -> tuple[tuple[str, ...], tuple[Any, ...], tuple[float, float, float] | None]:
        if kind == "regression":
            return self._score()
        given = self.entry.get("label_words")
        if kind == "text":
            if given is not None:
                self.problem("label_words", "a free-text task has none")
            return (), (), None
        if isinstance(given, list):
            given = dict(enumerate(given))
        if not isinstance(given, dict) or len(given) <= 1:
            self.problem("label_words", "list the target text of at least two classes")
            return (), (), None
        words = tuple(given.values())
        # YAML reads bare yes, no, true, 1 as other than text: a label word must be unmistakably text.
        if not all(isinstance(word, str) and word.strip() == word and word for word in words):
            self.problem("label_words", f"{list(words)!r} must be texts; put quotes around words such as 'yes' or '1'")
            words = ()
        elif len(set(words)) < len(words):
            self.problem("label_words", f"{list(words)!r} must differ from each other")
        if not all(isinstance(value, str | int) for value in given):
            self.problem("label_words", f"{list(given)!r}: labels in the rows are texts or whole numbers")
        return words, tuple(given), None

    def _score(self) -> tuple[tuple[str, ...], tuple[Any, ...], tuple[float, float, float] | None]:
        value = self.entry["score"]
        try:
            low, high, step = (float(number) for number in value)
        except (TypeError, ValueError):
            low, high, step = 0.0, 0.0, 0.0
        if not low < high or not MIN_STEP <= step <= high - low:
            self.problem("score", f"{value!r} must be [low, high, step] with low < high and a step of {MIN_STEP} or more")
            return (), (), None
        return score_words(low, high, step), (), (low, high, step)

    def _fields(self) -> tuple[TextField, ...]:
        given = self.entry.get("fields")
        pairs = given if isinstance(given, dict) else {str(name): None for name in given} if isinstance(given, list) else {}
        fields = []
        for column, label in pairs.items():
            if not isinstance(column, str) or not COLUMN.fullmatch(column) or not isinstance(label, str | None):
                self.problem("fields", f"{column!r} must be the name of a column (dots lead into nested objects)")
            else:
                fields.append(TextField(label=f"{column}:" if label is None else label, column=column))
        if not fields:
            self.problem("fields", "list the columns of the source text in their order")
        return tuple(fields)

    def _metrics(self, kind: Kind) -> tuple[str, ...]:
        binary = len(self.entry.get("label_words") or ()) <= BINARY
        allowed = [name for name in METRICS_OF_KIND[kind] if binary or name not in ("f1", "matthews", "multirc_f1a")]
        allowed = [name for name in allowed if "group" in self.entry or not name.startswith("multirc")]
        given = self.entry.get("metrics")
        if not isinstance(given, list) or not given:
            self.problem("metrics", f"list one or more of {', '.join(allowed)}; the first is the headline")
            return ()
        for name in given:
            if name not in allowed:
                self.problem("metrics", f"{name!r} does not fit this task; it can be {', '.join(allowed)}")
        return tuple(str(name) for name in given)

    def _column(self, key: str) -> str:
        value = self.entry.get(key, "label")
        if not isinstance(value, str) or not COLUMN.fullmatch(value):
            self.problem(key, f"{value!r} must be the name of a column")
        return str(value)

    def _length(self, key: str, default: int) -> int:
        value = self.entry.get(key, default)
        if type(value) is not int or value not in LENGTHS:
            self.problem(key, f"{value!r} must be a number of tokens from 2 to 4096")
        return value

    def _choice(self, key: str, choices: tuple[Any, ...]) -> Any:
        value = self.entry.get(key)
        if key in self.entry and value not in choices:
            self.problem(key, f"{value!r} must be {' or '.join(choices)}")
        return value

    def _text(self, key: str) -> str:
        value = self.entry[key]
        if not isinstance(value, str) or not value:
            self.problem(key, f"{value!r} must be a text")
        return str(value)
