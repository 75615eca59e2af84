"""What a notebook shows: small pieces of HTML with no style of their own but alignment, and pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path


class Picture:
    """A PNG file that a notebook shows as it is."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __repr__(self) -> str:
        return f"<Picture {self.file}>"

    def _repr_png_(self) -> bytes:
        return self.file.read_bytes()


def facts_html(facts: Mapping[str, str]) -> str:
    """Return names and values, one a line."""
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<table>{''.join(lines)}</table>"


def rows_html(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows under a header."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture_html(file: Path) -> str:
    """Return a PNG file as a picture that needs no other file."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(file.stem)}" style="max-width: 100%" src="data:image/png;base64,{data}">'
