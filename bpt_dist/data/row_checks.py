"""Checks of rows before anything is trained on them: what is wrong is reported as file:line: field.

Local files are read here, line by line, and not through `datasets`: its reader loses line numbers, turns columns of
date-like text into timestamps and fails on columns of mixed type that no task uses.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from bpt_dist.errors import DataError
from bpt_dist.tasks.spec import TaskSpec, column
from bpt_dist.tasks.text_to_text import Row, Slot, template
from bpt_dist.tasks.writings import ALSO_READ

MAX_LINE_BYTES = 1_000_000
SHOWN = 10
SHOWN_CHARACTERS = 60
HALF_SURROGATE = re.compile("[\ud800-\udfff]")


UNLABELLED = "without a label"
EMPTY = "with an empty text"
NO_LABEL: tuple[object, ...] = (None, -1, "", "-")  # how published data mark a row that has no label
HINT_UNLABELLED = "set `unlabelled: drop` in the task file to leave out rows without a label"
HINT_ID = "remove `id: {column}` from the task file where the column is no id of the rows"
HINT_EMPTY = "set `empty_text: keep` or `empty_text: drop` in the task file to use or leave out rows with an empty text"


@dataclass
class Problems:
    """Collected complaints, `place: what`; `raise_any` raises the first ten of them as one DataError."""

    complaints: list[str] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)

    def add(self, place: str, what: str) -> None:
        """Record that `what` is wrong at `place` (file:line)."""
        self.complaints.append(f"{place}: {what}")

    def add_row(self, spec: TaskSpec, row: Row, place: str) -> None:
        """Record what makes a row unusable, and the task setting that would accept it."""
        for what in row_problems(spec, row):
            self.add(place, what)
        if has_no_label(spec, row):
            self.hints[HINT_UNLABELLED] = None
        if spec.empty_texts == "refuse" and empty_fields(spec, row):
            self.hints[HINT_EMPTY] = None

    def raise_any(self, task: str) -> None:
        """Raise DataError if anything is wrong; nothing may be trained on then."""
        if not self.complaints:
            return
        rest = len(self.complaints) - SHOWN
        lines = self.complaints[:SHOWN] + ([f"… and {rest} more"] if rest > 0 else [])
        count = "1 bad row" if len(self.complaints) == 1 else f"{len(self.complaints)} problems"
        remedy = "fix the rows" + "".join(f", or {hint}" for hint in self.hints)
        raise DataError(f"task {task!r}: {count}, nothing was trained; {remedy}:\n  " + "\n  ".join(lines))


def read_jsonl(path: Path, spec: TaskSpec, problems: Problems) -> tuple[list[tuple[int, Row]], Counter[str]]:
    """Return the rows of a JSONL file with their line numbers, and how many the task leaves out, by reason.

    The file is strict UTF-8 with one object a line, LF or CRLF. What is wrong with a row is added to `problems`.
    """
    rows: list[tuple[int, Row]] = []
    dropped: Counter[str] = Counter()
    seen: dict[str, int] = {}
    num_problems = len(problems.complaints)
    for number, line in _lines(path):
        place = f"{path}:{number}"
        try:
            row = parse_line(line)
        except ValueError as error:
            problems.add(place, str(error))
            continue
        if (reason := left_out(spec, row)) is not None:
            dropped[reason] += 1
            continue
        problems.add_row(spec, row, place)
        for what in _repeated(spec, row, seen, number):
            problems.add(place, what)
            if spec.hub_name is None:  # the ids of published data are named by the catalogue
                problems.hints[HINT_ID.format(column=spec.id_column)] = None
        rows.append((number, row))
    if not rows and not dropped and len(problems.complaints) == num_problems:
        problems.add(f"{path}:1", "the file has no rows")
    return rows, dropped


def left_out(spec: TaskSpec, row: Row) -> str | None:
    """Return why the task leaves a row out, None for a row that is used."""
    if spec.unlabelled_rows == "drop" and has_no_label(spec, row):
        return UNLABELLED
    if spec.empty_texts == "drop" and empty_fields(spec, row):
        return EMPTY
    return None


def has_no_label(spec: TaskSpec, row: Row) -> bool:
    """Return whether a row has no label: null, or one of the marks of published data that is no label of the task."""
    value = column(row, spec.target_column)
    if spec.kind == "text":
        return value is None or value == [] or (isinstance(value, str) and not value.strip())
    if spec.kind == "regression":
        assert spec.score_range is not None
        is_marked = value == -1 and not isinstance(value, bool) and spec.score_range[0] > -1
        return value is None or is_marked or value in ("", "-")
    is_mark = any(type(value) is type(mark) and value == mark for mark in NO_LABEL)
    return is_mark and value not in spec.label_values


def empty_fields(spec: TaskSpec, row: Row) -> list[str]:
    """Return the columns of the source text that are empty in a row."""
    texts = {field.column: column(row, field.column) for field in spec.fields}
    return [name for name, text in texts.items() if isinstance(text, str) and not text.strip()]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from numbered_lines(file)


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines split at line feeds only (U+2028 may be part of a text), never holding a huge one."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        yield number, line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 2)


def parse_line(line: bytes) -> Row:
    """Return the JSON object of one line; raise ValueError with what is wrong."""
    if len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError("the file starts with a byte-order mark; save it as UTF-8 without one")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8 ({line[error.start]:#04x})") from None
    if not text.strip():
        raise ValueError("the line is empty")
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicate)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a whole JSON object: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, this is {_shown(value)}")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write a finite number")


def _no_duplicate(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"field {key!r} is in the row twice")
        row[key] = value
    return row


def _repeated(spec: TaskSpec, row: Row, seen: dict[str, int], number: int) -> Iterator[str]:
    if spec.id_column is None or row.get(spec.id_column) is None:
        return
    key = json.dumps(row[spec.id_column], sort_keys=True)
    if key in seen:
        yield f"field {spec.id_column!r} is {_shown(row[spec.id_column])}, as in line {seen[key]}; the ids of a file must differ"
    seen.setdefault(key, number)


def row_problems(spec: TaskSpec, row: Row) -> list[str]:
    """Return what makes a row unusable for its task: missing, empty, mistyped fields and unknown labels."""
    may_be_empty = spec.empty_texts == "keep"
    # `fixed` shows every field; of choices the target says which of them a row must have.
    slots = [piece for piece in template(spec) if isinstance(piece, Slot) and piece.written != "numbered"]
    problems = [problem for slot in slots for problem in slot_problems(slot, row, may_be_empty=may_be_empty)]
    if spec.group_column is not None and column(row, spec.group_column) is None:
        problems.append(f"field {spec.group_column!r} is missing")
    return problems + _target_problems(spec, row)


def slot_problems(slot: Slot, row: Row, *, may_be_empty: bool = False) -> list[str]:
    """Return what makes a row unusable for one place of the source text."""
    value = column(row, slot.column)
    if slot.written == "listed":
        return [] if _is_texts(value) else [_wrong(slot.column, value, "a list of texts")]
    if slot.written == "numbered":
        return [] if _is_texts(value) else [_wrong(slot.column, value, "a list of texts, one a choice")]
    empty = may_be_empty and isinstance(value, str) and not value.strip()
    problems = [] if empty else _text_problems(slot.column, value)
    for name in ALSO_READ.get(slot.written, ()):
        if name.endswith("_index"):
            problems += [] if _is_int(row.get(name)) else [_wrong(name, row.get(name), "a word number")]
        else:
            problems += _text_problems(name, row.get(name))
    return problems


def _target_problems(spec: TaskSpec, row: Row) -> list[str]:
    value = column(row, spec.target_column)
    if value is None:
        return [f"field {spec.target_column!r} is missing"]
    if spec.kind == "classification":
        return _class_problems(spec, value)
    if spec.kind == "regression":
        return _score_problems(spec, value)
    return _choice_problems(spec, row, value) if spec.kind == "choice" else _answer_problems(spec, row, value)


def _answer_problems(spec: TaskSpec, row: Row, value: object) -> list[str]:
    if isinstance(value, str):
        return _text_problems(spec.target_column, value)
    if not _is_texts(value):
        return [_wrong(spec.target_column, value, "a text or a list of at least one text")]
    if spec.form == "squad" and not isinstance(column(row, "answers.answer_start"), list):
        return [_wrong("answers.answer_start", column(row, "answers.answer_start"), "a list of positions")]
    return []


def _class_problems(spec: TaskSpec, value: object) -> list[str]:
    # Compared with their types: True == 1 and 1.0 == 1 in Python, but neither is the label 1 of a data set.
    labels = {(type(label), label) for label in spec.label_values}
    if isinstance(value, str | int | float) and (type(value), value) in labels:
        return []
    named = ", ".join(f"{_shown(v)} ({w})" for v, w in zip(spec.label_values, spec.label_words, strict=True))
    return [f"field {spec.target_column!r} is {_shown(value)}; task {spec.name!r} has labels {named}"]


def _score_problems(spec: TaskSpec, value: object) -> list[str]:
    assert spec.score_range is not None
    low, high, _ = spec.score_range
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [_wrong(spec.target_column, value, "a number")]
    if not math.isfinite(value) or not low <= value <= high:
        return [_wrong(spec.target_column, value, f"a number from {low:g} to {high:g}")]
    return []


def _choice_problems(spec: TaskSpec, row: Row, value: object) -> list[str]:
    texts, labels = column(row, "choices.text"), column(row, "choices.label")
    if not _is_texts(texts) or not _is_texts(labels) or len(texts) != len(labels):
        return [_wrong("choices", row.get("choices"), "two lists of equal length, `text` and `label`")]
    if len(labels) > len(spec.label_words):
        return [f"field 'choices' has {len(labels)} choices, task {spec.name!r} {len(spec.label_words)} at most"]
    if value not in labels:
        return [f"field {spec.target_column!r} is {_shown(value)}; the choices of this row are {_shown(labels)}"]
    return []


def _text_problems(name: str, value: object) -> list[str]:
    if value is None:
        return [f"field {name!r} is missing"]
    if not isinstance(value, str):
        return [_wrong(name, value, "a text")]
    if not value.strip():
        return [f"field {name!r} is empty"]
    if not value.isascii() and HALF_SURROGATE.search(value):
        return [f"field {name!r} has half a surrogate pair, which no UTF-8 text can hold"]
    return []


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(not _text_problems("", text) for text in value)


def _wrong(name: str, value: object, wanted: str) -> str:
    return f"field {name!r} is missing" if value is None else f"field {name!r} is {_shown(value)}; it must be {wanted}"


def _shown(value: object) -> str:
    """Return a value short and escaped, so that no text of a data set reaches the terminal as it is."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
