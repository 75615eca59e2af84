"""The MLflow page of a table in a real browser: its link opens on the scores of all methods, though each has parameters of its own.

Screenshots stay in $BPT_SCREENSHOTS where that is set, to be looked at.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, seen

from bpt_dist.storage.files import write_json_atomic
from bpt_dist.storage.metrics_log import BEST_SCORE, MetricsLog
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tracking.names import COLOR, ROW
from bpt_dist.tracking.request import Request
from bpt_dist.tracking.sender import Sender
from bpt_dist.tracking.store import connect
from bpt_dist.tracking.ui import Page, publish_table, ui

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine; .ci/run installs it")
OWN = {
    "lora": {"method.rank": "8", "method.alpha": "16"},
    "prompt_tuning": {"method.length": "20"},
    "bpt": {"method.length": "20", "method.num_particles": "4", "method.sigma_relative": "1.0"},
}
SCORES = {"lora": (71.0, 66.0), "prompt_tuning": (64.0, 58.0), "bpt": (69.0, 70.0)}
TABLE = "| Method | mini_rte | mini_review |\n|---|---|---|\n| lora | 71.0 | 66.0 |\n| bpt | 69.0 | **70.0** |\n"


def train(folder: Path, method: str, seed: int, uri: str) -> None:
    """Leave a run directory as a row of a table does, and mirror it."""
    with RunDirectory.open("name: x\n", "f", lambda old: [], folder / f"{method}-s{seed}") as run:
        run.status("running")
        log = MetricsLog(run.folder / "metrics.jsonl")
        first, second = (value + seed for value in SCORES[method])
        for step in (1, 2):
            log.append({"step": step, "stage": "target/mini_rte", "metrics": {"target/loss": 1 / step}})
        log.append({"step": 2, "stage": "target/mini_rte", "metrics": {"best/mini_rte": first}})
        log.append({"step": 2, "stage": "target/mini_review", "metrics": {"best/mini_review": second}})
        log.append({"step": 0, "stage": "results", "metrics": {BEST_SCORE: (first + second) / 2}})
        log.close()
        run.status("finished")
        tags = {ROW: method, "method": method}
        params = {"method.name": method, "target.lr": str(0.1 + len(method) / 100), **OWN[method]}
        request = Request(
            id=run.id,
            uri=uri,
            experiment="table",
            run_name=f"{method}-s{seed}",
            params=params,
            tags=tags,
        )
    write_json_atomic(run.folder / "tracking.json", {"uri": uri})
    sender = Sender(run.folder, request)
    sender.finish()
    sender.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for seed, method in itertools.product((0, 1), OWN):
        train(folder / "table", method, seed, uri)
    publish_table(uri, "table", TABLE)
    client = connect(uri)
    experiment = client.get_experiment_by_name("table")
    runs = client.search_runs([experiment.experiment_id])
    colors = {(run.data.tags[ROW], run.data.tags[COLOR]) for run in runs}
    assert len(colors) == len({color for _, color in colors}) == len(OWN), "a colour a method, and no two methods in one"
    page = ui(uri)
    yield page
    page.close()


def test_the_link_opens_on_the_scores_of_all_methods(served: Page, tmp_path: Path) -> None:
    (link,) = served.links.values()
    # What is below the edge of the window is drawn when it comes into sight: the second row of charts.
    drawn = "document.querySelectorAll('.js-plotly-plot').length > 1 && document.body.innerText.includes('best/mini_review')"
    text = seen(link, tmp_path, "table_comparison", drawn)
    first = re.findall(r"^(\w+)\s+\((\d+)\)$", text, re.MULTILINE)[0]
    assert first == ("Comparison", "4"), "three scores and the lines; a section of 0 charts is what it was"
    for name in ("best/score", "best/mini_review"):
        assert name in text, name
    bars = re.findall(r"^\w+-s[01]$", text.partition("best/score")[2], re.MULTILINE)[: 2 * len(OWN)]
    assert bars == [f"{method}-s{seed}" for method in sorted(OWN) for seed in (0, 1)]
    for method, seed in itertools.product(OWN, (0, 1)):
        assert f"{method}-s{seed}" in text
    assert "No chart data available" not in text
    assert "6 matching runs" in text


def test_the_table_is_the_description(served: Page, tmp_path: Path) -> None:
    (link,) = served.links.values()
    address, _, query = link.partition("?")
    shown = "document.body.innerText.includes('mini_review') && document.querySelectorAll('table').length > 0"
    text = seen(f"{address}?{query}", tmp_path, "table_description", shown)
    assert "71.0" in text
