"""The routes over real connections: statuses, the token, loading while the server runs, limits, and what is counted."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import exported
import pytest
import served
import tiny_run
import tiny_t5

from bpt_dist.artifacts.inference.backbone import load_backbone
from bpt_dist.artifacts.inference.exports import read_exports
from bpt_dist.artifacts.inference.predictor import Predictor
from bpt_dist.backbones.base import Backbone
from bpt_dist.commands.main import main
from bpt_dist.commands.serve.access import Token
from bpt_dist.commands.serve.app import Service
from bpt_dist.commands.serve.limits import Limits
from bpt_dist.storage.digest import SHORT

SECRET = "0123456789abcdef-secret"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    return tiny_run.trained(tiny_run.load(world, tiny_run.settings(world, {"name": "vanilla_transfer"})))


@pytest.fixture(scope="module")
def backbone(run: Path) -> Backbone:
    return load_backbone(read_exports(run)[0], device="cpu")


@pytest.fixture
def predictor(run: Path, backbone: Backbone) -> Predictor:
    return Predictor(backbone, read_exports(run))


def row(**more: Any) -> dict[str, Any]:
    return {"task": "mood", "sentence": "the cat sat", **more}


def test_a_row_and_a_list_are_answered_as_by_predict(world: Path, run: Path, predictor: Predictor) -> None:
    rows = exported.rows(world, "mood") + exported.rows(world, "count")
    with served.in_thread(Service(predictor)) as client:
        found = client.predict(rows)
        (alone, bad, unknown, other) = (client.predict(one) for one in (row(id="a"), row(sentence=3, id=7), row(task="x"), 5))
    assert (found.status, found.headers["content-type"]) == (200, "application/json")
    exported.assert_equal(found.value[:6], exported.predictions(run, "mood"))
    assert [one["label"] for one in found.value[:6]] == [["good", "not good"].index(one["prediction"]) for one in found.value[:6]]
    exported.assert_equal(found.value[6:], exported.predictions(run, "count"))
    (expected,) = predictor.predict([row(id="a")])
    assert {**alone.value, "probabilities": None} == {**expected.as_json(), "probabilities": None}
    assert alone.value["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert (bad.status, bad.value) == (422, predictor.predict([row(sentence=3, id=7)])[0].as_json())
    assert (unknown.status, unknown.value) == (404, predictor.predict([row(task="x")])[0].as_json())
    assert other.status == 422


def test_bad_rows_are_answered_at_their_places(predictor: Predictor) -> None:
    body = b"""[{"task": "mood", "sentence": "the cat sat"}, {"task": "mood", "sentence": 3}, {"task": "mood", "sentence": NaN},
        {"task": "mood", "task": "count"}, {"task": "none"}, null, {"task": "mood", "sentence": "the \\ud800"},
        {"task": "mood", "id": 1e999, "sentence": "the cat"}, {"task": "mood", "sentence": "the cat sat"}]"""
    with served.in_thread(Service(predictor)) as client:
        found = client.predict(body=body)
        assert client.metric("bpt_rows_total") == 9
        assert client.metric("bpt_row_errors_total") == 7
        assert client.metric("bpt_batch_rows_sum") == 2
    assert found.status == 200
    kinds = ["fields", "row", "row", "task", "row", "fields", "row"]
    assert [answer.get("error", {}).get("kind") for answer in found.value] == [None, *kinds, None]
    assert found.value[0] == found.value[8]


def test_tasks_health_and_metrics(predictor: Predictor) -> None:
    with served.in_thread(Service(predictor)) as client:
        listed = client.ask("GET", "/tasks").value
        assert [one["name"] for one in listed] == ["count", "mood"]
        assert client.ask("GET", "/tasks/mood").value == listed[1]
        assert listed[1] == {"name": "mood", "kind": "classification", "fields": ["sentence"], "label_words": ["good", "not good"],
                             "labels": [0, 1], "decode": "rank", "predict": "map", "max_source_length": 256}  # fmt: skip
        assert client.ask("GET", "/tasks/none").status == 404
        assert client.ask("GET", "/health").value == {"status": "ok", "tasks": 2, "waiting": 0}
        client.predict([row(), row()])
        client.predict(row(sentence=3))
        text = client.ask("GET", "/metrics").value
        assert 'bpt_requests_total{route="/predict",status="200"} 1.0' in text
        assert 'bpt_requests_total{route="/predict",status="422"} 1.0' in text
        assert 'bpt_requests_total{route="/tasks/{name}",status="404"} 1.0' in text
        assert 'bpt_row_errors_total{kind="fields"} 1.0' in text
        assert 'bpt_request_seconds_count{route="/predict"} 2.0' in text
        assert 'bpt_batch_rows_bucket{le="2.0"} 1.0' in text
        assert "bpt_waiting_rows 0.0" in text
        assert "bpt_tasks 2.0" in text
        assert client.metric("process_resident_memory_bytes") > 1e7


def test_openapi_describes_every_route(predictor: Predictor) -> None:
    with served.in_thread(Service(predictor)) as client:
        found = client.ask("GET", "/openapi.json").value
        missing = client.ask("GET", "/docs")
    routes = {(path, method) for path, methods in found["paths"].items() for method in methods}
    assert routes == {("/predict", "post"), ("/tasks", "get"), ("/tasks/{name}", "get"), ("/tasks/{name}", "put"),
                      ("/tasks/{name}", "delete"), ("/health", "get"), ("/metrics", "get")}  # fmt: skip
    responses = found["paths"]["/predict"]["post"]["responses"]
    assert {"200", "400", "401", "404", "408", "413", "415", "422", "429"} <= set(responses)
    answer = found["components"]["schemas"]["AnswerEntry"]["properties"]
    assert set(answer) == {"id", "task", "prediction", "label", "probabilities", "agreement", "truncated", "error"}
    assert (missing.status, missing.value["error"]["kind"]) == (404, "route")


def test_only_requests_with_the_token_are_answered(predictor: Predictor, capfd: pytest.CaptureFixture[str],
                                                   caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    with served.in_thread(Service(predictor, token=Token(SECRET.encode()), local_only=False), token=SECRET) as client:
        assert client.predict(row()).status == 200
        for other in (served.Client(client.port), served.Client(client.port, SECRET + "x"), served.Client(client.port, "")):
            for method, path in (("POST", "/predict"), ("GET", "/tasks"), ("GET", "/metrics"), ("GET", "/openapi.json"),
                                 ("PUT", "/tasks/a"), ("DELETE", "/tasks/mood"), ("GET", "/none")):  # fmt: skip
                refused = other.ask(method, path, row())
                assert (refused.status, refused.value["error"]["kind"]) == (401, "token")
                assert refused.headers["www-authenticate"] == "Bearer"
            assert other.ask("GET", "/health").status == 200
        assert client.metric("bpt_rows_total") == 1
        elsewhere = {"host": "models.example"}
        assert client.predict(row(), headers=elsewhere).status == 200
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


def test_without_a_token_only_names_of_this_machine_are_answered(predictor: Predictor) -> None:
    with served.in_thread(Service(predictor)) as client:
        refused = client.predict(row(), headers={"host": "evil.example"})
        assert (refused.status, refused.value["error"]["kind"]) == (403, "host")
        assert client.predict(row(), headers={"host": "localhost:1"}).status == 200


def test_sizes_are_limited(predictor: Predictor) -> None:
    limits = Limits(body_bytes=2000, rows=3, characters=100)
    with served.in_thread(Service(predictor, limits)) as client:
        large = client.predict(body=b" " * 3000)
        assert large.status == 413
        assert large.value["error"]["message"] == "the body has more than 2,000 bytes; send fewer rows at once"
        assert client.predict(body=iter([b" " * 1500] * 3)).status == 413
        assert client.predict([row()] * 4).status == 413
        found = client.predict([row(), row(sentence="x" * 101), row()])
        assert [("error" in one) for one in found.value] == [False, True, False]
        assert found.value[1]["error"]["message"] == "the row has 117 characters, at most 100 are read; shorten it"
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            assert client.predict(body=b"{}", headers={"content-type": kind}).status == 415
        assert client.predict(row(), headers={"content-encoding": "gzip"}).status == 415
        assert client.predict(row(), headers={"content-type": "application/json; charset=utf-8"}).status == 200


def until(connection: socket.socket, end: bytes) -> bytes:
    """Return what a connection gives up to `end`."""
    found = b""
    while end not in found:
        part = connection.recv(4096)
        assert part, found
        found += part
    return found


def test_slow_bodies_and_slow_heads_are_ended(predictor: Predictor) -> None:
    with served.in_thread(Service(predictor, Limits(body_seconds=0.3, head_seconds=0.3))) as client:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        with client.raw(head) as slow, client.raw(b"GET /health HTTP/1.1\r\nHost: lo") as slower, client.raw(b"") as silent:
            assert until(slow, b"}\n").startswith(b"HTTP/1.1 408 Request Timeout")
            assert slower.recv(4096) == b""
            assert silent.recv(4096) == b""
        with client.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as patient:
            assert until(patient, b"}\n").startswith(b"HTTP/1.1 200 OK")
            time.sleep(1)
            patient.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert until(patient, b"}\n").startswith(b"HTTP/1.1 200 OK"), "between two requests a client may rest"


def test_a_full_queue_asks_to_come_back_later(predictor: Predictor) -> None:
    service = Service(predictor, Limits(waiting_rows=2), wait_seconds=3600)
    with served.in_thread(service) as client:
        answers: list[served.Reply] = []
        thread = threading.Thread(target=lambda: answers.append(client.predict([row(), row()])))
        thread.start()
        while client.ask("GET", "/health").value["waiting"] < 2:
            time.sleep(0.01)
        refused = client.predict(row())
        assert (refused.status, refused.value["error"]["kind"]) == (429, "full")
        assert int(refused.headers["retry-after"]) >= 1
        service.batcher.close()
        thread.join(served.SECONDS)
        closed = client.predict(row())
        assert (closed.status, closed.value["error"]["kind"]) == (503, "closed")
        assert client.ask("GET", "/health").status == 503
    assert answers[0].status == 200


def test_a_client_that_is_gone_costs_no_pass(predictor: Predictor) -> None:
    service = Service(predictor, wait_seconds=0.5)
    with served.in_thread(service) as client:
        body = json.dumps(row()).encode()
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        for _ in range(5):
            client.raw(head.encode() + body).close()
        client.raw(head.encode() + body[:-5]).close()
        assert client.predict(row()).status == 200
        deadline = time.monotonic() + served.SECONDS
        while client.metric("bpt_abandoned_requests_total") < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.metric("bpt_abandoned_requests_total") == 6
        assert client.metric("bpt_batch_rows_sum") == 1
        assert client.ask("GET", "/health").value["waiting"] == 0


def test_exports_are_loaded_and_removed_while_the_server_runs(world: Path, run: Path, backbone: Backbone, tmp_path: Path) -> None:
    root = tmp_path / "root"
    main(["export", str(run), "--out", str(root)])
    (folder,) = (path.parent.relative_to(root) for path in root.rglob("task.json") if '"mood"' in path.read_text())
    service = Service(Predictor(backbone, read_exports(run)[:1]), root=root)
    rows = [{**one, "task": "feeling"} for one in exported.rows(world, "mood")]
    with served.in_thread(service) as client:
        assert client.predict(rows[0]).status == 404
        assert client.ask("PUT", "/tasks/feeling", {"folder": str(folder)}).status == 201
        exported.assert_equal(client.predict(rows).value, exported.predictions(run, "mood"))
        again = client.ask("PUT", "/tasks/feeling", {"folder": str(folder)})
        assert (again.status, again.value["name"]) == (200, "feeling")
        assert client.ask("DELETE", "/tasks/feeling").status == 204
        assert client.ask("DELETE", "/tasks/feeling").status == 404
        assert client.predict(rows[0]).status == 404
        for value, status in (({"folder": "../x"}, 403), ({"folder": "none"}, 404), ({"folder": 3}, 422), ([], 422), ("x", 422),
                              ({"folder": str(folder), "more": 1}, 422), ({"folder": "."}, 409)):  # fmt: skip
            assert client.ask("PUT", "/tasks/feeling", value).status == status
        assert client.ask("PUT", "/tasks/a%2Fb", {"folder": str(folder)}).status in (404, 422)
        assert client.ask("PUT", "/tasks/-", {"folder": str(folder)}).status == 422
        assert client.ask("PUT", "/tasks/feeling", body=b"{" + b" " * 5000).status == 413
        assert len(client.ask("GET", "/tasks").value) == 1


def test_an_export_of_another_backbone_is_refused_by_name(run: Path, backbone: Backbone, tmp_path: Path) -> None:
    root = tmp_path / "root"
    other = shutil.copytree(run / "target" / "mood" / "adapter", root / "other")
    (root / "damaged").mkdir()
    (root / "damaged" / "task.json").write_text("{}")
    record = json.loads((other / "task.json").read_text())
    record["backbone"] |= {"sha256": "0" * 64, "path": "another-t5"}
    (other / "task.json").write_text(json.dumps(record))
    with served.in_thread(Service(Predictor(backbone, read_exports(run)), root=root)) as client:
        found = client.ask("PUT", "/tasks/mood", {"folder": "other"})
        assert (found.status, found.value["error"]["kind"]) == (409, "export")
        message = found.value["error"]["message"]
        assert message.startswith(f"other: belongs to another backbone (another-t5, SHA-256 {'0' * SHORT}")
        assert str(root) not in message
        found = client.ask("PUT", "/tasks/mood", {"folder": "damaged"})
        assert found.status == 409
        assert client.predict(row()).status == 200, "the prompt that is served stays"


def test_loading_is_off_by_default(predictor: Predictor) -> None:
    with served.in_thread(Service(predictor)) as client:
        for method in ("PUT", "DELETE"):
            refused = client.ask(method, "/tasks/mood", {"folder": "."})
            assert refused.status == 403
            assert "start it with --adapters ROOT" in refused.value["error"]["message"]
        assert len(client.ask("GET", "/tasks").value) == 2


def test_a_failure_of_ours_is_answered_and_logged_once(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(predictor)

    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    with served.in_thread(service) as client:
        monkeypatch.setattr(service, "answer", broken)
        found = client.predict(row())
        assert (found.status, found.value["error"]["kind"]) == (500, "internal")
        assert "secret" not in str(found.value)
        assert client.ask("GET", "/health").status == 200
        assert 'bpt_requests_total{route="/predict",status="500"} 1.0' in client.ask("GET", "/metrics").value
    assert "'/predict' failed" in caplog.text


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve", *words]) == 2
    screen = capsys.readouterr().err
    assert screen.count("\n") <= 2
    return screen


def test_what_cannot_be_served_is_refused_before_the_backbone_is_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(run / "target" / "mood" / "adapter")
    monkeypatch.setattr("bpt_dist.artifacts.inference.backbone.load_backbone", lambda *_: pytest.fail("loaded"))
    assert "no prompt is given" in refusal(capsys)
    assert "--host 0.0.0.0: is reached by other machines; give a --token-file" in refusal(capsys, adapter, "--host", "0.0.0.0")
    assert "--host no.such.host.invalid: is no address" in refusal(capsys, adapter, "--host", "no.such.host.invalid")
    assert "there is no such folder; give the one that holds exports" in refusal(capsys, adapter, "--adapters", str(tmp_path / "x"))
    assert "cannot be read" in refusal(capsys, adapter, "--token-file", str(tmp_path / "x"))
    assert "never fits into a queue of 5 rows" in refusal(capsys, adapter, "--max-rows", "6", "--max-waiting", "5")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot be bound (Address already in use)" in refusal(capsys, adapter, "--port", port)


def test_another_backbone_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tiny_t5.make(tmp_path / "other", seed=1))
    assert "belongs to another backbone" in refusal(capsys, str(run), "--port", "0", "--backbone", other)
