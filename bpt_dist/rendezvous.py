"""Meet the other ranks of this job, and nobody else: a port in use, another job on the same port and a missing rank are named.

torch would wait in all of these cases: two jobs have the same default port, a store takes whoever connects, and a program that
accepts connections and stays silent holds a rank for as long as it likes.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

from bpt_dist.errors import ConfigError, PeerLost

POLL_SECONDS = 0.1
ANSWER_SECONDS = 15.0  # a store answers at once; a loaded machine takes a while
REMEDY = "choose another port: --master_port of deepspeed, --master-port of torchrun, MASTER_PORT for srun"


def join(backend: str, job: str, rank: int, size: int, limit: datetime.timedelta) -> None:
    """Start the default process group of `job`, a text that is equal on its ranks and unlike that of every other job (collective).

    Raises ConfigError when the port is in use or belongs to another job, PeerLost naming the ranks that did not appear in time.
    """
    store = _store(rank, size, limit)
    check_in(store, job, rank, size, limit)
    dist.init_process_group(backend, store=dist.PrefixStore("job", store), rank=rank, world_size=size, timeout=limit)


def check_in(store: Any, job: str, rank: int, size: int, limit: datetime.timedelta) -> None:
    """Return when all ranks of `job` are at `store` (collective)."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if store.compare_set("check-in/job", "", job).decode() != job:
        raise ConfigError(f"{place}: belongs to another job; {REMEDY}")
    me = f"{socket.gethostname()} pid {os.getpid()}"
    other = store.compare_set(f"check-in/{rank}", "", me).decode()
    if other != me:
        raise ConfigError(f"{place}: rank {rank} of this job is already there ({other}); was it started twice?")
    try:
        _await_all(store, size, limit)
    except dist.DistNetworkError as error:
        raise PeerLost(f"rank 0 at {place} left before all ranks were there; its host says why") from error


def _await_all(store: Any, size: int, limit: datetime.timedelta) -> None:
    deadline = time.monotonic() + limit.total_seconds()
    while missing := [str(rank) for rank in range(size) if not store.check([f"check-in/{rank}"])]:
        if time.monotonic() > deadline:
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            raise PeerLost(
                f"{ranks} did not appear within {limit.total_seconds():g} s; is every host up? `bpt-dist check --hostfile F`"
            )
        time.sleep(POLL_SECONDS)


def _store(rank: int, size: int, limit: datetime.timedelta) -> Any:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps the store itself, a fresh name space for each restart.
        return next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))[0]
    if rank == 0:
        try:
            return dist.TCPStore(address, port, size, is_master=True, timeout=limit, wait_for_workers=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(f"port {port} of {socket.gethostname()} is in use; {REMEDY}") from error
    _wait_for_listener(address, port, limit)
    return _client(address, port, size, limit)


def _wait_for_listener(address: str, port: int, limit: datetime.timedelta) -> None:
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"rank 0 at {address}:{port} did not appear within {limit.total_seconds():g} s ({error.strerror or error}); "
                    "is it up, and may this host connect to it? `bpt-dist check --hostfile F`"
                ) from error
            time.sleep(POLL_SECONDS)
        else:
            return


def _client(address: str, port: int, size: int, limit: datetime.timedelta) -> Any:
    """Connect in a thread: where something else listens, the constructor waits for an answer without limit."""
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(dist.TCPStore(address, port, size, is_master=False, timeout=limit, wait_for_workers=False))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not found or isinstance(found[0], Exception):
        cause = found[0] if found else None
        raise ConfigError(f"{address}:{port}: something other than rank 0 of this job answers there; {REMEDY}") from cause
    return found[0]
