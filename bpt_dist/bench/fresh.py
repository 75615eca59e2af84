"""Run something in a process of its own, forked before torch has computed anything, and learn how much memory it took at most."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def in_fresh_process(run: Callable[[], Any], num_threads: int | None = None) -> tuple[Any, int] | None:
    """Return what `run` returned (as JSON holds it) and the greatest resident size of its process in bytes; None if it died.

    The process has nothing in memory but the imported packages, so two of them differ by what they ran.
    """
    context = multiprocessing.get_context("fork")
    answer, own = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(run, own, num_threads))
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
    found = json.loads(text)
    return found["result"], found["bytes"]


def _run(run: Callable[[], Any], answer: Connection, num_threads: int | None) -> None:
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
        os._exit(code)  # what the parent registered for its own end is not this process's business
