"""A store that answers and refuses is told apart from one that is silent, and every refusal ends in the remedy of its cause."""

from __future__ import annotations

import http.server
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpt_dist.errors import ConfigError
from bpt_dist.tracking import answer
from bpt_dist.tracking.answer import Refused, Silent, ask, explain, is_refusal, warn_of_refusals

ACTIVE = {"experiment": {"experiment_id": "3", "lifecycle_stage": "active"}}
VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "MLFLOW_TRACKING_USERNAME",
             "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_URI",
             "MLFLOW_EXPERIMENT_NAME")  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@contextmanager
def serving(status: int, body: Any = b"") -> Iterator[tuple[str, list[Any]]]:
    """A server that gives one answer; yields its address and the requests it got."""
    seen: list[Any] = []
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, dict(self.headers)))
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, ACTIVE), (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no experiment named work"})],
)
def test_a_server_with_or_without_the_experiment_answers(status: int, body: Any) -> None:
    with serving(status, body) as (uri, seen):
        assert ask(f"{uri}/team/mlflow/", "my work") == f"{uri.removeprefix('http://')} answers"
    assert seen[0][0] == "/team/mlflow/api/2.0/mlflow/experiments/get-by-name?experiment_name=my+work"


REFUSALS = {
    "deleted": (200, {"experiment": {"experiment_id": "3", "lifecycle_stage": "deleted"}},
                r"'work' was deleted in .*mlflow experiments restore --experiment-id 3.*tracking.experiment"),
    "unauthenticated": (401, b"You are not authenticated.", r"are missing; write them to ~/.mlflow/credentials, mode 0600"),
    "forbidden": (403, {"error_code": "PERMISSION_DENIED", "message": "Permission denied"},
                  r"may not write to experiment 'work'; ask for the right, or give another tracking.experiment"),
    "host name": (403, b"Invalid Host header - possible DNS rebinding attack detected", r"start it with --allowed-hosts"),
    "another path": (404, b"not here", r"no MLflow at this address; correct host and path of tracking.uri"),
    "a page to log in": (200, b"<html>log in</html>", r"not as MLflow does; give the address of the server"),
    "bad request": (400, b"Client sent an HTTP request to an HTTPS server.", r"answer 400: Client sent an HTTP"),
    "proxy": (407, b"", r"wants a user and a password .*; write them into http_proxy"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_its_cause_and_remedy(case: str) -> None:
    status, body, expected = REFUSALS[case]
    with serving(status, body) as (uri, _), pytest.raises(Refused, match=expected):
        ask(uri, "work")


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_in_trouble_is_asked_again_later(status: int) -> None:
    with (
        serving(status, b"busy") as (uri, _),
        pytest.raises(Silent, match=f"error {status} .busy.; look into the log of the server"),
    ):
        ask(uri, "work")


def test_silence_is_no_refusal() -> None:
    with pytest.raises(Silent, match=r"nobody answers at http://127.0.0.1:9 .*refused.*; start the server"):
        ask("http://127.0.0.1:9", "work")


def test_https_to_a_server_of_http_is_said() -> None:
    with (
        serving(200, ACTIVE) as (uri, _),
        pytest.raises(Refused, match=r"does not speak https .*; correct the port, or write http"),
    ):
        ask(uri.replace("http:", "https:"), "work")


def test_credentials_of_the_file_are_sent_and_doubted(tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    file = tmp_path / ".mlflow" / "credentials"
    file.write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = canary\n")
    file.chmod(0o600)
    with serving(401, b"wrong") as (uri, seen):
        with pytest.raises(Refused, match=r"are not accepted; correct them in ~/.mlflow/credentials") as refused:
            ask(uri, "work")
        assert seen[0][1]["Authorization"] == "Basic bWU6Y2FuYXJ5"
        assert "canary" not in str(refused.value)
        file.chmod(0o644)
        with pytest.raises(ConfigError, match="can be read by others"):
            ask(uri, "work")


def test_a_proxy_is_asked_in_place_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(200, ACTIVE) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy.replace("//", "//me:canary@"))
        place = ask("http://mlflow.invalid", "work")
        assert place == f"mlflow.invalid through the proxy {proxy.removeprefix('http://')} answers"
        assert seen[0][0].startswith("http://mlflow.invalid/api/2.0/mlflow/")


def test_no_proxy_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(200, ACTIVE) as (uri, seen):
        assert ask(uri, "work") == f"{uri.removeprefix('http://')} answers"
        assert len(seen) == 1


def test_a_proxy_that_is_away_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:canary@127.0.0.1:9")
    with pytest.raises(Silent, match=r"through the proxy 127.0.0.1:9 .*; correct http_proxy") as silent:
        ask("http://mlflow.invalid", "work")
    assert "canary" not in str(silent.value)


def database(file: Path, **experiments: str) -> str:
    with closing(sqlite3.connect(file)) as made:
        made.execute("CREATE TABLE alembic_version (version_num TEXT)")
        made.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT)")
        made.executemany("INSERT INTO experiments VALUES (?, ?, ?)", [(1, *pair) for pair in experiments.items()])
        made.commit()
    return f"sqlite:///{file}"


def test_an_experiment_deleted_in_a_database(tmp_path: Path) -> None:
    (tmp_path / "a b#c%").mkdir()
    uri = database(tmp_path / "a b#c%" / "mlflow.db", work="deleted", other="active")
    with pytest.raises(Refused, match=r"'work' was deleted in sqlite.*restore --experiment-id 1"):
        ask(uri, "work")
    for experiment in ("other", "none"):
        assert ask(uri, experiment).endswith("mlflow.db can be read")


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("something else, long enough to be no header of a database " * 30)
    with pytest.raises(Refused, match=r"mlflow.db: file is not a database; move it away"):
        ask(f"sqlite:///{tmp_path / 'mlflow.db'}", "work")
    assert ask(f"sqlite:///{tmp_path / 'new.db'}", "work").endswith("will be made by the first run")


class Answered(Exception):
    """What MLflow's client raises for an answer of a server."""

    def __init__(self, status: int) -> None:
        super().__init__("PERMISSION_DENIED: Permission denied")
        self.status = status

    def get_http_status_code(self) -> int:
        return self.status


@pytest.mark.parametrize(("status", "refused"), [(401, True), (403, True), (404, True), (429, False), (500, False), (503, False)])
def test_errors_of_the_client_are_explained_alike(status: int, refused: bool) -> None:
    error, uri = Answered(status), "https://tracking.example"
    assert is_refusal(error, uri, "work") == refused
    text = explain(error, uri, "work")
    assert ("may not write to experiment 'work'" in text) == (status == 403)
    assert "Permission denied" in text


@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), TimeoutError("timed out")])
def test_an_outage_is_explained_by_the_remedy_of_an_outage(error: OSError) -> None:
    assert explain(error, "https://tracking.example", "work").endswith("; start the server")
    assert not is_refusal(error, "https://tracking.example", "work")


def test_several_runs_are_warned_of_once(make_config: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with serving(403, b"no") as (uri, seen):
        runs = [make_config(f"tracking.uri={uri}", "tracking.experiment=work", f"name=run{number}") for number in range(3)]
        warn_of_refusals(runs)
        assert len(seen) == 1
    assert caplog.text.count("may not write to experiment 'work'") == 1


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    from bpt_dist import config

    file = tmp_path / "run.yaml"
    file.write_text("method: prompt_tuning\ndata: {target_tasks: [mini_rte]}\n")
    return lambda *words: config.load(file, [f"output={tmp_path / 'runs'}", *words])


def test_the_module_needs_no_mlflow() -> None:
    """Its import takes longer than all checks together."""
    import subprocess
    import sys

    code = f"import sys, {answer.__name__}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
