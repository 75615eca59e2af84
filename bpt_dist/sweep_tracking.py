"""The sweep in MLflow: flat runs with tags, the view that compares them, and the best prompts as registered models."""

from __future__ import annotations

import logging
from typing import Any

from bpt_dist.config import Config
from bpt_dist.errors import UserError
from bpt_dist.files import write_json_atomic
from bpt_dist.sweep_record import Record
from bpt_dist.sweep_settings import Trial
from bpt_dist.sweep_work import TAGS

# Twelve colours that stay apart: neighbours in a sweep must not share one.
COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D00", "#595959", 
    "#7B3FA0", "#3B7A57", "#B22222", "#1F9E9E",
)  # fmt: skip
SWEPT = "bpt.swept"
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


def warn_of_silence(record: Record) -> None:
    """Say before the first trial that nobody answers at the address of the store; the trials need no store."""
    from bpt_dist.tracking_store import reach

    for uri in {trial.config.tracking.uri for trial in record.trials if trial.config.tracking.mlflow} - {None}:
        try:
            reach(str(uri))
        except OSError as error:
            log.warning("tracking.uri: nobody answers at %s (%s); the sweep runs without it, --resume sends all later", uri, error)


def complete_tracking(record: Record) -> None:
    """Send what the mirrors of the trials could not, install the view, and register the prompts of the best setting.

    The store is not the truth: when it fails, a warning says how to go on later.
    """
    from bpt_dist.tracking import sync

    best = record.best()
    try:
        sent = None
        for trial in record.trials:
            if (trial.config.directory / "tracking.json").is_file():
                chosen = best is not None and trial.number == best.number
                if chosen:
                    write_json_atomic(trial.config.directory / TAGS, tags(record, trial) | {"bpt.best": "true"})
                sent = sync(trial.config.directory)
        if sent is not None and best is not None:
            # The alias stays with the last one: the seed with the best validation score.
            for one in sorted(record.standings(), key=lambda one: (one.score or 0.0, one.seed)):
                if one.number == best.number:
                    register(record.named(one.name).config)
        if sent is not None:
            _install(record, sent)
    except UserError as error:
        log.warning("the tracking store did not get all of the sweep (%s); --resume completes it later", error)


def register(config: Config) -> None:
    """Register each target's prompt of a trial as a version of `<experiment>-<task>` with the alias `champion`."""
    from bpt_dist.tracking_models import register_prompts

    register_prompts(config.directory, alias="champion")


def _install(record: Record, sent: Any) -> None:
    from bpt_dist.tracking_page import install_view
    from bpt_dist.tracking_store import connect

    install_view(connect(sent.uri), sent.experiment_id)
