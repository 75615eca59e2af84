"""The store of a tracking address: its client, whose calls fail fast, the lock of a sqlite file, one batch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bpt_dist.tracking_credentials import credentials

# A call to a server that is down fails within seconds instead of the four minutes of MLflow's own settings.
SHORT_CALLS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
Point = tuple[str, float, int, int]  # key, value, milliseconds, step


def connect(uri: str) -> Any:
    """Return an MlflowClient whose calls fail fast; one process at a time makes a new sqlite store (6 s)."""
    os.environ.update(SHORT_CALLS)
    if sqlite_path(uri) is None:
        os.environ.update(credentials())
    from mlflow import MlflowClient

    store = sqlite_path(uri)
    with store_lock(uri):
        if store is not None and not store.exists():
            # Tables are made one by one: a process killed between two of them would leave a store that nobody can open again.
            making = store.with_name(f"{store.name}.making")
            for left in making.parent.glob(f"{making.name}*"):
                left.unlink()
            MlflowClient(tracking_uri=f"sqlite:///{making}{''.join(uri.partition('?')[1:])}")
            making.replace(store)
        return MlflowClient(tracking_uri=uri)


def reach(uri: str) -> None:
    """Raise OSError unless somebody accepts connections at the address of a server; a sqlite store is always reached."""
    parts = urlsplit(uri)
    if parts.hostname:
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname, port), timeout=2).close()


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Hold the lock beside a sqlite file; two processes that create its tables at once spoil them."""
    store = sqlite_path(uri)
    if store is None:
        yield
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_name(f"{store.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a sqlite store, None for a server."""
    return Path(uri.partition("?")[0].removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def log_batch(
    client: Any,
    run_id: str,
    *,
    points: Sequence[Point] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Send points, parameters and tags of one MLflow run in one call."""
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run_id,
        metrics=[Metric(*point) for point in points],
        params=[Param(key, value) for key, value in (params or {}).items()],
        tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        synchronous=True,
    )
