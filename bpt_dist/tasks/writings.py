"""How a column of a row is written into the source text, by name.

A model card prints the functions it needs as they are, for readers who have not installed this package. So each of them is whole in
itself: it uses `column` and the standard library, and no name of ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

from bpt_dist.tasks.spec import column

IMPORTS = "import re\nimport unicodedata\nfrom typing import Any\n"  # what the functions need where they are printed


def plain(row: dict[str, Any], path: str) -> str:
    """Return the text as it is."""
    return str(column(row, path))


def padded(row: dict[str, Any], path: str) -> str:
    """Surround everything but letters, marks, digits, underscores and blanks by blanks, as T5's own data do for SQuAD."""

    def pad(match: re.Match[str]) -> str:
        return match[0] if unicodedata.category(match[0]).startswith("M") else f" {match[0]} "

    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", pad, str(column(row, path))))


def unmarked(row: dict[str, Any], path: str) -> str:
    """Return the text without the mark-up of MultiRC."""
    return re.sub("</?b>", "", str(column(row, path)).replace("<br>", " "))


def listed(row: dict[str, Any], path: str) -> str:
    """Return a list of texts, such as the entities of ReCoRD, in one line."""
    texts: Any = column(row, path)
    return ", ".join(texts)


def sentences(row: dict[str, Any], path: str) -> str:
    """Turn the `@highlight` lines of a ReCoRD passage into sentences."""
    ended = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", str(column(row, path)))
    return ended.replace("\n@highlight\n", ". ")


def numbered(row: dict[str, Any], path: str) -> str:
    """Return the choices of a question, each behind its number."""
    texts: Any = column(row, path)
    return " ".join(f"choice{number}: {text}" for number, text in enumerate(texts, 1))


def marked(row: dict[str, Any], path: str) -> str:
    """Put ` * ` around the noun and ` # ` around the pronoun, each found in the text before any mark; one may hold the other.

    Marked is the span's occurrence nearest to the word the row points at, or else that word.
    """
    text, marks = str(column(row, path)), []
    words = [match.span() for match in re.finditer(r"\S+", text)]
    for number, sign in ((1, "*"), (2, "#")):
        near = words[min(row[f"span{number}_index"], len(words) - 1)]
        pattern = rf"(?<!\w){re.escape(row[f'span{number}_text'])}(?!\w)"
        places = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
        start, end = min(places, key=lambda place: abs(place[0] - near[0]), default=near)
        # At one place ends come before starts, the longer span opens first and the later one closes first.
        marks += [(start, 1, start - end, f"{sign} "), (end, 0, -start, f" {sign}")]
    for place, _, _, mark in sorted(marks, reverse=True):
        text = text[:place] + mark + text[place:]
    return text


def marked_as_published(row: dict[str, Any], path: str) -> str:
    """Mark noun and pronoun by the published pattern, which leaves a span unmarked that it does not find at its word."""

    def mark(text: str, span: str, index: int, sign: str) -> str:
        pattern = rf"^((?:\S+\s){{{index}}})({re.escape(span)})"
        return re.sub(pattern, lambda match: f"{match[1]}{sign} {match[2]} {sign}", text)

    first, second = row["span1_index"], row["span2_index"]
    text = mark(str(column(row, path)), row["span1_text"], first, "*")
    return mark(text, row["span2_text"], second + 2 * int(first < second), "#")


WRITINGS: dict[str, Callable[[dict[str, Any], str], str]] = {
    written.__name__: written for written in (plain, padded, unmarked, listed, sentences, numbered, marked, marked_as_published)
}
# What a row must hold, beside the column itself, by the writing that reads it.
SPANS = ("span1_text", "span1_index", "span2_text", "span2_index")
ALSO_READ: dict[str, tuple[str, ...]] = {"marked": SPANS, "marked_as_published": SPANS}
