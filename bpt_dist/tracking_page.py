"""The MLflow page: start it on the loopback address, and links that open on the comparison of runs."""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.tracking import log10_name
from bpt_dist.tracking_store import connect

VIEW = "bpt-dist"
HEADLINE, SWEEP_SCORE = "best/score", "sweep/score"
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
START_SECONDS = 120
log = logging.getLogger(__name__)


@dataclass
class Page:
    """A running MLflow page (`process` is None if the store is a server) and one link per experiment."""

    address: str
    links: dict[str, str]
    process: subprocess.Popen[bytes] | None

    def close(self) -> None:
        """End the server."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=20)


def ui(uri: str, port: int | None = None, *, headline: str | None = None, params: Sequence[str] | None = None) -> Page:
    """Start the page of a sqlite store on 127.0.0.1 (on a free port if None is given) and wait for it.

    The links open on parallel coordinates of `params` (see `install_view`) and `headline`. Raises ConfigError for an occupied
    port, StorageError if the server ends or is silent for two minutes.
    """
    client = connect(uri)
    experiments = {experiment.name: experiment.experiment_id for experiment in client.search_experiments()}
    experiments.pop("Default", None)
    for experiment_id in experiments.values():
        install_view(client, experiment_id, headline=headline, params=params)
    if uri.startswith("http"):
        return Page(uri, _links(uri, experiments), None)
    port = _free_port(port)
    address = f"http://127.0.0.1:{port}"
    process = _serve(uri, port)
    _await_answer(address, process)
    return Page(address, _links(address, experiments), process)


def install_view(client: Any, experiment_id: str, *, headline: str | None = None, params: Sequence[str] | None = None) -> None:
    """Save the view the links open, once for what there is to compare; a failure is only a plainer page (the format is internal).

    Without `params` these are the searched keys of the experiment's sweep, or the usual ones that differ between its runs. Without
    `headline` it is the score of a sweep, which pruned trials have too, or the score of finished runs.
    """
    try:
        runs = client.search_runs([experiment_id], max_results=COMPARED_RUNS)
        of_sweep = any(SWEEP_SCORE in run.data.metrics for run in runs)
        headline = headline or (SWEEP_SCORE if of_sweep else HEADLINE)
        shown = list(params or compared(runs))
        before = client.get_experiment(experiment_id).tags.get(TAG)
        state = _state(headline, shown)
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        if before is not None and json.loads(before)["state"] == f"deflate;{packed}":
            return
        now = int(time.time() * 1000)
        view = {"name": "bpt_dist", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
        client.set_experiment_tag(experiment_id, TAG, json.dumps(view))
    except Exception as error:
        log.warning("the view of experiment %s could not be saved (%s)", experiment_id, error)


def compared(runs: Sequence[Any]) -> list[str]:
    """Return the parameters by which MLflow runs are told apart, sigma by its logarithm: the axes are linear."""
    swept = [key for run in runs for key in run.data.tags.get("bpt.swept", "").split(",") if key]
    values: dict[str, set[str]] = {}
    for run in runs:
        for key in dict.fromkeys([*swept, *COLUMNS]):
            values.setdefault(log10_name(key) or key, set()).add(run.data.params.get(log10_name(key) or key, ""))
    of_sweep = dict.fromkeys(log10_name(key) or key for key in swept)
    return list(of_sweep) or [key for key, found in values.items() if len(found) > 1] or list(COLUMNS)


def _state(headline: str, params: Sequence[str]) -> dict[str, Any]:
    chart = {
        "type": "PARALLEL",
        "uuid": f"{VIEW}-parallel",
        "runsCountToCompare": COMPARED_RUNS,
        "selectedParams": list(params),
        "selectedMetrics": [headline],
        "metricSectionId": f"{VIEW}-section",
        "deleted": False,
        "isGenerated": False,
    }
    section = {
        "uuid": f"{VIEW}-section",
        "name": "Comparison",
        "columns": 1,
        "cardHeight": 520,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }
    logged = [name for name in params if "log10_" in name]
    columns = [f"metrics.`{name}`" for name in dict.fromkeys((headline, HEADLINE))]
    columns += [f"params.`{name.replace('log10_', '')}`" for name in logged]
    columns += [f"params.`{name}`" for name in params if name not in logged]
    return {
        "selectedColumns": columns,
        "compareRunCharts": [chart],
        "compareRunSections": [section],
        "isAccordionReordered": True,  # else MLflow puts the sections it makes of every metric in alphabetical order before it
        "runsHiddenMode": "SHOW_ALL",
    }


def _links(address: str, experiments: dict[str, str]) -> dict[str, str]:
    # Without the workflow type the page opens on traces of language-model applications.
    query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={VIEW}"
    return {name: f"{address.rstrip('/')}/#/experiments/{number}/runs?{query}" for name, number in experiments.items()}


def _free_port(port: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ConfigError(f"port {port} is in use; choose another one or leave it out") from error
        return probe.getsockname()[1]


def _serve(uri: str, port: int) -> subprocess.Popen[bytes]:
    place = Path(uri.removeprefix("sqlite:///")).parent
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--workers",
        "1",
        "--default-artifact-root",
        (place / "mlartifacts").as_uri(),
    ]
    # Job workers would cost eight more processes and 1.1 GB.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.Popen(command, env=environment, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _await_answer(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):  # noqa: S310  our own http address
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    code = process.poll()
    process.kill()
    process.wait()
    ending = "did not answer" if code is None else f"ended with {code}"
    raise StorageError(f"{address}: the MLflow server {ending}; run `mlflow server` by hand to see why")
