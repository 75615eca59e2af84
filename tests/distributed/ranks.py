"""Fork ranks on this machine: torch is imported once, each rank runs one thread, nothing outlives the test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bpt_dist.distributed.mesh import World

TIMEOUT = 400.0


def free_port() -> int:
    """Return a port of the loopback device that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Return what `work(world, *arguments)` returned on each of `size` ranks; the first failure is raised with its traceback."""
    context = multiprocessing.get_context("fork")
    port, results = free_port(), context.Queue()
    ranks = [context.Process(target=_rank, args=(work, rank, size, port, results, arguments)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        found = dict(results.get(timeout=TIMEOUT) for _ in ranks)
    finally:
        for process in ranks:
            process.join(10)
            if process.is_alive():
                process.kill()
    failures = [value for value in found.values() if isinstance(value, _Failure)]
    if failures:
        raise AssertionError("\n".join(failure.text for failure in failures))
    return [pickle.loads(found[rank]) for rank in range(size)]


def launch(
    main: Callable[[], int], size: int = 1, *, ended: dict[int, float] | None = None, kill_stopped: bool = False, **environment: str
) -> list[int]:
    """Return the exit codes of `size` forked processes that run `main` as a launcher would start it; negative ones are signals.

    `ended` gets the moment at which each rank ended, or was stopped by a signal. With `kill_stopped` a stopped one is killed at the
    end, as its launcher would.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=_main, args=(main, rank, size, port, environment)) for rank in range(size)]
    for process in ranks:
        process.start()
    if ended is not None:
        _watch(ranks, ended)
    if kill_stopped:
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"pid {process.pid} did not end within {TIMEOUT:g} s")
    return [int(process.exitcode or 0) for process in ranks]


def _watch(processes: Sequence[Any], ended: dict[int, float]) -> None:
    """Note when each process ends or is stopped, until all have."""
    deadline = time.monotonic() + TIMEOUT
    while len(ended) < len(processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "TZ":
                ended.setdefault(rank, time.monotonic())
        time.sleep(0.02)


def _main(main: Callable[[], int], rank: int, size: int, port: int, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    code = 70
    try:
        code = main()
    finally:
        # Not sys.exit: what the test process registered for its own end is not this one's business.
        os._exit(code)


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(work: Callable[..., Any], rank: int, size: int, port: int, results: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCH_DISTRIBUTED_DEBUG="DETAIL",
        DS_ACCELERATOR="cpu",
    )
    try:
        world = World.start(timeout_seconds=60)
        # As bytes: tensors in a queue are shared memory, gone with the rank.
        results.put((rank, pickle.dumps(work(world, *arguments))))
        world.stop()
    except BaseException:
        results.put((rank, _Failure(f"rank {rank}: {traceback.format_exc()}")))
