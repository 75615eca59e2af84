"""A server of `bpt-dist serve` in a thread or as a process of its own, a plain HTTP client, and exports by the hundred."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bpt_dist.commands.serve.app import Service, make_app
from bpt_dist.commands.serve.command import server_of

PROGRAM = "import sys; from bpt_dist.commands.main import main; sys.exit(main())"
SECONDS = 120  # of a start, an answer, a stop: machines that test have other work


@dataclass
class Reply:
    """What came back: the status, the headers by lower-case names, and the value of the JSON, or the text of anything else."""

    status: int
    headers: dict[str, str]
    value: Any


@dataclass(frozen=True)
class Client:
    """Asks a server on this machine; each request has a connection of its own."""

    port: int
    token: str | None = None

    def ask(self, method: str, path: str, value: Any = None, *, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        own = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        if value is not None:
            body = json.dumps(value).encode()
        if body is not None:
            own["content-type"] = "application/json"
        try:
            connection.request(method, path, body, {**own, **(headers or {})})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        found = {name.lower(): text for name, text in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return Reply(response.status, found, json.loads(data) if is_json else data.decode())

    def predict(self, value: Any = None, **more: Any) -> Reply:
        return self.ask("POST", "/predict", value, **more)

    def metric(self, name: str) -> float:
        """Return a metric without labels, or the sum over its labels."""
        lines = self.ask("GET", "/metrics").value.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{.*\}})? ", line)]
        assert values, name
        return sum(values)

    def raw(self, data: bytes) -> socket.socket:
        """Send bytes and return the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        connection.sendall(data)
        return connection


@contextmanager
def in_thread(service: Service, **client: Any) -> Iterator[Client]:
    """Serve in this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = server_of(make_app(service), service.limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    port = listener.getsockname()[1]
    thread.start()
    try:
        yield Client(port, **client)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


@dataclass
class Process:
    """A server that a command line has started."""

    popen: subprocess.Popen[str]
    client: Client
    log: Path

    @property
    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(SECONDS)


@contextmanager
def process(folder: Path, *words: str) -> Iterator[Process]:
    """Start `bpt-dist serve` on a free port; `folder` gets what it prints."""
    log = folder / "serve.log"
    with log.open("w") as errors:
        command = [sys.executable, "-c", PROGRAM, "serve", *words, "--port", "0"]
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(os.environ))
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        found = re.search(r"http://[\w.\[\]:]+:(\d+);", line)
        assert found, line + log.read_text()
        yield Process(popen, Client(int(found[1])), log)
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def many(adapter: Path, folder: Path, number: int) -> list[str]:
    """Write `number` exports into `folder`, each with a prompt of its own, and return their names."""
    names = [f"{adapter.parent.name}_{place:03d}" for place in range(number)]
    for place, name in enumerate(names):
        own = shutil.copytree(adapter, folder / name)
        record = json.loads((own / "task.json").read_text())
        record["tasks"][0]["name"] = name
        (own / "task.json").write_text(json.dumps(record))
        weights = own / "adapter_model.safetensors"
        tensors = load_file(weights)
        noise = torch.Generator().manual_seed(place)
        save_file({key: value + torch.randn(value.shape, generator=noise) for key, value in tensors.items()}, weights)
    return names
