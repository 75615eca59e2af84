"""Join the other ranks of this job and no others: a port in use, another job on the same port and a missing rank are named.

torch would wait in all of these cases: two jobs have the same default port, a store accepts every connection, and a program that
accepts connections and never answers holds a rank without limit.

Ranks do not look for each other one by one: each adds itself to one list and waits for one verdict, which the last of them gives.
The requests of a rank do not depend on how many ranks there are.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

from bpt_dist.distributed.device import unlike
from bpt_dist.errors import ConfigError, PeerLost

POLL_SECONDS = 0.1
ANSWER_SECONDS = 15.0  # a store answers at once; a loaded machine takes a while
LATE_SECONDS = 10.0  # ranks of one launcher start within that time
WAIT_SECONDS = 1.0  # of one request: between two of them a signal is noticed
DEVICE, NUM_ARRIVED, ARRIVED, VERDICT = "check-in/device", "check-in/number", "check-in/arrived", "check-in/verdict"
COMPLETE, REFUSED, MISSING = "complete", "refused ", "missing "  # a verdict is the first, or one of the others and its words
REMEDY = "choose another port: --master_port of deepspeed, --master-port of torchrun, MASTER_PORT for srun"


def join(backend: str, job: str, rank: int, size: int, limit: datetime.timedelta, device: str = "cpu") -> None:
    """Start the default process group of `job`, a text that is equal on its ranks and unlike that of every other job (collective).

    `device` is the kind of this rank's device. Raises ConfigError when the port is in use or belongs to another job, or when ranks
    compute on different kinds of devices; PeerLost naming the ranks that did not appear in time.
    """
    store = _store(rank, size, limit)
    check_in(store, job, rank, size, limit, device)
    dist.init_process_group(backend, store=dist.PrefixStore("job", store), rank=rank, world_size=size, timeout=limit)


def check_in(store: Any, job: str, rank: int, size: int, limit: datetime.timedelta, device: str = "cpu") -> None:
    """Return when all ranks of `job` are at `store` (collective)."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if store.compare_set("check-in/job", "", job).decode() != job:
        raise ConfigError(f"{place}: belongs to another job; {REMEDY}")
    # GPUs talk over NCCL and CPUs over gloo: unlike ranks would wait for each other until the limit.
    problem = unlike(device, rank, store.compare_set(DEVICE, "", f"{device} rank {rank} on {socket.gethostname()}").decode())
    if problem is not None:
        store.compare_set(VERDICT, "", REFUSED + problem)
    me = f"{socket.gethostname()} pid {os.getpid()}"
    other = store.compare_set(f"check-in/{rank}", "", me).decode()
    if other != me:
        raise ConfigError(f"{place}: rank {rank} of this job is already there ({other}); was it started twice?")
    try:
        store.append(ARRIVED, f"{rank} ")  # before it is counted: who is counted is in the list
        if store.add(NUM_ARRIVED, 1) == size:
            store.compare_set(VERDICT, "", COMPLETE)
        verdict = _verdict(store, size, limit)
    except dist.DistNetworkError as error:
        raise PeerLost(f"rank 0 at {place} exited before all ranks were there; see the log of its host") from error
    if verdict != COMPLETE and rank == 0:
        _let_others_hear(store, size, LATE_SECONDS if verdict.startswith(REFUSED) else 0.0)
    if verdict.startswith(REFUSED):
        raise ConfigError(problem or verdict.removeprefix(REFUSED))
    if verdict.startswith(MISSING):
        raise PeerLost(verdict.removeprefix(MISSING))


def _let_others_hear(store: Any, size: int, seconds: float) -> None:
    """Keep the store for ranks that come up to `seconds` later: without it they would wait for this rank until their limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and store.add(NUM_ARRIVED, 0) < size:
        time.sleep(POLL_SECONDS)
    time.sleep(5 * POLL_SECONDS)


def _verdict(store: Any, size: int, limit: datetime.timedelta) -> str:
    """Return the verdict on the job; after `limit` this rank gives it itself, for all that still wait."""
    deadline = time.monotonic() + limit.total_seconds()
    while (left := deadline - time.monotonic()) > 0:
        try:
            store.wait([VERDICT], datetime.timedelta(seconds=min(left, WAIT_SECONDS)))
        except dist.DistStoreError:
            continue
        return str(store.get(VERDICT).decode())
    missing = sorted({*range(size)} - {*map(int, store.get(ARRIVED).split())})
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    words = f"{ranks} did not appear within {limit.total_seconds():g} s; is every host up? `bpt-dist check --hostfile F`"
    return str(store.compare_set(VERDICT, "", MISSING + words).decode())


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
    results: list[Any] = []

    def connect() -> None:
        try:
            results.append(dist.TCPStore(address, port, size, is_master=False, timeout=limit, wait_for_workers=False))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not results or isinstance(results[0], Exception):
        cause = results[0] if results else None
        raise ConfigError(f"{address}:{port}: something other than rank 0 of this job answers there; {REMEDY}") from cause
    return results[0]
