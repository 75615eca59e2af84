"""The sweep in MLflow: flat runs with tags, the view that compares them, and the best prompts as registered models."""

from __future__ import annotations

import logging
from typing import Any

from bpt_dist.commands.sweep.record import Record
from bpt_dist.commands.sweep.settings import Trial
from bpt_dist.commands.sweep.trial import TAGS
from bpt_dist.config import RunConfig
from bpt_dist.errors import UserError
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.storage.layout import TRACKING
from bpt_dist.tracking.names import COLORS, SWEPT

BEST = "bpt.best"
log = logging.getLogger(__name__)


def tags(record: Record, trial: Trial) -> dict[str, str]:
    """Return what MLflow knows of a trial beside its configuration."""
    return {
        "bpt.sweep": record.sweep.settings.name,
        "bpt.sweep_id": record.id,
        "bpt.sweep_stage": record.sweep.settings.stage,
        "bpt.trial": str(trial.number),
        SWEPT: ",".join(record.sweep.keys),
        "mlflow.runName": trial.title,
        "mlflow.runColor": COLORS[record.trials.index(trial) % len(COLORS)],
    }


def complete_tracking(record: Record) -> None:
    """Send what the mirrors of the trials could not, install the view, and register the prompts of the best setting.

    A sweep that did not complete registers nothing and marks no best setting: the champion of a complete sweep stays. A failing
    store is no failure of the sweep: a warning says how to complete it later.
    """
    from bpt_dist.tracking.sender import sync

    best = None if record.has_work() else record.best()
    try:
        sent = None
        for trial in record.trials:
            if (trial.config.directory / TRACKING).is_file():
                if best is not None:
                    _mark(record, trial, chosen=trial.number == best.number)
                sent = sync(trial.config.directory)
        if sent is not None and best is not None:
            # The alias stays with the last one: the seed with the best validation score.
            for status in sorted(record.standings(), key=lambda status: (status.score or 0.0, status.seed)):
                if status.number == best.number:
                    register(record.named(status.name).config)
        if sent is not None:
            _install(record, sent)
    except UserError as error:
        log.warning("the tracking store did not get all of the sweep (%s); --resume completes it later", error)


def _mark(record: Record, trial: Trial, *, chosen: bool) -> None:
    """Tag the trials of the best setting, and take the tag from those of an earlier best one."""
    file = trial.config.directory / TAGS
    present = read_json(file) if file.is_file() else tags(record, trial)
    if chosen or BEST in present:
        write_json_atomic(file, present | {BEST: str(chosen).lower()})


def register(config: RunConfig) -> None:
    """Register each target's prompt of a trial as a version of `<experiment>-<task>` with the alias `champion`."""
    from bpt_dist.tracking.registry import register_prompts

    register_prompts(config.directory, alias="champion")


def _install(record: Record, sent: Any) -> None:
    from bpt_dist.tracking.store import connect
    from bpt_dist.tracking.ui import install_view

    install_view(connect(sent.uri), sent.experiment_id)
