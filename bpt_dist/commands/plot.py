"""`bpt-dist plot`: draw the figures of a run again from its metrics."""

from __future__ import annotations

from pathlib import Path

import typer

from bpt_dist.errors import DataError


def print_figures(run: Path, out: Path | None) -> None:
    """Draw the figures of `run` and print the files."""
    from bpt_dist.artifacts.figures import draw_run
    from bpt_dist.storage import layout
    from bpt_dist.storage.metrics_log import iter_records
    from bpt_dist.storage.snapshots import with_snapshots

    metrics = run / layout.METRICS
    if not metrics.is_file():
        raise DataError(f"{run}: has no {layout.METRICS}; give the folder of a run")
    records = list(with_snapshots(iter_records(metrics), run))
    drawn = draw_run(records, out or run / layout.FIGURES)
    if not drawn:
        raise DataError(f"{metrics}: holds no losses yet; draw again when the run has taken some steps")
    for file in drawn:
        typer.echo(file)
