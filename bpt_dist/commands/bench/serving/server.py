"""A server of its own process, and clients that ask it at the same time."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from bpt_dist.errors import ConfigError, Stopped

PROGRAM = "import sys; from bpt_dist.commands.main import main; sys.exit(main())"
SECONDS = 600  # that a client waits


@dataclass(frozen=True)
class Load:
    """What a server made of some requests: the answers of each, its seconds, and those of the client and of the server."""

    answers: list[list[dict[str, Any]]]
    latencies: list[float]
    wall: float
    cpu: float


@dataclass
class Server:
    """A running server."""

    process: psutil.Process
    port: int

    def ask(self, requests: Sequence[list[dict[str, Any]]], clients: int) -> Load:
        """Send requests from several clients, each of which sends its next one when it has its answer.

        Raises ConfigError for an answer that is none.
        """
        own = threading.local()

        def send(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
            if not hasattr(own, "connection"):
                own.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
            began = time.perf_counter()
            own.connection.request("POST", "/predict", json.dumps(rows), {"content-type": "application/json"})
            response = own.connection.getresponse()
            text = response.read()
            if response.status != http.HTTPStatus.OK:
                raise ConfigError(f"bpt-dist serve: answered {response.status}: {text.decode()}")
            return json.loads(text), time.perf_counter() - began

        with ThreadPoolExecutor(clients) as pool:
            cpu, wall = self._cpu_seconds(), time.perf_counter()
            found = list(pool.map(send, requests))
            wall, cpu = time.perf_counter() - wall, self._cpu_seconds() - cpu
        return Load([answers for answers, _ in found], [seconds for _, seconds in found], wall, cpu)

    @property
    def peak_bytes(self) -> int:
        """Most memory that was resident."""
        try:
            (line,) = (line for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmHWM" in line)
            return int(line.split()[1]) * 1024
        except (OSError, ValueError):  # another system than Linux
            return int(self.process.memory_info().rss)

    def _cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def served(exports: Path, threads: int, device: str) -> Iterator[Server]:
    """Start `bpt-dist serve` for a folder of exports. Raises ConfigError where it does not start."""
    before = signal.signal(signal.SIGTERM, _stopped)  # the server must not outlive the bench
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", PROGRAM, "serve", str(exports), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+);", process.stdout.readline())
        if found is None:
            raise ConfigError("bpt-dist serve: did not start; see its message above")
        yield Server(psutil.Process(process.pid), int(found[1]))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        signal.signal(signal.SIGTERM, before)


def _stopped(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped("stopped on request; run the command again")
