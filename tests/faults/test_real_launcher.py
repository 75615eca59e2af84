"""F1, F8, F13 through the real `deepspeed` command: what it does to its processes is part of what a run has to survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from fault_figures import measured
from launched import BIN, Launched
from oracle import assert_metrics_in_order
from server import REPOSITORY
from test_stops import lost_steps
from trials import Job, Trials

SIZE = 2
FULL = os.environ.get("FAULTS") == "full"
KILLS = (
    "step.after_backward,stage=source,step=2,rank=1", "step.before_update,stage=source,step=3,rank=0",
    "eval.batch,task=mood,hit=2,rank=1", "ckpt.before_rename,step=4,rank=0", "data.row,hit=20,rank=1",
    "step.after_update,stage=target/count,step=2,rank=0",
)  # fmt: skip
# While both ranks sleep in this step the test has time to signal.
IN_STEP = "step.before_forward,stage=source,step=2,sleep:4"
IN_LOADING = "backbone.loaded,sleep:4"


def in_step(job: Job) -> Callable[[], bool]:
    """The third step has begun: two are written down."""
    metrics = job.directory / "metrics.jsonl"
    return lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2


def in_loading(job: Job) -> Callable[[], bool]:
    return (job.directory / "logs" / "rank-1.log").is_file


def finish_and_compare(job: Job, trials: Trials) -> None:
    """The rest does not need the launcher: same command, same number of ranks."""
    assert_metrics_in_order(job.directory)
    job.finish(SIZE)
    trials.assert_as_undisturbed(job, SIZE)


@pytest.mark.parametrize("point", KILLS if FULL else KILLS[:1])
def test_a_killed_rank_ends_the_job(point: str, trials: Trials) -> None:
    with measured("F1", "2 ranks, real deepspeed", point) as figures:
        job = trials.job()
        with Launched(job.config, SIZE, f"{point},kill") as launched:
            launched.wait_for(lambda: len(launched.ranks) == SIZE)
            launched.wait_for(lambda: len(launched.ranks) < SIZE)
            figures["worst_seconds"] = round(launched.wait_until_gone(35), 1)
            assert launched.top.wait(5) != 0
        assert job.status.state == "failed"
        finish_and_compare(job, trials)


SIGNALS: dict[str, tuple[str, Callable[[Job], Callable[[], bool]], Callable[[Launched], Any]]] = {
    "launch.py, step": (IN_STEP, in_step, lambda job: os.kill(job.launch_py, signal.SIGTERM)),
    "top deepspeed, step": (IN_STEP, in_step, lambda job: job.top.terminate()),
    "whole group, step": (IN_STEP, in_step, lambda job: os.killpg(job.top.pid, signal.SIGTERM)),
    "launch.py, model load": (IN_LOADING, in_loading, lambda job: os.kill(job.launch_py, signal.SIGTERM)),
}


@pytest.mark.parametrize("case", SIGNALS if FULL else list(SIGNALS)[:2])
def test_a_signal_to_the_launcher_stops_the_ranks_with_a_checkpoint(case: str, trials: Trials) -> None:
    fault, reached, send = SIGNALS[case]
    with measured("F13", "2 ranks, real deepspeed", case) as figures:
        job = trials.job()
        with Launched(job.config, SIZE, fault) as launched:
            launched.wait_for(reached(job))
            send(launched)
            figures["worst_seconds"] = round(launched.wait_until_gone(25), 1)
        assert job.status.state == "stopped", job.status
        figures["worst_lost_steps"] = lost_steps(job)
        assert figures["worst_lost_steps"] == 0
        finish_and_compare(job, trials)


@pytest.mark.parametrize("who", ["launch.py", "top deepspeed"] if FULL else ["launch.py"])
def test_a_launcher_killed_outright_leaves_no_orphan_and_no_false_success(who: str, trials: Trials) -> None:
    """SIGKILL: nobody tells the ranks, and `deepspeed` may even return 0."""
    with measured("F1", "launcher itself killed", who) as figures:
        job = trials.job()
        with Launched(job.config, SIZE, IN_STEP) as launched:
            launched.wait_for(in_step(job))
            os.kill(launched.launch_py if who == "launch.py" else launched.top.pid, signal.SIGKILL)
            figures["worst_seconds"] = round(launched.wait_until_gone(25), 1)
            figures["exit_code"] = str(launched.top.wait(5))
        assert job.status.state == "stopped", job.status
        finish_and_compare(job, trials)


def test_a_hostfile_that_is_not_there_is_noticed(trials: Trials) -> None:
    """F8: the launcher only warns and runs on one machine; the expected size tells."""
    with measured("F8", "real deepspeed, no such hostfile") as figures:
        job = trials.job(distribution={"expect_world_size": 4})
        began = time.monotonic()
        command = [BIN / "deepspeed", "--hostfile", "nosuch", "--num_gpus", "2", "launcher/train.py", "--config", job.config]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False, capture_output=True, text=True, timeout=120)
        figures["worst_seconds"] = round(time.monotonic() - began, 1)
        assert "expect_world_size is 4, but 2 process(es) were started" in done.stdout + done.stderr
        assert not job.directory.exists()
        assert "exits with return code = 2" in done.stdout + done.stderr or done.returncode == 2, done.stderr[-2000:]


def test_this_python_has_the_launcher() -> None:
    assert (BIN / "deepspeed").is_file(), sys.executable
