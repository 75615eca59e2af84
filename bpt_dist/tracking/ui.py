"""The MLflow page: start it on the loopback address, and links that open on the comparison of runs."""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bpt_dist.storage.metrics_log import BEST_SCORE, SWEEP_SCORE
from bpt_dist.tracking.answer import ask, explain
from bpt_dist.tracking.names import ROW, SWEPT, axis_names, log10_name
from bpt_dist.tracking.server import Server
from bpt_dist.tracking.store import connect

VIEW = "bpt-dist"
COLUMNS = (
    "method.name",
    "method.prior",
    "method.sigma",
    "method.sigma_relative",
    "method.lr_full",
    "method.lr_low_rank",
    "target.lr",
)
TAG = f"mlflow.sharedViewState.{VIEW}"
COMPARED_RUNS = 100
# Bars have the reverse order of the runs: so the seeds of a row are side by side. In the link it would switch the view off.
BY_NAME = {"orderByKey": "tags.`mlflow.runName`", "orderByAsc": False}
MIN_ROWS = 2
SCORES = "best/"  # and the name of a task
LONGEST_TEXT = 20_000
CUT = "\n\nThe rest is in the table's own file.\n"
log = logging.getLogger(__name__)


@dataclass
class Page:
    """A running MLflow page (`server` is None if the store is one itself) and one link per experiment."""

    address: str
    links: dict[str, str]
    server: Server | None

    def close(self) -> None:
        """End the server."""
        if self.server is not None:
            self.server.end()


def ui(uri: str, port: int | None = None, *, headline: str | None = None, params: Sequence[str] | None = None) -> Page:
    """Start the page of a sqlite store on 127.0.0.1 (on a free port if None is given) and wait for it.

    The links open on the comparison of the runs by `params` (see `install_view`) and `headline`. Raises ConfigError for an occupied
    port, StorageError if the server ends or is silent for five minutes.
    """
    client = connect(uri)
    experiments = {experiment.name: experiment.experiment_id for experiment in client.search_experiments()}
    experiments.pop("Default", None)
    for experiment_id in experiments.values():
        install_view(client, experiment_id, headline=headline, params=params)
    if uri.startswith("http"):
        return Page(uri, _links(uri, experiments), None)
    server = Server(uri, port)
    return Page(server.address, _links(server.address, experiments), server)


