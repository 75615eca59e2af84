"""Sweeps as processes: start one as a terminal would, find the processes of its trials, and see that none is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from bpt_dist.storage.lock import holder_of
from bpt_dist.storage.metrics_log import read_records
from bpt_dist.tracking.sender import LOGS, metric_key

ROOT = Path(__file__).parents[2]
MARK = "BPT_TEST_SWEEP"
ORPHAN_SECONDS = 15


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a sweep in `folder`: what all its processes inherit tells them from those of others."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1", MARK: str(folder)}


def start(file: Path, *words: str, prefix: Sequence[str] = (), cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """Start a sweep in its own session, as a terminal would; `prefix` are words of a command that starts it."""
    command = [*prefix, sys.executable, str(ROOT / "launcher" / "sweep.py"), "--config", str(file), *words]
    own = environment(file.parent) | variables
    return subprocess.Popen(
        command, cwd=cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(found: Callable[[], object], seconds: float = 240) -> object:
    """Return what `found` returns as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def lines(run: Path) -> list[dict]:
    """Return the records of metrics.jsonl."""
    return read_records(run / "metrics.jsonl")[0]


def alive(runs: Sequence[Path], driver: int, num_lines: int) -> tuple[int, Path] | None:
    """Return process and folder of a trial of this driver that has logged some of its `num_lines` steps, but not all."""
    for run in runs:
        holder = holder_of(run) if run.is_dir() else None
        if holder is not None and 3 <= len(lines(run)) < num_lines:
            with contextlib.suppress(psutil.Error):
                if driver in (parent.pid for parent in psutil.Process(holder.pid).parents()):
                    return holder.pid, run
    return None


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes of Ray and of ours that work for the sweep in `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def assert_nothing_left(folder: Path) -> float:
    """Assert that no process of the sweep is alive 15 s after its end, and no folder of Ray is left; return the seconds it took."""
    began = time.monotonic()
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    assert not list(folder.glob("runs/*/ray*"))
    return round(time.monotonic() - began, 2)


def points_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what MLflow has to hold of a run: each record of its logs, by MLflow's name of the metric."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in [record for name in LOGS for record in read_records(run / name)[0]]:
        for name, value in record["metrics"].items():
            points.setdefault(metric_key(record["stage"], name), []).append((record["step"], value))
    return points
