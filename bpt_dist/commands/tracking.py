"""`bpt-dist sync` and `bpt-dist ui`: MLflow after the run."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from bpt_dist.config.mlflow_environment import URI, uri_of_environment
from bpt_dist.config.sections import TrackingConfig, problem_with_uri
from bpt_dist.errors import ConfigError
from bpt_dist.tracking.places import default_store, sqlite_uri

if TYPE_CHECKING:
    from bpt_dist.tracking.ui import Page


def send_missing(run: Path, *, as_json: bool = False) -> None:
    """Complete the MLflow run of a run folder and print what was sent."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give the folder of a run")
    from bpt_dist.tracking.sender import sync

    sent = sync(run.resolve())
    if as_json:
        typer.echo(json.dumps(asdict(sent), indent=1))
        return
    typer.echo(f"{run}: {sent.points} points sent to run {sent.run_id} of experiment {sent.experiment_id} in {sent.uri}")


def serve_page(uri: str | None, port: int | None, runs: Path | None) -> None:
    """Start the page, print its links and keep it up until Ctrl-C or SIGTERM."""
    store = default_store(runs or Path("runs"))
    if uri is None and runs is None and (uri := uri_of_environment(TrackingConfig(allow_insecure=True))) is not None:
        typer.echo(f"{URI} is used, because neither --uri nor --runs is given: {uri}")
    if uri is None and not store.is_file():
        raise ConfigError(f"{store}: no tracking store; give --runs DIR (the `output` of the runs) or --uri")
    problem = None if uri is None else problem_with_uri(uri, allow_insecure=True)
    if problem is not None:
        raise ConfigError(f"--uri: {problem}")
    from bpt_dist.tracking.ui import ui

    # As Ctrl-C: also while the server starts, and when the terminal is closed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    page: Page | None = None
    try:
        page = ui(uri or sqlite_uri(store), port)
        typer.echo(page.address)
        for experiment, link in page.links.items():
            typer.echo(f"  {experiment}: {link}")
        if page.server is not None:
            typer.echo("Ctrl-C ends the page.")
            while page.server.is_up():
                time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        if page is not None:
            page.close()


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