def install_view(client: Any, experiment_id: str, *, headline: str | None = None, params: Sequence[str] | None = None) -> None:
    """Save the view the links open, once for what there is to compare; a failure is only a plainer page (the format is internal).

    Without `params` these are the searched keys of the experiment's sweep, or the usual ones that differ between its runs. Without
    `headline` it is the score of a sweep, which pruned trials have too, or the score of finished runs.
    """
    try:
        runs = client.search_runs([experiment_id], max_results=COMPARED_RUNS)
        of_sweep = any(SWEEP_SCORE in run.data.metrics for run in runs)
        headline = headline or (SWEEP_SCORE if of_sweep else BEST_SCORE)
        shown = list(params or compared(runs))
        columns = params or searched(runs) or shown
        bars = [] if of_sweep else scores(runs)
        finished = [run for run in runs if headline in run.data.metrics]
        lines = [name for name in bars if name != headline and all(name in run.data.metrics for run in finished)]
        state = _state(shown, columns, bars, [*lines, headline])
        saved = client.get_experiment(experiment_id).tags.get(TAG)
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        if saved is not None and json.loads(saved)["state"] == f"deflate;{packed}":
            return
        now = int(time.time() * 1000)
        view = {"name": "bpt_dist", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
        client.set_experiment_tag(experiment_id, TAG, json.dumps(view))
    except Exception as error:
        log.warning("the view of experiment %s could not be saved (%s)", experiment_id, error)


def compared(runs: Sequence[Any]) -> list[str]:
    """Return the parameters by which MLflow runs are told apart, sigma by its logarithm: the axes are linear.

    A chart leaves out every run that lacks one of its parameters, and methods differ in theirs: only what all runs have is shown.
    """
    swept = searched(runs)
    common = set.intersection(*(set(run.data.params) for run in runs)) if runs else set[str]()
    short = [axis if axis in common else log10_name(key) or key for key, axis in axis_names(swept).items()]
    if short:
        return short
    usual = [log10_name(key) or key for key in COLUMNS]
    values = {key: {run.data.params[key] for run in runs} for key in usual if key in common}
    return [key for key, found in values.items() if len(found) > 1] or [key for key in usual if key in common] or usual


def searched(runs: Sequence[Any]) -> list[str]:
    """Return the keys that the sweeps of these runs search, dotted."""
    return list(dict.fromkeys(key for run in runs for key in run.data.tags.get(SWEPT, "").split(",") if key))


def scores(runs: Sequence[Any]) -> list[str]:
    """Return the scores by which the rows of a table are compared, the mean over its tasks first; none for runs of one row."""
    if len({run.data.tags.get(ROW) for run in runs}) < MIN_ROWS:
        return []
    found = dict.fromkeys(name for run in runs for name in sorted(run.data.metrics) if name.startswith(SCORES))
    tasks = [name for name in found if name != BEST_SCORE]
    return [BEST_SCORE, *(tasks if len(tasks) > 1 else [])]


def describe(client: Any, experiment_id: str, text: str) -> None:
    """Make a text in Markdown the description of an experiment; one that is too long ends with a sentence about it."""
    if len(text) > LONGEST_TEXT:
        text = text[: text.rindex("\n", 0, LONGEST_TEXT - len(CUT))] + CUT
    client.set_experiment_tag(experiment_id, "mlflow.note.content", text)


def publish_table(uri: str, experiment: str, text: str) -> None:
    """Make a results table the description of its experiment and install the view that compares its rows.

    A failing store is no failure of the table: a warning says what it answers.
    """
    try:
        ask(uri, experiment)
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            describe(client, found.experiment_id, text)
            install_view(client, found.experiment_id)
    except Exception as error:
        log.warning("tracking: the table is no description of its experiment: %s", explain(error, uri, experiment))


def _state(params: Sequence[str], shown: Sequence[str], scores: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the state of the view: bars of `scores`, lines over `params` and `metrics`, a table with the parameters `shown`."""
    common = {
        "runsCountToCompare": COMPARED_RUNS,
        "metricSectionId": f"{VIEW}-section",
        "deleted": False,
        "isGenerated": False,
    }
    bars = [{**common, "type": "BAR", "uuid": f"{VIEW}-bar-{number}", "metricKey": name} for number, name in enumerate(scores)]
    lines = {
        **common,
        "type": "PARALLEL",
        "uuid": f"{VIEW}-parallel",
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),  # the last axis gives the colours
    }
    section = {
        "uuid": f"{VIEW}-section",
        "name": "Comparison",
        "columns": 2 if len(bars) > 1 else 1,
        "cardHeight": 360 if bars else 520,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }
    columns = [f"metrics.`{name}`" for name in dict.fromkeys((metrics[-1], BEST_SCORE, *scores))]
    columns += [f"params.`{name.replace('log10_', '')}`" for name in shown]
    return {
        "selectedColumns": columns,
        "compareRunCharts": [*bars, lines],
        "compareRunSections": [section],
        "isAccordionReordered": True,  # else MLflow puts the sections it makes of every metric in alphabetical order before it
        "runsHiddenMode": "SHOW_ALL",
        **(BY_NAME if bars else {}),
    }


def _links(address: str, experiments: dict[str, str]) -> dict[str, str]:
    # Without the workflow type the page opens on traces of language-model applications.
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    return {name: f"{address.rstrip('/')}/#/experiments/{number}/runs?{query}" for name, number in experiments.items()}
