"""The MLflow page in a real browser: the printed link shows the comparison without a click, a run its pictures by step.

Screenshots stay in $BPT_SCREENSHOTS where that is set, to be looked at.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from bpt_dist.figures_steps import draw_steps
from bpt_dist.files import write_json_atomic
from bpt_dist.journal import MetricsLog, read_records
from bpt_dist.run import Run
from bpt_dist.tracking import Request, Sender
from bpt_dist.tracking_page import Page, ui

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine; .ci/run installs it")
SIGMAS, RATES, STEPS = (0.01, 0.1, 1.0, 10.0), (0.1, 0.3, 1.0), 6
PATIENCE = 90


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
    with Run.open("name: x\n", "f", lambda old: [], folder / f"trial-{number:03d}-s0") as run:
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


def seen(link: str, folder: Path, name: str, until: str) -> str:
    """Open a link, wait until the script `until` is true, keep a screenshot, and return the text of the page."""
    kept = Path(os.environ.get("BPT_SCREENSHOTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1700,2000"]
    options += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", "about:blank"]
    browser = subprocess.Popen([str(BROWSER), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert browser.stderr is not None
        port = next(found[1] for line in browser.stderr if (found := re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line)))
        text, picture = asyncio.run(_visit(int(port), link, until))
    finally:
        browser.kill()
        browser.communicate()
    (kept / f"{name}.png").write_bytes(picture)
    return text


async def _visit(port: int, link: str, until: str) -> tuple[str, bytes]:
    async with aiohttp.ClientSession() as client:
        async with client.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(one for one in await answer.json() if one["type"] == "page")
        async with client.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
            numbers = itertools.count()

            async def call(method: str, **parameters: object) -> dict:
                number = next(numbers)
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (message := await socket.receive_json()).get("id") != number:
                    pass
                return message["result"]

            async def value(script: str) -> object:
                return (await call("Runtime.evaluate", expression=script))["result"].get("value")

            await call("Page.navigate", url=link)
            deadline = time.monotonic() + PATIENCE
            while not await value(until):
                text = await value("document.body ? document.body.innerText : ''")
                assert time.monotonic() < deadline, f"{until} is not true of the page: {text}"
                await asyncio.sleep(0.5)
            await asyncio.sleep(2)  # for what is drawn after that
            picture = await call("Page.captureScreenshot", format="png")
            return str(await value("document.body.innerText")), base64.b64decode(picture["data"])


def test_the_link_opens_on_the_comparison(served: tuple[Page, list[str]], tmp_path: Path) -> None:
    page, runs = served
    (link,) = page.links.values()
    lines = "document.querySelectorAll('.parcoords, g.parcoords, .parcoords-line-layers, .js-plotly-plot').length > 0"
    text = seen(link, tmp_path, "comparison", lines)
    for name in ("log10_sigma_relative", "lr_full", "sweep/score", "sigma=0.01 lr=0.1", "sigma=10 lr=1"):
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
