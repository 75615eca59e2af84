"""Processes that the bench starts: jobs of several gloo ranks for alternating rounds, and fresh ones to measure memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from bpt_dist.distributed.environment import free_port
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import INTERNAL_ERROR, ConfigError

Work = Callable[[World, str], dict[str, float]]  # (the job, kind of round) -> numbers of one rank


class Job:
    """Forked processes of one thread each, waiting for rounds; they share the memory of what this process has loaded."""

    def __init__(self, size: int, work: Work, timeout_seconds: float = 120.0) -> None:
        self.size, self.processes, self.pipes = size, [], []
        port = free_port()
        context = multiprocessing.get_context("fork")
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_rank, args=(rank, size, port, theirs, work, timeout_seconds), daemon=True)
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

        Raises ConfigError when a process has exited.
        """
        for pipe in self.pipes:
            pipe.send(what)
        answers: dict[int, dict[str, float]] = {}
        while len(answers) < self.size:
            missing = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            for ready in wait(list(missing)):
                assert isinstance(ready, Connection)
                try:
                    answers[missing[ready]] = ready.recv()
                except EOFError as error:
                    raise ConfigError(f"{self.size} processes: rank {missing[ready]} exited; see its message above") from error
        return [answers[rank] for rank in range(self.size)]


def in_fresh_process(run: Callable[[], Any], num_threads: int | None = None) -> tuple[Any, int] | None:
    """Return the result of `run` (as JSON) and the peak resident size of its process in bytes; None if the process died.

    The process is forked and holds only what is imported here, so two of them differ by what they run.
    """
    context = multiprocessing.get_context("fork")
    answer, own = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_measure, args=(run, own, num_threads))
    process.start()
    own.close()
    try:
        text = answer.recv()
    except EOFError:
        text = None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        answer.close()
    if text is None:
        return None
    measured = json.loads(text)
    return measured["result"], measured["bytes"]


def _serve_rank(rank: int, size: int, port: int, pipe: Connection, work: Work, timeout_seconds: float) -> None:
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
        os._exit(code)  # skip the exit handlers of the parent


def _run_and_measure(run: Callable[[], Any], answer: Connection, num_threads: int | None) -> None:
    code = 1
    try:
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        result = run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer.send(json.dumps({"result": result, "bytes": peak}))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # skip the exit handlers of the parent
