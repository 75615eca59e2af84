"""What finished runs have to show: the table, the figures, and the example whose answer is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from bpt_dist.cli_output import console, print_list
from bpt_dist.errors import DataError
from bpt_dist.files import write_atomic
from bpt_dist.results import collect

SUFFIXES = {".tex": "latex", ".csv": "csv"}


def print_table(runs: Sequence[Path], form: str | None, out: Path | None, *, published: bool, split: str) -> None:
    """Print the results table, or write it to `out`.

    Raises DataError where there are no results.
    """
    found = collect(runs)
    if not found.results:
        raise DataError("\n".join([f"{', '.join(map(str, runs))}: no finished run has results", *found.notes]))
    from bpt_dist.report import Table  # brings scipy, which an error above does not need

    table = Table.build(found.results, split=split, published=published, notes=found.notes)
    if form is None and out is None and sys.stdout.isatty():
        console().print(table.to_rich())
        return
    chosen = form or (SUFFIXES.get(out.suffix, "markdown") if out is not None else "markdown")
    text = {"markdown": table.to_markdown, "latex": table.to_latex, "csv": table.to_csv}[chosen]()
    if out is None:
        typer.echo(text, nl=False)
        return
    typer.echo(write_atomic(out, text.encode()))
    for note in found.notes:
        typer.echo(note, err=True)


def print_figures(run: Path, out: Path | None) -> None:
    """Draw the figures of `run` and print the files."""
    from bpt_dist.figures import draw_run
    from bpt_dist.journal import read_records

    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{run}: has no metrics.jsonl; give the folder of a run")
    records, _ = read_records(metrics, limit=1 << 30)
    drawn = draw_run(records, out or run / "figures")
    if not drawn:
        raise DataError(f"{metrics}: holds no losses yet; draw again when the run has taken some steps")
    for file in drawn:
        typer.echo(file)


def print_gaussian_product(out: Path, seed: int) -> None:
    """Print candidates for a start of the target prompt with their distance from the product's mean, and draw them."""
    from bpt_dist import figures
    from bpt_dist import gaussian_product as example

    result = example.run(seed)
    rows = []
    for name, point in result.points().items():
        distance = float((point - result.product_mean).norm())
        rows.append((name, f"{point[0]:.3f}", f"{point[1]:.3f}", f"{distance:.4f}"))
    print_list(("start of the target prompt", "x", "y", "distance from the product's mean"), rows, right=(1, 2, 3))
    typer.echo(figures.gaussian_product(result, out))
