"""MLflow holds what `metrics.jsonl` holds: every point once, in order, whatever was killed or unreachable."""

import base64
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.metrics_log import MetricsLog, read_records
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tracking import sender as tracking
from bpt_dist.tracking import ui
from bpt_dist.tracking.credentials import credentials
from bpt_dist.tracking.request import Request, parameters
from bpt_dist.tracking.sender import Sender, metric_key, sync
from bpt_dist.tracking.store import connect


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One sqlite store for all tests: its tables take seconds to make."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    connect(uri)
    return uri


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.open("name: x\n", "f", lambda old: [], tmp_path / "run")
    run.status("running")
    yield run
    run.close()


def request_for(run, uri, **keywords):
    return Request(id=run.id, uri=uri, experiment="bpt/mini", run_name="bpt s0", **keywords)


def sender_for(run, uri, **keywords):
    return Sender(run.folder, start(run, uri, **keywords))


def start(run, uri, **keywords):
    request = request_for(run, uri, **keywords)
    if not (run.folder / "tracking.json").exists():
        (run.folder / "tracking.json").write_text(json.dumps({"uri": uri}))
    return request


def append(log, first, last, stage="source"):
    for step in range(first, last):
        log.append(
            {
                "step": step,
                "stage": stage,
                "metrics": {f"{stage}/loss": step * 0.1, f"{stage}/rate": 2.0**step},
            }
        )


def expected(run):
    """Points of both logs by metric: (step, value) in order."""
    points = {}
    for record in [record for name in tracking.LOGS for record in read_records(run.folder / name)[0]]:
        for name, value in record["metrics"].items():
            points.setdefault(name, []).append((record["step"], value))
    return points


def stored(run, uri):
    client = connect(uri)
    run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
    found = client.get_run(run_id)
    history = {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)] for name in found.data.metrics
    }
    return found, {name: sorted(points) for name, points in history.items()}


def test_resume_after_a_cut_doubles_nothing(run, store):
    log = MetricsLog(run.folder / "metrics.jsonl")
    append(log, 0, 6)
    position = log.position()
    append(log, 6, 10)
    sender = sender_for(run, store, params={"target.sigma": "0.1"}, tags={"seed": "3"})
    sender.send_pending()
    sender.close()
    log.cut(position)  # killed after step 9, the checkpoint is that of step 5
    time.sleep(0.01)
    append(log, 6, 14)
    sender = sender_for(run, store, params={"target.sigma": "0.1", "target.steps": "20"}, tags={"seed": "3"})
    sender.send_pending()
    sender.send_pending()
    run.status("finished")
    sender.finish()
    sender.close()
    log.close()
    found, history = stored(run, store)
    assert history == expected(run)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"target.sigma": "0.1", "target.steps": "20"}
    assert found.data.tags["seed"] == "3"
    assert found.data.tags["bpt.resumes"] == "1"
    names = {artifact.path for artifact in connect(store).list_artifacts(found.info.run_id)}
    assert {"config.yaml", "run.json"} <= names


