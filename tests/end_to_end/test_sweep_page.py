"""The MLflow page in a real browser: the printed link shows the comparison without a click, a run its pictures by step.

Screenshots stay in $BPT_SCREENSHOTS where that is set, to be looked at.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, seen

from bpt_dist.artifacts.figures import draw_steps
from bpt_dist.storage.files import write_json_atomic
from bpt_dist.storage.metrics_log import MetricsLog, read_records
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tracking.request import Request
from bpt_dist.tracking.sender import Sender
from bpt_dist.tracking.ui import Page, ui

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine; .ci/run installs it")
SIGMAS, RATES, STEPS = (0.01, 0.1, 1.0, 10.0), (0.1, 0.3, 1.0), 6


def trial(folder: Path, number: int, sigma: float, rate: float, uri: str) -> str:
    """Write a run directory as a sweep leaves it, with a score of both values, mirror it, and return the MLflow run."""
    tags = {
        "bpt.sweep": "demo",
        "bpt.swept": "method.sigma_relative,method.lr_full",
        "mlflow.runName": f"sigma={sigma:g} lr={rate:g}",
    }
    params = {
        "method.sigma_relative": f"{sigma:g}",
        "method.log10_sigma_relative": f"{math.log10(sigma):g}",
        "method.lr_full": f"{rate:g}",
        "target.steps": "6",
    }
    with RunDirectory.open("name: x\n", "f", lambda old: [], folder / f"trial-{number:03d}-s0") as run:
        run.status("running")
        write_json_atomic(run.folder / "tags.json", tags)
        log = MetricsLog(run.folder / "metrics.jsonl")
        for step in range(1, STEPS + 1):
            angle = [2 * math.pi * m / 3 + step / 3 for m in range(3)]
            particles = {
                "projection": [[math.cos(a) / step, math.sin(a), step * 0.1] for a in angle],
                "kernel": [[math.exp(-abs(i - j) / step) for j in range(3)] for i in range(3)],
            }
            log.append({"step": step, "stage": "source", "metrics": {"source/loss": 1 / step}, "particles": particles})
        log.append(
            {"step": 0, "stage": "results", "metrics": {"sweep/score": 80 - 5 * math.log10(sigma) ** 2 - 10 * abs(rate - 0.3)}}
        )
        log.close()
        if number == 0:  # drawing takes longer than all the rest
            draw_steps(read_records(run.folder / "metrics.jsonl")[0], run.folder / "figures")
        run.status("finished")
        identity = run.id
    request = Request(
        id=identity, uri=uri, experiment="demo", run_name=f"trial-{number:03d}-s0", params=params, tags={"method": "bpt"}
    )
    write_json_atomic(run.folder / "tracking.json", {"uri": uri})
    sender = Sender(run.folder, request)
    sender.finish()
    sender.close()
    return str(sender.state["run_id"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, list[str]]]:
    folder = tmp_path_factory.mktemp("page")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    pairs = list(itertools.product(SIGMAS, RATES))
    runs = [trial(folder / "demo", number, sigma, rate, uri) for number, (sigma, rate) in enumerate(pairs)]
    page = ui(uri)
    yield page, runs
    page.close()


def test_the_link_opens_on_the_comparison(served: tuple[Page, list[str]], tmp_path: Path) -> None:
    page, runs = served
    (link,) = page.links.values()
    lines = "document.querySelectorAll('.parcoords, g.parcoords, .parcoords-line-layers, .js-plotly-plot').length > 0"
    text = seen(link, tmp_path, "comparison", lines)
    for name in ("log10 sigma_rel", "lr_full", "sweep/score", "sigma=0.01 lr=0.1", "sigma=10 lr=1"):
        assert name in text, name
    assert re.findall(r"^(\w+)\s+\(1\)$", text, re.MULTILINE)[0] == "Comparison"
    assert f"{len(runs)} matching runs" in text


def test_the_table_has_the_columns(served: tuple[Page, list[str]], tmp_path: Path) -> None:
    page, _ = served
    (link,) = page.links.values()
    text = seen(link.replace("compareRunsMode=CHART&", ""), tmp_path, "table", "document.body.innerText.includes('lr_full')")
    for name in ("sweep/score", "method.sigma_relative", "method.lr_full", "sigma=0.01 lr=0.1", "sigma=10 lr=1"):
        assert name in text, name


def test_a_run_shows_its_pictures_by_step(served: tuple[Page, list[str]], tmp_path: Path) -> None:
    page, runs = served
    (link,) = page.links.values()
    experiment = re.search(r"experiments/(\d+)/", link)
    assert experiment is not None
    place = f"{page.address}/#/experiments/{experiment[1]}/runs/{runs[0]}/model-metrics?workflowType=machine_learning"
    text = seen(place, tmp_path, "run", "document.querySelectorAll('[role=slider]').length > 1")
    assert "kernel" in text
    assert "particles" in text
    assert "No image logged at this step" not in text
