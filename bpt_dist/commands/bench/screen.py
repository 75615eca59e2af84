"""What the bench prints besides its tables: progress while it runs, and the machine it ran on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


@contextmanager
def progress() -> Iterator[Any]:
    """Give a function that reports progress on stderr: one line that changes on a terminal, a new line each time elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: sys.stderr.write(f"{text}\n")
        return
    with console.status("starting") as status:
        yield status.update


def machine_lines(machine: dict[str, Any], matmul: dict[str, float]) -> list[str]:
    """Return the machine in three lines."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    peaks = ", ".join(f"{dtype} {value / 1e9:,.0f} GFLOP/s" for dtype, value in matmul.items())
    return [
        f"{machine['device']}, {machine['threads']} thread(s) of {machine['cores']} cores, load {machine['load_average']:.2f}; "
        f"seconds are {machine['time']}",
        f"{f'matrix products in this run: {peaks}; ' if peaks else ''}copies {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s; "
        f"allocator: {machine['allocator']}",
        versions,
    ]
