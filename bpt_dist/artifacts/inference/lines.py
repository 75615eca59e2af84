"""JSONL in, JSONL out: one line of an answer for every line of a row, in order, in constant memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from bpt_dist.artifacts.inference.predictor import WINDOW, Answer, Predictor
from bpt_dist.data.row_checks import parse_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Answered(NamedTuple):
    """The answers to some lines: what to write, and the complaints `row N: what` about those that have none."""

    lines: list[bytes]
    complaints: list[str]


def answer_lines(predictor: Predictor, lines: Iterable[tuple[int, bytes]], *, window: int = WINDOW) -> Iterator[Answered]:
    """Yield the answers to numbered lines, one window after the other; what is wrong with a line is its answer."""
    lines = iter(lines)
    while some := list(itertools.islice(lines, window)):
        rows: dict[int, Any] = {}
        answers: dict[int, Answer] = {}
        for number, line in some:
            try:
                rows[number] = parse_line(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)
            except ValueError as error:
                answers[number] = Answer(kind="line", error=f"{error}; write one JSON object a line")
        answers |= dict(zip(rows, predictor.predict(list(rows.values())), strict=True))
        complaints = [f"row {number}: {answers[number].error}" for number, _ in some if answers[number].error is not None]
        yield Answered([encode(number, answers[number]) for number, _ in some], complaints)


def encode(number: int, answer: Answer) -> bytes:
    """Return the line of an answer; its keys stay in the order a reader looks for them."""
    return (json.dumps({"row": number, **answer.as_json()}, ensure_ascii=False, allow_nan=False) + "\n").encode()
