"""F10: a rank that hangs is noticed within the timeout, its function is named, everyone leaves with 69."""

from __future__ import annotations

import os
import signal

import pytest
from fault_figures import measured
from hooks import hanging
from server import Ended
from trials import Job, Trials

FULL = os.environ.get("FAULTS") == "full"
TIMEOUT = 4
# From the timeout to the notice of the others: the promise of docs/faults.md for an idle machine, or a bar for a busy one.
SLACK = 2.0 if FULL else 20.0
LIMITS = {"distribution": {"startup_timeout": 60, "step_timeout": TIMEOUT}}
CASES = {
    "stopped, rank 1 of 2": ("step.before_forward,stage=source,step=2,rank=1,stop", 2, ""),
    "stopped, rank 0 of 2": ("step.before_forward,stage=source,step=2,rank=0,stop", 2, ""),
    "stopped, rank 2 of 3": ("step.after_backward,stage=source,step=2,rank=2,stop", 3, ""),
    "stopped in an evaluation, rank 1 of 2": ("eval.batch,task=mood,hit=1,rank=1,stop", 2, ""),
    "stopped before a checkpoint, rank 0 of 2": ("ckpt.before_write,step=2,rank=0,stop", 2, ""),
    "endless loop, rank 1 of 2": ("step.before_forward,stage=source,step=2,rank=1,loop", 2, "loop_forever_in_the_data"),
    "endless loop, rank 0 of 2": ("step.after_backward,stage=source,step=2,rank=0,loop", 2, "loop_forever_in_the_data"),
    "interpreter lock held, rank 1 of 2": ("step.before_forward,stage=source,step=2,rank=1,lock", 2, "hold_the_interpreter_lock"),
    "interpreter lock held, rank 0 of 2": ("step.after_backward,stage=source,step=2,rank=0,lock", 2, "hold_the_interpreter_lock"),
    "interpreter lock held in an evaluation, rank 1 of 3": (
        "eval.batch,task=mood,hit=1,rank=1,lock",
        3,
        "hold_the_interpreter_lock",
    ),
}


def named_rank(fault: str) -> int:
    return int(fault.split("rank=")[1].split(",", maxsplit=1)[0])


def assert_noticed(job: Job, ended: Ended, rank: int) -> float:
    """Assert that the others left in time and named the rank; return the seconds from the hang to the last of them."""
    others = [at for other, at in enumerate(ended.seconds) if other != rank]
    assert [code for other, code in enumerate(ended.codes) if other != rank] == [69] * len(others), ended.screen
    said = ended.screen + "".join(file.read_text() for file in job.directory.glob("logs/rank-*"))
    assert f"rank {rank} on " in said, said
    return max(others)


@pytest.mark.parametrize("case", CASES if FULL else list(CASES)[::2])
def test_a_hang_is_noticed_in_time_and_named(case: str, trials: Trials) -> None:
    fault, size, function = CASES[case]
    rank = named_rank(fault)
    with measured("F10", f"time-out {TIMEOUT} s, fork server", case) as figures:
        job = trials.job(**LIMITS)
        ended = job.start(fault, size, prepare=hanging)
        last = assert_noticed(job, ended, rank)
        if function:
            assert ended.codes[rank] == 69, ended.screen
            assert function in (job.directory / "logs" / f"rank-{rank}.stuck").read_text()
        else:
            assert ended.codes[rank] == -signal.SIGKILL  # a stopped process can do nothing; its launcher ends it
        noticed = last - (float(ended.screen.split("hangs at ")[1].split()[0]) - ended.began if function else ended.stopped[rank])
        figures["worst_seconds"] = round(noticed, 2)
        assert noticed <= TIMEOUT + SLACK  # without the watchdog nobody leaves before the 60 s of a collective
        job.finish(size)
        trials.assert_as_undisturbed(job, size)