@contextmanager
def broken_around_a_batch(monkeypatch, moment, error):
    """Raise `error` before or after each batch is sent."""
    real = tracking.log_batch

    def broken(*arguments, **keywords):
        if moment == "after":
            real(*arguments, **keywords)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "log_batch", broken)
        yield


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_sender_killed_around_a_batch_loses_and_doubles_nothing(run, store, moment, monkeypatch):
    log = MetricsLog(run.folder / "metrics.jsonl")
    append(log, 0, 3)
    sender = sender_for(run, store)
    sender.send_pending()
    append(log, 3, 6)
    with broken_around_a_batch(monkeypatch, moment, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        sender.send_pending()
    sender.close()
    log.cut(0)  # the same steps are logged again, with other times
    time.sleep(0.01)
    append(log, 0, 8)
    sender = sender_for(run, store)
    sender.send_pending()
    sender.close()
    log.close()
    assert stored(run, store)[1] == expected(run)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_sender_that_lives_through_an_outage_loses_and_doubles_nothing(run, store, moment, monkeypatch):
    """The store fails around the batch of steps 3 to 5; the same sender goes on when it is back."""
    log = MetricsLog(run.folder / "metrics.jsonl")
    append(log, 0, 3)
    sender = sender_for(run, store)
    sender.send_pending()
    append(log, 3, 6)
    with broken_around_a_batch(monkeypatch, moment, ConnectionError("the server is gone")):
        for _ in range(2):
            with pytest.raises(ConnectionError):
                sender.send_pending()
    log.cut(log.position())
    append(log, 6, 8)
    sender.send_pending()
    sender.close()
    log.close()
    assert stored(run, store)[1] == expected(run)


def test_more_points_than_one_call_may_carry(run, store):
    log = MetricsLog(run.folder / "metrics.jsonl")
    for step in range(70):
        log.append({"step": step, "stage": "source", "metrics": {f"source/loss/{k}": k + step for k in range(40)}})
    log.append({"step": 70, "stage": "source", "metrics": {f"wide/{k}": float(k) for k in range(1500)}})
    log.close()
    sender = sender_for(run, store)
    sender.send_pending()
    sender.close()
    assert sender.points == 70 * 40 + 1500
    history = stored(run, store)[1]
    assert all(history[f"source/loss/{k}"] == [(s, k + s) for s in range(70)] for k in range(40))


def test_the_run_is_found_again_if_its_id_was_not_written_down(run, store):
    sender = sender_for(run, store)
    sender.send_pending()
    first = sender.state["run_id"]
    sender.close()
    (run.folder / "tracking.json").unlink()
    sender = sender_for(run, store)
    sender.send_pending()
    sender.close()
    assert sender.state["run_id"] == first


@pytest.mark.parametrize(
    ("state", "status"),
    [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED"), (None, "KILLED")],
)
def test_statuses_are_true(run, store, state, status):
    if state is not None:
        run.status(state)
    run.close()
    sender = sender_for(run, store)
    sender.finish()
    sender.close()
    assert stored(run, store)[0].info.status == status


def test_a_live_run_stays_running_and_a_resumed_one_runs_again(run, store):
    sender = sender_for(run, store)
    run.status("stopped")
    sender.finish()
    sender.close()
    run.status("running")
    sender = sender_for(run, store)
    sender.finish()
    sender.close()
    assert stored(run, store)[0].info.status == "RUNNING"


def test_pictures_by_step_and_figures(run, store):
    for step in (1, 5):
        path = run.folder / "figures" / "kernel" / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(path)
    PIL.Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(run.folder / "figures" / "loss.png")
    sender = sender_for(run, store)
    sender.finish()
    sender.finish()
    sender.close()
    client, run_id = connect(store), sender.state["run_id"]
    images = [entry.path for entry in client.list_artifacts(run_id, "images") if entry.path.endswith(".png")]
    assert len(images) == 2
    assert [entry.path for entry in client.list_artifacts(run_id, "figures")] == ["figures/loss.png"]


def test_one_sender_at_a_time(run, store):
    sender = sender_for(run, store)
    with pytest.raises(StorageError, match="another process is sending"):
        sync(run.folder)
    sender.close()


def test_sync_says_what_is_missing(tmp_path, run):
    with pytest.raises(ConfigError, match=r"has no tracking\.json"):
        sync(tmp_path)
    start(run, "http://127.0.0.1:9")
    Sender(run.folder, request_for(run, "http://127.0.0.1:9")).close()


def test_metric_names():
    assert metric_key("target/boolq", "target/loss") == "target/boolq/loss"
    assert metric_key("source", "source/loss/mnli") == "source/loss/mnli"
    assert metric_key("source", "svgd/a[0]") == "svgd/a_0_"


def test_parameters_are_flat_short_and_explain():
    config = {
        "seed": 3,
        "tracking": {"uri": "x"},
        "target": {"sigma": 0.01, "steps": 100, "clip": None, "joint": False},
        "data": {"source_tasks": ["a", "b"], "text": "x" * 7000},
        "tracking_note": 1,
    }
    assert parameters(config, leave_out=("seed", "tracking")) == {
        "target.sigma": "0.01",
        "target.log10_sigma": "-2",
        "target.steps": "100",
        "target.joint": "False",
        "data.source_tasks": "a, b",
        "tracking_note": "1",
    }


def trainer(folder, uri, num_steps, ending):
    """A training process in miniature; `ending` is how it ends."""
    body = f"""
        import os, sys, time
        from pathlib import Path
        from bpt_dist.storage.metrics_log import MetricsLog
        from bpt_dist.tracking.mirror import Mirror, shutdown
        from bpt_dist.storage.run_directory import RunDirectory
        from bpt_dist.tracking.request import Request
        folder, slowest = Path({str(folder)!r}), 0.0
        with RunDirectory.open("a: 1\\n", "f", lambda old: [], folder) as run:
            log = MetricsLog(folder / "metrics.jsonl")
            first = len((folder / "metrics.jsonl").read_text().splitlines())
            mirror = Mirror(folder, Request(id=run.id, uri={uri!r}, experiment="bpt/mini", run_name="n"))
            run.status("running")
            for step in range(first, first + {num_steps}):
                started = time.perf_counter()
                log.append(dict(step=step, stage="source", metrics={{"source/loss": step / 7}}))
                slowest = max(slowest, time.perf_counter() - started)
                time.sleep(0.005)
            print(slowest, flush=True)
            {ending}
            run.status("finished")
            mirror.finish()
        started = time.monotonic()
        shutdown()
        print(time.monotonic() - started, flush=True)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_and_resumed_processes_leave_one_exact_history(tmp_path, store):
    folder = tmp_path / "run"
    process = trainer(folder, store, 50, "time.sleep(60)")
    process.stdout.readline()
    deadline = time.monotonic() + 40
    while "source/loss" not in json.loads((folder / "tracking.json").read_text()).get("sent", {}) and time.monotonic() < deadline:
        time.sleep(0.05)
    (sending,) = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while Path(f"/proc/{sending}").exists():
        assert time.monotonic() < deadline + 10
        time.sleep(0.05)
    run = type("Folder", (), {"folder": folder})
    assert stored(run, store)[0].info.status == "KILLED"
    process = trainer(folder, store, 30, "pass")
    process.communicate(timeout=60)
    found, history = stored(run, store)
    assert history == expected(run)
    assert len(history["source/loss"]) == 80
    assert found.info.status == "FINISHED"


class Silent(http.server.BaseHTTPRequestHandler):
    """Accepts and answers with an error, or not at all."""

    def do_GET(self):
        self.asked.set()
        if self.answer is None:
            time.sleep(30)
        else:
            self.send_error(self.answer)

    do_POST = do_GET  # noqa: N815  the name http.server looks for

    def log_message(self, *arguments):
        pass


def server(answer):
    asked = threading.Event()
    handler = type("Handler", (Silent,), {"answer": answer, "asked": asked})
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.daemon_threads = True
    found.block_on_close = False
    found.asked = asked
    threading.Thread(target=found.serve_forever, daemon=True).start()
    return found


@pytest.mark.parametrize("outage", ["closed port", "black hole", "errors"])
def test_an_outage_costs_nothing_and_sync_completes(tmp_path, store, outage):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failing = None if outage == "closed port" else server({"black hole": None, "errors": 500}[outage])
    uri = f"http://127.0.0.1:{port if failing is None else failing.server_address[1]}"
    folder = tmp_path / "run"
    process = trainer(folder, uri, 100, "while not (folder / 'go').exists(): time.sleep(0.05)")
    slowest = float(process.stdout.readline())
    assert failing is None or failing.asked.wait(60)
    (folder / "go").touch()
    delay = float(process.communicate(timeout=60)[0])
    if failing is not None:
        failing.shutdown()
        failing.server_close()
    assert slowest < 2, "a record waited for the server, which answers after 30 s or never"
    assert delay <= 15, "5 s on an idle machine; the server answers after 30 s or never"
    state = json.loads((folder / "tracking.json").read_text())
    (folder / "tracking.json").write_text(json.dumps({**state, "uri": store}))  # the server is back, elsewhere
    run = type("Folder", (), {"folder": folder})
    assert sync(folder).points == sum(map(len, expected(run).values())) >= 100
    assert sync(folder).points == 0
    found, history = stored(run, store)
    assert history == expected(run)
    assert found.info.status == "FINISHED"


def test_the_installed_view_is_readable(store):
    client = connect(store)
    number = client.create_experiment("bpt/view")
    ui.install_view(client, number, headline="best/score", params=("target.sigma", "target.lr"))
    view = json.loads(client.get_experiment(number).tags["mlflow.sharedViewState.bpt-dist"])
    method, packed = view["state"].split(";")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert method == "deflate"
    assert state["compareRunCharts"][0]["selectedMetrics"] == ["best/score"]
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {
        section["uuid"] for section in state["compareRunSections"]
    }


def test_a_deleted_run_is_refused_and_one_that_is_gone_is_made_again(run, store):
    log = MetricsLog(run.folder / "metrics.jsonl")
    append(log, 0, 3)
    sender = sender_for(run, store)
    sender.send_pending()
    sender.close()
    run.status("finished")
    run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
    connect(store).delete_run(run_id)
    with pytest.raises(StorageError, match=f"MLflow run was deleted in .*mlflow runs restore --run-id {run_id}"):
        sync(run.folder)
    state = json.loads((run.folder / "tracking.json").read_text())
    (run.folder / "tracking.json").write_text(json.dumps({**state, "run_id": "0" * 32}))  # as after `mlflow gc`
    connect(store).restore_run(run_id)
    connect(store).set_tag(run_id, "bpt.run_id", "of another run")
    assert sync(run.folder).points == 6
    log.close()
    found, history = stored(run, store)
    assert history == expected(run)
    assert found.info.run_id != run_id


def test_a_deleted_experiment_is_said_with_its_remedy_and_restored(run, store):
    log = MetricsLog(run.folder / "metrics.jsonl")
    append(log, 0, 3)
    log.close()
    run.status("finished")
    client = connect(store)
    number = client.create_experiment("bpt/deleted")
    client.delete_experiment(number)
    request = Request(id=run.id, uri=store, experiment="bpt/deleted", run_name="n")
    (run.folder / "tracking.json").write_text(json.dumps({"uri": store, **vars(request)}))
    with pytest.raises(StorageError, match=f"'bpt/deleted' was deleted in .*experiments restore --experiment-id {number}"):
        sync(run.folder)
    client.restore_experiment(number)
    assert sync(run.folder).points == 6


def test_mlflow_sends_nothing_home(store):
    """Set before MLflow is imported, in this process and in those it starts."""
    connect(store)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


def test_an_occupied_port_is_named(store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            ui.ui(store, port)


def test_tags_beside_the_configuration_are_sent_when_they_change(run, store):
    sender = sender_for(run, store)
    sender.send_pending()
    (run.folder / "tags.json").write_text(json.dumps({"bpt.sweep": "s", "mlflow.runName": "sigma=1"}))
    sender.send_pending()
    (run.folder / "tags.json").write_text(json.dumps({"bpt.sweep": "s", "bpt.pruned": "asha@4"}))
    run.status("stopped", "pruned")
    sender.finish()
    sender.close()
    found, _ = stored(run, store)
    assert (found.info.run_name, found.info.status) == ("sigma=1", "KILLED")
    assert (found.data.tags["bpt.sweep"], found.data.tags["bpt.pruned"]) == ("s", "asha@4")


def test_credentials_come_from_a_file_that_only_its_owner_reads(tmp_path):
    file = tmp_path / "credentials"
    assert credentials(file) == {}
    file.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = canary%1\nother = x\n")
    file.chmod(0o600)
    assert credentials(file) == {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "canary%1"}
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 640\); chmod 600"):
        credentials(file)
    file.chmod(0o600)
    file.write_text("canary without a section\n")
    with pytest.raises(ConfigError) as caught:
        credentials(file)
    assert "canary" not in str(caught.value)


def test_the_view_shows_what_was_searched(store):
    client = connect(store)
    number = client.create_experiment("bpt/searched")
    for sigma in ("0.1", "1"):
        one = client.create_run(number, tags={"bpt.swept": "method.sigma_relative,target.steps"}).info.run_id
        client.log_param(one, "method.sigma_relative", sigma)
        client.log_param(one, "target.steps", "5")
        client.log_metric(one, "sweep/score", 50.0)
    for _ in range(2):  # the second time nothing changes
        ui.install_view(client, number)
        views = client.get_experiment(number).tags["mlflow.sharedViewState.bpt-dist"]
    state = json.loads(zlib.decompress(base64.b64decode(json.loads(views)["state"].split(";")[1])))
    assert state["compareRunCharts"][0]["selectedParams"] == ["method.log10_sigma_relative", "target.steps"]
    assert state["compareRunCharts"][0]["selectedMetrics"] == ["sweep/score"]
    columns = ["metrics.`sweep/score`", "metrics.`best/score`", "params.`method.sigma_relative`", "params.`target.steps`"]
    assert state["selectedColumns"] == columns
