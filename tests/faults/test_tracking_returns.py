"""F11: a server that is away at the start, in the middle or at the end of a run, and comes back, has every point once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_figures import measured
from outages import Relay
from server import REPOSITORY, ForkServer
from test_tracking_outages import assert_history_is_the_truth
from trials import Job, Trials

from bpt_dist.storage.files import read_json
from bpt_dist.tracking.sender import sync
from bpt_dist.tracking.ui import Page, ui

STEPS = 40


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A real MLflow server."""
    found = ui(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
    yield found
    found.close()


@pytest.fixture
def relay(page: Page) -> Iterator[Relay]:
    with Relay(int(page.address.rpartition(":")[2])) as found:
        yield found


class Training:
    """`launcher/train.py` in a process of its own."""

    def __init__(self, job: Job) -> None:
        self.job = job
        # Steps of a third of a second: an outage of some of them is an outage of seconds.
        fault = "step.before_forward,stage=source,sleep:0.3"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "BPT_FAULT": fault}
        command = [sys.executable, "launcher/train.py", "--config", str(job.config)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self) -> str:
        """Wait for the end and return what was written to the terminal."""
        screen = self.process.communicate(timeout=120)[1]
        assert self.process.returncode == 0, screen
        return screen

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until `condition` holds; a process that ends before or takes longer is a failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"{self.logged} lines, step {self.sent} sent"
            time.sleep(0.02)

    @property
    def logged(self) -> int:
        """The lines of metrics.jsonl."""
        file = self.job.directory / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    @property
    def sent(self) -> int:
        """The last step whose loss is known to have arrived."""
        file = self.job.directory / "tracking.json"
        return int(read_json(file).get("sent", {}).get("source/loss", -1)) if file.exists() else -1

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def away_at_the_start(relay: Relay, training: Training) -> None:
    """Away when the run begins, back after step 10."""
    training.wait_for(lambda: training.logged >= 10)
    relay.set("open")


def away_in_the_middle(relay: Relay, training: Training) -> None:
    """There, away for some steps and silent for some more, back again."""
    training.wait_for(lambda: training.sent >= 3)
    relay.set("refused")
    away = training.logged
    training.wait_for(lambda: training.logged >= away + 6)
    relay.set("silent")
    training.wait_for(lambda: training.logged >= away + 12)
    relay.set("open")


def away_at_the_end(relay: Relay, training: Training) -> None:
    """There, and away for good from the middle on."""
    training.wait_for(lambda: training.sent >= 3)
    relay.set("refused")


OUTAGES = {"start": away_at_the_start, "middle": away_in_the_middle, "end": away_at_the_end}


def completed(directory: Path, uri: str, missing: bool) -> int:
    """Send what the run could not, hold the store against the run's own records, and return their number."""
    assert (sync(directory).points > 0) == missing
    assert sync(directory).points == 0
    return assert_history_is_the_truth(directory, uri)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("when", OUTAGES)
def test_a_server_that_comes_back_has_every_point_once(
    when: str, trials: Trials, server: ForkServer, relay: Relay, page: Page
) -> None:
    with measured("F11", "whole runs, server away and back", when) as figures:
        if when == "start":
            relay.set("refused")
        tracking = {"mlflow": True, "uri": f"http://127.0.0.1:{relay.port}", "experiment": when}
        sections = {"data": {"target_tasks": ["mood"]}, "source": {"steps": STEPS, "checkpoint_every": STEPS}}
        job = trials.job(tracking=tracking, **sections)
        with Training(job) as training:
            OUTAGES[when](relay, training)
            screen = training.finish()
        missing = "the tracking store did not get all of" in screen
        if when == "end":
            assert missing, screen
            assert training.sent < STEPS
            relay.set("open")
        figures["points"] = server.call(completed, job.directory, page.address, missing, seconds=120)
        assert figures["points"] > STEPS
