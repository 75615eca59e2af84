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

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bpt_dist.tasks.spec import Protocol, TaskSpec, column

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


def render(spec: TaskSpec, row: Row, protocol: Protocol = "fixed", *, evaluation: bool = False) -> list[Example]:
    """Return the examples of one checked row: one, except a ReCoRD row, which trains on each of its answers."""
    source = " ".join([spec.title(protocol), *(text for _, text in _pieces(spec, row, protocol))])
    group = None if spec.group_column is None else str(column(row, spec.group_column))
    row_id = str(row[ROW_ID])
    if spec.kind != "text":
        target, label = _label(spec, row, protocol)
        return [Example(source, target, row_id, label, (), group)]
    answers = _answers(spec, row)
    if spec.form == "squad" and protocol == "attempt":
        printed = _pad_punctuation(str({"text": list(answers), "answer_start": row["answers"]["answer_start"]}))
        return [Example(source, printed, row_id, None, (printed,), group)]
    if spec.form == "record" and (protocol == "attempt" or not evaluation):
        return [Example(source, text, f"{row_id}#{i}", None, answers, group) for i, text in enumerate(answers)]
    return [Example(source, answers[0], row_id, None, answers, group)]


def field_texts(spec: TaskSpec, row: Row, protocol: Protocol = "fixed") -> list[tuple[str, str]]:
    """Return (column, text) of all that an example takes from a row: the fields of the source, and a free-text target."""
    texts = [(name, text) for name, text in _pieces(spec, row, protocol) if name is not None]
    return texts + ([(spec.target_column, text) for text in _answers(spec, row)] if spec.kind == "text" else [])


def _pieces(spec: TaskSpec, row: Row, protocol: Protocol) -> list[tuple[str | None, str]]:
    """Return the pieces of the source text after the title, each with its column (None: printed words of the task)."""
    if spec.form == "wsc":
        marked = _mark_published(row) if protocol == "attempt" else _mark_spans(row)
        return [(None, spec.fields[0].label), (spec.fields[0].column, marked)]
    if spec.form == "record":
        entities = ", ".join(row["entities"])
        return [(None, "record query:"), ("query", row["query"]), (None, "entities:"), ("entities", entities),
                (None, "passage:"), ("passage", _sentences(row))]  # fmt: skip
    pieces: list[tuple[str | None, str]] = []
    for field in spec.fields:
        pieces += [(None, field.label), (field.column, _text(spec, row, field.column))]
    if spec.form == "choices":
        for i, text in enumerate(row["choices"]["text"]):
            pieces += [(None, f"choice{i + 1}:"), ("choices.text", text)]
    if spec.form == "options" and protocol == "attempt":
        pieces[-1] = pieces[-3]
    return pieces


def _text(spec: TaskSpec, row: Row, path: str) -> str:
    text = str(column(row, path))
    if spec.form == "squad":
        return _pad_punctuation(text)
    if spec.form == "multirc":
        return re.sub("</?b>", "", text.replace("<br>", " "))
    return text


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


def _pad_punctuation(text: str) -> str:
    """Surround everything but letters, marks, digits, underscores and blanks by blanks, as T5's own data do for SQuAD."""

    def pad(match: re.Match[str]) -> str:
        return match[0] if unicodedata.category(match[0]).startswith("M") else f" {match[0]} "

    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", pad, text))


def _sentences(row: Row) -> str:
    """Turn the `@highlight` lines of a ReCoRD passage into sentences."""
    ended = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
    return ended.replace("\n@highlight\n", ". ")


def _mark_published(row: Row) -> str:
    def mark(text: str, span: str, index: int, sign: str) -> str:
        pattern = rf"^((?:\S+\s){{{index}}})({re.escape(span)})"
        return re.sub(pattern, lambda match: f"{match[1]}{sign} {match[2]} {sign}", text)

    first, second = row["span1_index"], row["span2_index"]
    text = mark(row["text"], row["span1_text"], first, "*")
    return mark(text, row["span2_text"], second + 2 * int(first < second), "#")


def _mark_spans(row: Row) -> str:
    """Put ` * ` around the noun and ` # ` around the pronoun, each found in the text before any mark; one may hold the other."""
    text, marks = row["text"], []
    for number, sign in ((1, "*"), (2, "#")):
        start, end = _locate(text, row[f"span{number}_text"], row[f"span{number}_index"])
        # At one place ends come before starts, the longer span opens first and the later one closes first.
        marks += [(start, 1, start - end, f"{sign} "), (end, 0, -start, f" {sign}")]
    for place, _, _, mark in sorted(marks, reverse=True):
        text = text[:place] + mark + text[place:]
    return text


def _locate(text: str, span: str, word_index: int) -> tuple[int, int]:
    """Return start and end of a span: its occurrence nearest to the word the row points at, or else that word."""
    words = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    near = words[min(word_index, len(words) - 1)]
    places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(span)}(?!\w)", text, re.IGNORECASE)]
    return min(places, key=lambda place: abs(place[0] - near[0]), default=near)
