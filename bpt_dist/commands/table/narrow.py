"""Tables that fit a narrow place: tasks as rows, methods as columns, as many tables one after the other as the width asks for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bpt_dist.commands.table.layout import Block, Sheet, Text, latex

WIDTH = 80
PAGE = 100  # characters that fit a line of a page on its side
BORDER, EDGES = len(" | "), len("|  |")
PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[landscape,margin=2cm]{geometry}
\usepackage{booktabs}
\begin{document}
"""


class _Column(NamedTuple):
    name: str
    cells: tuple[Text, ...]

    @property
    def width(self) -> int:
        """Return the characters that the widest of its cells needs; what underlines the name takes two."""
        return max(2, len(self.name), *(len(_marked(cell)) for cell in self.cells))


def narrow(sheet: Sheet, width: int = WIDTH) -> list[Sheet]:
    """Return a sheet on its side, in sheets whose lines are at most `width` characters as `aligned` prints them.

    The notes and what the table shows are on the last one. A method alone may need more than `width`; it then has its own sheet.
    """
    first = _Column("", tuple(Text(title) for title in sheet.header[1:]))
    others = [_Column(row[0].text, row[1:]) for block in sheet.blocks for row in block.rows]
    groups = list(_groups(first, others, width))
    return [
        Sheet(
            sheet.title if len(groups) == 1 else f"{sheet.title} ({number} of {len(groups)})",
            tuple(column.name for column in group),
            (Block("", tuple(zip(*(column.cells for column in group), strict=True))),),
            sheet.notes if number == len(groups) else (),
            sheet.closing if number == len(groups) else (),
        )
        for number, group in enumerate(groups, 1)
    ]


def aligned(sheet: Sheet, width: int = WIDTH) -> str:
    """Return a sheet of `narrow` as Markdown whose columns also line up as plain text; notes are wrapped."""
    rows = [[_marked(cell) for cell in row] for block in sheet.blocks for row in block.rows]
    widths = [max(2, *map(len, column)) for column in zip(sheet.header, *rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (each - 1) + ":" for each in widths[1:])]
    lines = [_line(cells, widths) for cells in (sheet.header, rule, *rows)]
    notes = [_wrapped(f"- {note}", width) for note in sheet.notes]
    closing = [part for sentence in sheet.closing for part in ("", _wrapped(sentence, width))]
    return "\n".join([_wrapped(f"### {sheet.title}", width), "", *lines, *([""] if notes else []), *notes, *closing, ""])


def latex_page(sheets: Sequence[Sheet]) -> str:
    """Return a whole document that pdflatex typesets, one table after the other."""
    return "\n".join([PREAMBLE, *map(latex, sheets), r"\end{document}", ""])


def _groups(first: _Column, others: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    group, used = [first], EDGES + first.width
    for column in others:
        if used + BORDER + column.width > width and len(group) > 1:
            yield group
            group, used = [first], EDGES + first.width
        group.append(column)
        used += BORDER + column.width
    yield group


def _marked(cell: Text) -> str:
    return f"**{cell.text}**" if cell.bold else cell.text


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
    return "| " + " | ".join(padded) + " |"


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)
