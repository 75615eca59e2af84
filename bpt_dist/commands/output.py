"""Lists and progress on the screen: drawn by rich on a terminal, whole lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 250  # a file or a pipe must not lose what a terminal would wrap
STEP = 1024
MINUTE, HOUR, DAY = 60, 3600, 86400


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


@contextmanager
def progress() -> Iterator[Any]:
    """Give a function that reports progress on stderr: one line that changes on a terminal, a new line each time elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: sys.stderr.write(f"{text}\n")
        return
    with console.status("starting") as status:
        yield status.update


def size(num_bytes: float) -> str:
    """Return bytes in the largest binary unit below them, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < STEP:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= STEP
    return f"{num_bytes:,.3g} TiB"


def duration(seconds: float) -> str:
    """Return a time in the unit a person would choose."""
    for unit, length in (("days", DAY), ("h", HOUR), ("min", MINUTE), ("s", 1)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"
