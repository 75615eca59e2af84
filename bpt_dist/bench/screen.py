"""What the bench shows: progress while it runs, and the machine it ran on; tables are those of every command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from bpt_dist.bench.paired import Spread


@contextmanager
def telling() -> Iterator[Any]:
    """Give a function that says what is running: one line that changes on a terminal, a line each time elsewhere (stderr)."""
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


EXCHANGE_HEADER = (
    "ranks",
    "M",
    "all_gather CPU ms",
    "coordinates CPU ms",
    "faster by",
    "wall: faster by",
    "MB received",
    "MB by coordinates",
    "difference",
)


def exchange_row(found: dict[str, Any]) -> tuple[str, ...]:
    """Return a line of the table of `bench exchange`."""
    gathered, sliced = found["all_gather"], found["coordinates"]
    return (
        str(found["num_processes"]), str(found["num_particles"]),
        f"{1000 * gathered['cpu_seconds']:.1f}", f"{1000 * sliced['cpu_seconds']:.1f}",
        str(Spread(**found["ratio_cpu"])), str(Spread(**found["ratio_wall"])),
        f"{gathered['received_bytes'] / 1e6:.1f}", f"{sliced['received_bytes'] / 1e6:.1f}", f"{found['relative_difference']:.0e}",
    )  # fmt: skip
