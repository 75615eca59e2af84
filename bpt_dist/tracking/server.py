"""MLflow's own server for the page of a sqlite store: on the loopback address, and gone when this process is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.tracking.places import artifact_root, sqlite_path
from bpt_dist.tracking.store import QUIET

START_SECONDS = 300
END_SECONDS = 20
# Ends a process group when its input does, which is when the process that holds the other end is gone, however it went.
WATCH = 'read -r _; kill -TERM -"$0"'


class Server:
    """A running server; `end` it.

    Raises ConfigError for an occupied port, StorageError if it ends by itself or is silent for five minutes.
    """

    def __init__(self, uri: str, port: int | None) -> None:
        port = _free_port(port)
        self.address = f"http://127.0.0.1:{port}"
        self.process = _serve(uri, port)
        self._watch = subprocess.Popen(
            ["sh", "-c", WATCH, str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._await_answer()
        except BaseException:  # also Ctrl-C and SIGTERM while it starts
            self.end()
            raise

    def is_up(self) -> bool:
        """Whether the server has not ended."""
        return self.process.poll() is None

    def end(self) -> None:
        """End the server and its workers."""
        self._watch.kill()  # first: it must not send a signal to a group of the same number later
        self._watch.communicate()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)

    def _await_answer(self) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.is_up():
            try:
                with direct.open(f"{self.address}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        code = self.process.poll()
        ending = "did not answer" if code is None else f"ended with {code}"
        raise StorageError(f"{self.address}: the MLflow server {ending}; run `mlflow server` by hand to see why")


def _free_port(port: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ConfigError(f"port {port} is in use; choose another one or leave it out") from error
        return probe.getsockname()[1]


def _serve(uri: str, port: int) -> subprocess.Popen[bytes]:
    store = sqlite_path(uri)
    assert store is not None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--default-artifact-root", artifact_root(store).as_uri()]
    # Job workers would cost eight more processes and 1.1 GB.
    environment = os.environ | QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    nowhere = subprocess.DEVNULL
    # In a group of its own, so that it can be ended together with its workers.
    return subprocess.Popen(
        command, env=environment, cwd=store.parent, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
    )
