"""Lists on the screen: drawn by rich on a terminal, whole lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 250  # a file or a pipe must not lose what a terminal would wrap


def console() -> Console:
    """Return a console on today's standard output."""
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, highlight=False)


def print_list(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print rows under a header; columns listed in `right` hold numbers."""
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, header_style="bold")
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position in right else "left", no_wrap=position == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)
