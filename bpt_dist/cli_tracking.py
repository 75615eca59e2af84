"""`bpt-dist sync` and `bpt-dist ui`: MLflow after the run."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from bpt_dist.errors import ConfigError
from bpt_dist.settings.tracking_uri import problem_with_uri


def send_missing(run: Path) -> None:
    """Complete the MLflow run of a run folder and say what was sent."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give the folder of a run")
    from bpt_dist.tracking import sync

    sent = sync(run.resolve())
    typer.echo(f"{run}: {sent.points} points sent to run {sent.run_id} of experiment {sent.experiment_id} in {sent.uri}")


def serve_page(uri: str | None, port: int | None, runs: Path) -> None:
    """Start the page, print its links and keep it up until Ctrl-C."""
    store = runs.resolve() / "mlflow.db"
    if uri is None and not store.is_file():
        raise ConfigError(f"{store}: no tracking store; give --runs DIR (the `output` of the runs) or --uri")
    problem = None if uri is None else problem_with_uri(uri, allow_insecure=True)
    if problem is not None:
        raise ConfigError(f"--uri: {problem}")
    from bpt_dist.tracking_page import ui

    page = ui(uri or f"sqlite:///{store}", port)
    try:
        typer.echo(page.address)
        for experiment, link in page.links.items():
            typer.echo(f"  {experiment}: {link}")
        if page.process is not None:
            typer.echo("Ctrl-C ends the page.")
            while page.process.poll() is None:
                time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        page.close()
