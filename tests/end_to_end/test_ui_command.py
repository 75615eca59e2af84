"""`bpt-dist ui` leaves no server behind, however it is ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bpt_dist.tracking.store import connect

START_SECONDS, END_SECONDS = 300, 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    connect(f"sqlite:///{folder / 'mlflow.db'}").create_experiment("demo")
    return folder


def started(runs: Path) -> subprocess.Popen[str]:
    program = "from bpt_dist.commands.main import main; main()"
    command = [sys.executable, "-c", program, "ui", "--runs", str(runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_all_gone(servers: list[psutil.Process]) -> None:
    left = psutil.wait_procs(servers, timeout=END_SECONDS)[1]
    commands = [process.cmdline() for process in left if process.is_running()]
    for process in left:
        process.kill()
    assert not commands


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_page_that_is_up(runs: Path, number: signal.Signals) -> None:
    with started(runs) as page:
        assert page.stdout is not None
        address = page.stdout.readline()
        assert re.match(r"http://127.0.0.1:\d+$", address), address
        assert "demo: http://" in page.stdout.readline()
        servers = descendants(page)
        assert len(servers) > 1
        page.send_signal(number)
        assert page.wait(END_SECONDS) == (0 if number == signal.SIGTERM else -number)
    assert_all_gone(servers)


def test_a_page_that_is_starting(runs: Path) -> None:
    with started(runs) as page:
        deadline = time.monotonic() + START_SECONDS
        while not (servers := descendants(page)):
            assert page.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        page.terminate()
        page.wait(END_SECONDS)
    assert_all_gone(servers)
