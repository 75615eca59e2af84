"""F11: a tracking server that is down, silent or broken costs a step nothing, an end seconds; its history is complete later."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_figures import measured
from server import ForkServer
from trials import Job, Trials

from bpt_dist.storage.metrics_log import COST, read_records
from bpt_dist.tracking.sender import LOGS, metric_key, sync
from bpt_dist.tracking.store import connect

STEPS = 60


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every request with an error, or never."""

    status: int | None = None

    def do_GET(self) -> None:
        if self.status is None:
            time.sleep(30)
        else:
            self.send_error(self.status)

    do_POST = do_GET  # noqa: N815 - the name http.server looks for

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])  # bound, nobody listens


@contextlib.contextmanager
def stub(status: int | None) -> Iterator[int]:
    handler = type("Handler", (Answering,), {"status": status})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


class Timed:
    """Write down what a step pays for its record, and what the end of the job waits for tracking; CPU seconds and seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        from bpt_dist import train
        from bpt_dist.storage import metrics_log

        append, shutdown, seconds = metrics_log.MetricsLog.append, train.shutdown, []

        def timed(log: Any, record: Any) -> None:
            began = time.thread_time()
            append(log, record)
            seconds.append(time.thread_time() - began)

        def timed_shutdown() -> Any:
            began = time.monotonic()
            found = shutdown()
            (self.folder / "timed.json").write_text(json.dumps({"appends": seconds, "exit": time.monotonic() - began}))
            return found

        metrics_log.MetricsLog.append, train.shutdown = timed, timed_shutdown  # type: ignore[method-assign]


def job_with(trials: Trials, **tracking: Any) -> Job:
    return trials.job(tracking=tracking, data={"target_tasks": ["mood"]}, source={"steps": STEPS, "checkpoint_every": STEPS})


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def timed(job: Job) -> tuple[float, float]:
    """Return the p99 of a record in milliseconds and the wait at the end in seconds."""
    job.finish(prepare=Timed(job.folder))
    found = json.loads((job.folder / "timed.json").read_text())
    return 1000 * p99(found["appends"]), found["exit"]


def assert_history_is_the_truth(directory: Path, uri: str) -> int:
    """Every record of metrics.jsonl and system.jsonl is one point of MLflow, and nothing else is."""
    state = json.loads((directory / "tracking.json").read_text())
    client = connect(uri)
    truth: dict[str, list[tuple[int, float]]] = {}
    for record in [record for name in LOGS for record in read_records(directory / name)[0]]:
        for name, value in record["metrics"].items():
            if isinstance(value, int | float):
                truth.setdefault(metric_key(record["stage"], name), []).append((record["step"], float(value)))
    for key, points in truth.items():
        found = [(point.step, point.value) for point in client.get_metric_history(state["run_id"], key)]
        if f"/{COST}/" in key:  # a step that is taken again costs something else; the store keeps what it cost first
            assert [step for step, _ in found] == [step for step, _ in points], key
        else:
            assert found == points, key
    run = client.get_run(state["run_id"])
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == set(truth)
    return sum(map(len, truth.values()))


OUTAGES: dict[str, Callable[[], Any]] = {
    "closed port": closed_port,
    "black hole": lambda: stub(None),
    "errors 500": lambda: stub(500),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_costs_a_step_nothing_and_sync_completes(outage: str, trials: Trials, server: ForkServer, tmp_path: Path) -> None:
    with measured("F11", "whole runs", outage) as figures:
        without, _ = timed(job_with(trials, mlflow=False))
        with OUTAGES[outage]() as port:
            job = job_with(trials, mlflow=True, uri=f"http://127.0.0.1:{port}")
            during, delay = timed(job)
        figures |= {"worst_added_p99_ms": round(max(0.0, during - without), 3), "worst_exit_delay_s": round(delay, 2)}
        assert during - without <= 1.0
        assert delay <= 5.5
        store = f"sqlite:///{tmp_path / 'mlflow.db'}"
        state = json.loads((job.directory / "tracking.json").read_text())
        (job.directory / "tracking.json").write_text(json.dumps({**state, "uri": store}))  # the server is back, elsewhere
        assert server.call(sync, job.directory, seconds=120).points > STEPS
        assert server.call(sync, job.directory, seconds=120).points == 0
        figures["points"] = server.call(assert_history_is_the_truth, job.directory, store, seconds=120)


def test_killed_and_resumed_runs_leave_one_exact_history(trials: Trials, server: ForkServer, tmp_path: Path) -> None:
    """Lines behind the last checkpoint are cut off at the resume and written again; they must not be points twice."""
    with measured("F11", "killed three times, store at hand") as figures:
        store = f"sqlite:///{tmp_path / 'mlflow.db'}"
        sections = {"source": {"steps": 12, "checkpoint_every": 4}, "data": {"target_tasks": ["mood"]}}
        job = trials.job(tracking={"mlflow": True, "uri": store}, **sections)
        for step in (3, 7, 11):
            # The sender gets the time to send lines that no checkpoint knows.
            job.start(f"step.after_update,stage=source,step={step},sleep:8;step.after_update,stage=source,step={step},kill")
        job.finish()
        server.call(sync, job.directory, seconds=120)
        figures["points"] = server.call(assert_history_is_the_truth, job.directory, store, seconds=120)
