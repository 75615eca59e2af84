"""Turn a row into text: source, target and the facts by which an evaluation scores the answer.

`fixed` writes label words and repairs what earlier code did by mistake; `attempt` repeats the published text, quirks
included, for numbers that must be compared with the ATTEMPT family:

* classes are digit strings and SuperGLUE tasks are called `superglue-…`;
* STS-B scores are rounded to 0.1 (so targets such as 3.7 leave the scale of 26 scores), not to 0.2;
* the SQuAD target is the printed dictionary of answers;
* Winogrande shows option1 twice;
* ReCoRD repeats a query for every answer at evaluation too;
* WSC leaves a span unmarked when the published pattern does not find it.

Text is `task name + fields`; punctuation of SQuAD is padded and MultiRC loses its mark-up under both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bpt_dist.tasks.spec import Protocol, TaskSpec, column
from bpt_dist.tasks.writings import WRITINGS

ROW_ID = "_row_id"
Row = dict[str, Any]


class TextForm(NamedTuple):
    """How a family of models reads a text and its answer; the words are the same for all.

    With `continues` the answer goes on in the sequence of the text, as a decoder-only model reads it: a blank before its first
    word, and no end token behind the text. `start` is the token a text begins with, where the model wants one.
    """

    continues: bool = False
    start: int | None = None


ENCODED = TextForm()  # an encoder reads the text to its end token, a decoder begins the answer


@dataclass(frozen=True)
class Example:
    """One question in text; `label` is the class index or the score, `references` every right free-text answer."""

    source: str
    target: str
    row_id: str
    label: int | float | None = None
    references: tuple[str, ...] = ()
    group: str | None = None


@dataclass(frozen=True)
class Slot:
    """A place of the source text that a row fills: with which column, and by which of `WRITINGS`."""

    column: str
    written: str


Template = tuple[str | Slot, ...]  # printed words and slots, joined by blanks


def template(spec: TaskSpec, protocol: Protocol = "fixed") -> Template:
    """Return the source text of a task before a row fills it: its title, then its fields."""
    if spec.form == "wsc":
        marks = "marked_as_published" if protocol == "attempt" else "marked"
        return (spec.title(protocol), spec.fields[0].label, Slot(spec.fields[0].column, marks))
    if spec.form == "record":
        parts = ("record query:", Slot("query", "plain"), "entities:", Slot("entities", "listed"), "passage:")
        return (spec.title(protocol), *parts, Slot("passage", "sentences"))
    written = {"squad": "padded", "multirc": "unmarked"}.get(spec.form, "plain")
    pieces: list[str | Slot] = [spec.title(protocol)]
    for field in spec.fields:
        pieces += [field.label, Slot(field.column, written)]
    if spec.form == "choices":
        pieces.append(Slot("choices.text", "numbered"))
    if spec.form == "options" and protocol == "attempt":
        pieces[-1] = pieces[-3]
    return tuple(pieces)


def written(pieces: Template, row: Row) -> str:
    """Return the source text of a checked row."""
    return " ".join(piece if isinstance(piece, str) else WRITINGS[piece.written](row, piece.column) for piece in pieces)


def render(spec: TaskSpec, row: Row, protocol: Protocol = "fixed", *, evaluation: bool = False) -> list[Example]:
    """Return the examples of one checked row: one, except a ReCoRD row, which trains on each of its answers."""
    source = written(template(spec, protocol), row)
    group = None if spec.group_column is None else str(column(row, spec.group_column))
    row_id = str(row[ROW_ID])
    if spec.kind != "text":
        target, label = _label(spec, row, protocol)
        return [Example(source, target, row_id, label, (), group)]
    answers = _answers(spec, row)
    if spec.form == "squad" and protocol == "attempt":
        shown = {"shown": str({"text": list(answers), "answer_start": row["answers"]["answer_start"]})}
        printed = WRITINGS["padded"](shown, "shown")
        return [Example(source, printed, row_id, None, (printed,), group)]
    if spec.form == "record" and (protocol == "attempt" or not evaluation):
        return [Example(source, text, f"{row_id}#{i}", None, answers, group) for i, text in enumerate(answers)]
    return [Example(source, answers[0], row_id, None, answers, group)]


def field_texts(spec: TaskSpec, row: Row, protocol: Protocol = "fixed") -> list[tuple[str, str]]:
    """Return (column, text) of all that an example takes from a row: the fields of the source, and a free-text target."""
    texts: list[tuple[str, str]] = []
    for slot in (piece for piece in template(spec, protocol) if isinstance(piece, Slot)):
        if slot.written == "numbered":
            texts += [(slot.column, text) for text in row["choices"]["text"]]
        else:
            texts.append((slot.column, WRITINGS[slot.written](row, slot.column)))
    return texts + ([(spec.target_column, text) for text in _answers(spec, row)] if spec.kind == "text" else [])


def _label(spec: TaskSpec, row: Row, protocol: Protocol) -> tuple[str, int | float]:
    value: Any = column(row, spec.target_column)
    if spec.kind == "regression":
        return _score(spec, float(value), protocol), float(value)
    index = row["choices"]["label"].index(value) if spec.kind == "choice" else spec.label_values.index(value)
    return spec.words(protocol)[index], index


def _score(spec: TaskSpec, value: float, protocol: Protocol) -> str:
    assert spec.score_range is not None
    low, _, step = spec.score_range
    if protocol == "attempt":
        # The published order of operations: the factors 5 were meant to enclose the rounding.
        return str(np.round(value * 5 / 5, decimals=1))
    return spec.label_words[int(np.rint((value - low) * (1 / step)))]


def _answers(spec: TaskSpec, row: Row) -> tuple[str, ...]:
    value: Any = column(row, spec.target_column)
    return (value,) if isinstance(value, str) else tuple(value)
