"""A server that is treated badly: hostile requests, clients that leave, and signals, while its neighbours get their answers."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import exported
import pytest
import served
import tiny_run

HOSTILE, WARM_UP = 1000, 500  # until then the allocator grows to what bodies of all sizes need
KEYS = ("task", "id", "fields", "sentence", "a", "")
LEAK = 24 << 20  # bytes that the allocator may keep


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    return tiny_run.trained(tiny_run.load(world, tiny_run.settings(world, {"name": "vanilla_transfer"})))


def head(method: str = "POST", path: str = "/predict", **headers: object) -> bytes:
    given = {"host": "localhost", "content_type": "application/json", "connection": "close", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def post(body: bytes, path: str = "/predict", method: str = "POST", **headers: object) -> bytes:
    return head(method, path, content_length=len(body), **headers) + body


def _value(draw: random.Random, depth: int = 0) -> Any:
    """Return any JSON value."""
    kinds: list[Callable[[], Any]] = [
        lambda: None, lambda: draw.random() * 10 ** draw.randrange(300), lambda: -(10 ** draw.randrange(400)), lambda: "",
        lambda: "\0\u2028\ud800" * draw.randrange(9), lambda: "the cat " * draw.randrange(5000), lambda: True,
    ]  # fmt: skip
    if depth < 4:
        kinds += [
            lambda: [_value(draw, depth + 1) for _ in range(draw.randrange(4))],
            lambda: {
                draw.choice(["task", "id", "fields", "sentence", "a", ""]): _value(draw, depth + 1)
                for _ in range(draw.randrange(5))
            },
        ]
    return draw.choice(kinds)()


def _wild(draw: random.Random) -> bytes:
    row = {"task": draw.choice(["mood", "count", "x", 3, None]), "sentence": _value(draw), "text": _value(draw), "id": _value(draw)}
    return json.dumps(draw.choice([row, [row] * draw.randrange(300), _value(draw)])).encode()


def hostile(draw: random.Random) -> bytes:
    """Return the bytes of a request that no client of good will sends."""
    good = json.dumps({"task": "mood", "sentence": "the cat sat"}).encode()
    paths = ["/tasks/../../etc/passwd", "/tasks/%2e%2e%2f%00", "/tasks/" + "a" * 3000, "/predict/../tasks", "//predict", "/%ff%fe",
             "/tasks/nobody?x=" + "y" * 2000, "*", "/predict;a=b", "/PREDICT", "http://other/predict"]  # fmt: skip
    folders = ["../../etc", "/etc/passwd", "..\\..", "a/../../x", "\0", "~", "x" * 4000, "mood/../../..", ".", "%2e%2e/"]
    kinds: list[Callable[[], bytes]] = [
        lambda: post(_wild(draw)),
        lambda: post(_wild(draw)),
        lambda: post(good[: draw.randrange(len(good))]),
        lambda: post(draw.randbytes(draw.randrange(2000))),
        lambda: draw.randbytes(draw.randrange(1, 2000)),
        lambda: post(good.decode().encode(draw.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]))),
        lambda: post(b"[" * draw.randrange(1, 50_000)),
        lambda: post(b'{"a":' * draw.randrange(1, 5000) + b"1" + b"}" * 5000),
        lambda: post(b'{"task": "mood", "sentence": "' + b"a" * draw.randrange(3_000_000) + b'"}'),
        lambda: post(good, draw.choice(paths), draw.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "X" * 30])),
        lambda: post(json.dumps({"folder": draw.choice(folders)}).encode(), f"/tasks/{draw.choice('abc')}", "PUT"),
        lambda: head(content_length=draw.choice([-1, 10**30, "x", "1, 2", 10**10, ""])) + good,
        lambda: (
            head(transfer_encoding=draw.choice(["chunked", "gzip", "chunked, chunked"])) + draw.choice([b"zz\r\n", b"-1\r\n", good])
        ),
        lambda: post(
            good, content_type=draw.choice(["text/html", "application/xml", "\xe4", ";;", "application/json; charset=utf-7"])
        ),
        lambda: post(good, content_encoding=draw.choice(["gzip", "br", "identity, gzip"])),
        lambda: post(good, authorization="Bearer " + "x" * draw.randrange(9000), expect="100-continue", upgrade="websocket"),
        lambda: post(good)[: draw.randrange(1, 150)],
        lambda: post(good) * draw.randrange(2, 30),
        lambda: post(good, host=draw.choice(["evil.example", "", "localhost@evil", "[::1"])),
    ]
    return draw.choice(kinds)()


def send(client: served.Client, number: int) -> int:
    """Send a hostile request and return the status of its answer; 0 where there is none, or the client leaves before."""
    draw = random.Random(number)
    data, leaves = hostile(draw), draw.random() < 0.1
    answer = b""
    with suppress(OSError), client.raw(data) as connection:
        if leaves:
            return 0
        connection.settimeout(1)  # what is not whole has no answer for a while
        if draw.random() < 0.1:
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            answer += part
    final = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n") if b"100 Continue" in answer[:40] else answer
    return int(final[9:12]) if final.startswith(b"HTTP/1.1 ") else 0


class Neighbour(threading.Thread):
    """A client of good will that asks all the time and compares."""

    def __init__(self, client: served.Client, world: Path, run: Path) -> None:
        super().__init__()
        self.client, self.ended = client, threading.Event()
        self.rows = exported.rows(world, "mood") + exported.rows(world, "count")
        self.expected = exported.predictions(run, "mood") + exported.predictions(run, "count")
        self.replies: list[served.Reply] = []

    def run(self) -> None:
        while not self.ended.is_set():
            self.replies.append(self.client.predict(self.rows))
            time.sleep(0.05)

    def check(self) -> None:
        self.ended.set()
        self.join(served.SECONDS)
        assert len(self.replies) > 5
        for reply in self.replies:
            assert reply.status == 200
            exported.assert_equal(reply.value, self.expected)


@pytest.fixture(scope="module")
def server(world: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[served.Process]:
    words = (str(run), "--adapters", str(run / "target"), "--body-seconds", "2")
    with served.process(tmp_path_factory.mktemp("server"), *words) as found:
        yield found
        assert found.stop() == 0
        assert "Traceback" not in found.log.read_text()


def test_a_thousand_hostile_requests_harm_nobody(server: served.Process, world: Path, run: Path) -> None:
    neighbour = Neighbour(server.client, world, run)
    neighbour.start()
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(pool.map(partial(send, server.client), range(WARM_UP)))
        resident = server.resident_bytes
        statuses.update(pool.map(partial(send, server.client), range(WARM_UP, HOSTILE)))
    assert server.popen.poll() is None
    neighbour.check()
    assert server.resident_bytes - resident < LEAK
    assert statuses.keys() >= {0, 200, 400, 403, 404, 405, 413, 415, 422}, "all kinds of refusals were met"
    assert not any(status >= 500 for status in statuses), statuses
    assert {one["name"] for one in server.client.ask("GET", "/tasks").value} == {"mood", "count"}
    deadline = time.monotonic() + served.SECONDS
    while server.client.ask("GET", "/health").value["waiting"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.client.ask("GET", "/health").value["waiting"] == 0
    assert server.log.read_text() == ""


def test_slow_and_huge_bodies_do_not_hold_up_others(server: served.Process, world: Path, run: Path) -> None:
    neighbour = Neighbour(server.client, world, run)
    neighbour.start()
    slow = [server.client.raw(head(content_length=1000) + b"[") for _ in range(50)]
    huge = server.client.predict(body=iter([b" " * (1 << 16)] * 100))
    assert huge.status == 413
    with suppress(ConnectionError):  # closed before all of it is sent
        assert server.client.predict(body=b" " * (64 << 20)).status == 413
    for connection in slow:
        answer = b""
        while part := connection.recv(4096):
            answer += part
        connection.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
    neighbour.check()


def test_sigterm_answers_what_was_accepted(world: Path, run: Path, tmp_path: Path) -> None:
    rows, expected = exported.rows(world, "mood"), exported.predictions(run, "mood")
    replies: list[served.Reply] = []
    with served.process(tmp_path, str(run), "--wait-ms", "6000") as server:
        clients = [threading.Thread(target=lambda: replies.append(server.client.predict(rows))) for _ in range(20)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + served.SECONDS
        while server.client.ask("GET", "/health").value["waiting"] < 20 * len(rows) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.stop() == 0
        for client in clients:
            client.join(served.SECONDS)
        with pytest.raises(ConnectionRefusedError):
            server.client.predict(rows)
        assert server.log.read_text() == ""
    assert [reply.status for reply in replies] == [200] * 20
    for reply in replies:
        exported.assert_equal(reply.value, expected)
