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
from bpt_dist.tracking import connect

VIEW = "bpt-dist"
HEADLINE = "best/score"
COLUMNS = ("method", "target.prior", "target.sigma", "method.lr_full", "method.lr_low_rank", "target.lr")
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


def ui(uri: str, port: int | None = None, *, headline: str = HEADLINE, params: Sequence[str] = COLUMNS) -> Page:
    """Start the page of a sqlite store on 127.0.0.1 (on a free port if None is given) and wait for it.

    The links open on parallel coordinates of `params` and `headline`. Raises ConfigError for an occupied
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


def install_view(client: Any, experiment_id: str, *, headline: str, params: Sequence[str]) -> None:
    """Save the view the links open: MLflow's internal format, so a failure is only a plainer page."""
    state = {
        "selectedColumns": [
            "attributes.`Source`",
            f"metrics.`{headline}`",
            *(f"params.`{name}`" for name in params),
        ],
        "compareRunCharts": [
            {
                "type": "PARALLEL",
                "uuid": f"{VIEW}-parallel",
                "runsCountToCompare": 100,
                "selectedParams": list(params),
                "selectedMetrics": [headline],
                "metricSectionId": f"{VIEW}-section",
                "deleted": False,
                "isGenerated": False,
            }
        ],
        "compareRunSections": [
            {
                "uuid": f"{VIEW}-section",
                "name": "Comparison",
                "display": True,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
        ],
        "runsHiddenMode": "FIRST_20_RUNS",
    }
    now = int(time.time() * 1000)
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = {"name": "bpt_dist", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    try:
        client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    except Exception as error:
        log.warning("the view of experiment %s could not be saved (%s)", experiment_id, error)


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
