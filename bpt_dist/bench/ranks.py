"""Jobs of several gloo processes on this machine that stay ready and run a round each time they are asked: rounds can alternate."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from bpt_dist.errors import INTERNAL_ERROR, ConfigError
from bpt_dist.mesh import World

Work = Callable[[World, str], dict[str, float]]  # (the job, what is asked for) -> numbers of one rank


class Job:
    """So many forked processes of one thread; they share the memory of what this process has loaded."""

    def __init__(self, size: int, work: Work, timeout_seconds: float = 120.0) -> None:
        self.size, self.processes, self.pipes = size, [], []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_as_rank, args=(rank, size, port, theirs, work, timeout_seconds), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the processes."""
        if kind is None:
            for pipe in self.pipes:
                pipe.send(None)
            for process in self.processes:
                process.join(10)
        for process in self.processes:
            process.kill()
            process.join()

    def ask(self, what: str) -> list[dict[str, float]]:
        """Return the numbers of every rank, in their order, after one round.

        Raises ConfigError when a process has ended; it has said why.
        """
        for pipe in self.pipes:
            pipe.send(what)
        found: dict[int, dict[str, float]] = {}
        while len(found) < self.size:
            missing = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in found}
            for ready in wait(list(missing)):
                assert isinstance(ready, Connection)
                try:
                    found[missing[ready]] = ready.recv()
                except EOFError as error:
                    raise ConfigError(f"{self.size} processes: rank {missing[ready]} has ended; it has said why above") from error
        return [found[rank] for rank in range(self.size)]


def _as_rank(rank: int, size: int, port: int, pipe: Connection, work: Work, timeout_seconds: float) -> None:
    job: dict[str, Any] = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in job.items()}, MASTER_ADDR="127.0.0.1")
    code = INTERNAL_ERROR
    try:
        world = World.start(timeout_seconds)
        while (what := pipe.recv()) is not None:
            pipe.send(work(world, what))
        world.stop()
        code = 0
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # what the parent registered for its own end is not this process's business
