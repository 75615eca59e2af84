"""A tracking store: its client, whose calls fail fast, the lock of a sqlite file, one batch of points.

Artifacts of a sqlite store are kept in `mlartifacts` beside the database file, see `bpt_dist.tracking.places`.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bpt_dist.storage.file_system import lock_file
from bpt_dist.tracking.credentials import credentials
from bpt_dist.tracking.places import follow_moved_store, sqlite_path

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true"}
# A call to a server that is down fails within seconds instead of the four minutes of MLflow's own settings.
SHORT_CALLS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    **QUIET,
}
NO_LOCKS = "put output= on another file system, or set tracking.uri to a server"
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
            for left in making.parent.glob(f"{glob.escape(making.name)}*"):
                left.unlink()
            MlflowClient(tracking_uri=f"sqlite:///{making}{''.join(uri.partition('?')[1:])}")
            making.replace(store)
        if store is not None:
            follow_moved_store(store)
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Hold the lock beside a sqlite file; two processes that create its tables at once spoil them."""
    store = sqlite_path(uri)
    if store is None:
        yield
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_name(f"{store.name}.lock").open("w") as lock:
        lock_file(lock, wait=True)
        yield


def check_locks(uri: str) -> None:
    """Raise NoFileLocks for a sqlite store on a file system without file locks; never wait."""
    store = sqlite_path(uri)
    if store is None:
        return
    with contextlib.suppress(OSError):  # what else is wrong there is for the sender to say; a held lock is a lock
        store.parent.mkdir(parents=True, exist_ok=True)
        with store.with_name(f"{store.name}.lock").open("w") as lock:
            lock_file(lock, wait=False)


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
