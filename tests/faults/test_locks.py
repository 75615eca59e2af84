"""F18: of two processes that open one run directory, exactly one gets it; a dead holder is succeeded; no line is mixed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fault_figures import measured, record_figure

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage import lock as locks
from bpt_dist.storage.files import read_json
from bpt_dist.storage.lock import STALE, RunLock
from bpt_dist.storage.metrics_log import MetricsLog
from bpt_dist.storage.run_directory import RunDirectory


def open_and_write(folder: Path, barrier, results, done) -> None:  # type: ignore[no-untyped-def]
    """Open the run together with the others at the `barrier`, write some records as the winner."""
    barrier.wait(30)
    at = time.monotonic()
    try:
        run = RunDirectory.open("name: x\n", "f", lambda old: [], folder)
    except ConfigError as error:
        results.put((at, str(error)))
        return
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(20):
        log.append({"step": step, "stage": "source", "metrics": {"source/loss": float(os.getpid())}})
    results.put((at, None))
    done.wait(20)
    log.close()
    run.close()


def test_of_two_starts_within_ten_milliseconds_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    winners, apart, mixed = [], [], 0
    for number in range(100):
        folder, results, done = tmp_path / str(number), context.Queue(), context.Event()
        barrier = context.Barrier(2)
        both = [context.Process(target=open_and_write, args=(folder, barrier, results, done)) for _ in range(2)]
        for process in both:
            process.start()
        found = [results.get(timeout=30) for _ in both]
        done.set()
        for process in both:
            process.join(30)
        winners.append(sum(text is None for _, text in found))
        apart.append(abs(found[0][0] - found[1][0]))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        mixed += len({line["metrics"]["source/loss"] for line in lines}) != 1 or len(lines) != 20
        assert all(text is None or "pid" in text for _, text in found)
    close = sum(seconds < 0.01 for seconds in apart)
    record_figure("F18", "two starts at once", trials=100, passed=winners.count(1), within_10_ms=close, mixed_files=mixed)
    assert winners == [1] * 100
    assert mixed == 0


def hold(folder: Path, ready) -> None:  # type: ignore[no-untyped-def]
    RunLock(folder).acquire()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("number", range(3))
def test_a_killed_holder_on_this_machine_is_succeeded_at_once(number: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(20)
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    with measured("F18", "holder killed, same machine", str(number)):
        lock = RunLock(tmp_path)
        lock.acquire()
        assert lock.taken_from is not None
        assert lock.taken_from.pid == holder.pid
        lock.release()


def test_a_holder_on_a_dead_machine_is_succeeded_after_a_minute_of_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its silence so far is put into the time stamp; the watching is real, a tenth as long."""
    remote = RunLock(tmp_path)
    remote.me = replace(remote.me, machine="elsewhere", host="other")
    monkeypatch.setattr(remote, "_beat", lambda: None)
    remote.acquire()
    now = time.time()
    os.utime(tmp_path / locks.NAME, (now - STALE + 5,) * 2)
    with pytest.raises(ConfigError, match="host other"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / locks.NAME, (now - STALE - 1,) * 2)
    began = time.monotonic()
    lock = RunLock(tmp_path, heartbeat=1.0)
    lock.acquire()
    watched = time.monotonic() - began
    assert 1.5 <= watched <= 3
    assert lock.taken_from is not None
    # With a heartbeat of 10 s the watching takes 15: the silence that ends in a takeover.
    worst = STALE + 1.5 * 10
    record_figure(
        "F18", "holder's machine gone: seconds of silence before the takeover", worst_seconds=worst, watching_measured=watched
    )
    assert worst <= 70
    with pytest.raises(StorageError, match="taken by host"):
        remote.check()
    lock.release()
    assert not (tmp_path / locks.NAME).exists()


def test_the_record_of_a_run_names_whom_it_was_taken_from(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results, done = context.Queue(), context.Event()
    process = context.Process(target=open_and_write, args=(tmp_path / "run", context.Barrier(1), results, done))
    process.start()
    assert results.get(timeout=30)[1] is None
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    RunDirectory.open("name: x\n", "f", lambda old: [], tmp_path / "run").close()
    assert f"pid {process.pid}" in read_json(tmp_path / "run" / "run.json")["openings"][-1]["taken_from"]
