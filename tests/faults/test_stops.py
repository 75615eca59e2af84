"""F13: a signal stops all ranks after the same step, with a checkpoint and 75; the same command resumes to the undisturbed bits."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from fault_figures import measured
from oracle import records, stage_folders
from server import Ended
from trials import Job, Trials

from bpt_dist.storage import checkpoint
from bpt_dist.storage.files import read_json

SIZE = 2
CASES = {
    "every rank, step": "step.before_forward,stage=source,step=1,term",
    "one rank, step": "step.before_forward,stage=source,step=1,rank=1,term",
    "rank 0, last step of the stage": "step.after_backward,stage=source,step=3,rank=0,term",
    "every rank, evaluation": "eval.batch,task=mood,hit=1,term",
    "one rank, evaluation": "eval.batch,task=mood,hit=1,rank=1,term",
    "every rank, model load": "backbone.loaded,term",
    "one rank, model load": "backbone.loaded,rank=1,term",
    "every rank, data preparation": "data.row,hit=9,term",
    "one rank, data preparation": "data.row,hit=9,rank=1,term",
    "rank 0, checkpoint": "ckpt.before_rename,step=2,rank=0,term",
    "rank 0, before old checkpoints are deleted": "ckpt.after_rename,step=3,rank=0,term",
    "rank 0, opening": "run.opened,rank=0,term",
    "one rank, between the stages": "stage.finished,stage=source,rank=1,term",
    "one rank, target step": "step.after_update,stage=target/count,step=1,rank=1,term",
    "every rank, twice in a second": "step.before_forward,stage=source,step=1,term;step.after_backward,stage=source,step=1,term",
}


def lost_steps(job: Job) -> int:
    """Steps that metrics.jsonl knows and no checkpoint holds."""
    taken = {record["stage"]: record["step"] for record in records(job.directory)}
    saved = dict.fromkeys(taken, 0)
    for folder in stage_folders(job.directory):
        newest = checkpoint.latest(folder, fingerprint=None, warn=print)
        assert newest is not None
        saved[str(folder.parent.relative_to(job.directory))] = newest.step
    return sum(step - saved[stage] for stage, step in taken.items() if stage in saved)


def assert_stopped(job: Job, ended: Ended, figures: dict[str, Any], lost: int = 0) -> None:
    figures["worst_seconds"] = round(max(ended.seconds), 2)
    assert ended.codes == [75] * len(ended.codes), ended.screen
    status = read_json(job.directory / "status.json")
    assert status["state"] == "stopped"
    assert "rerun the same command to resume" in status["reason"] or "SIGTERM" in status["reason"]
    figures["worst_lost_steps"] = lost_steps(job)
    assert figures["worst_lost_steps"] <= lost


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_stop_after_the_same_step(case: str, trials: Trials) -> None:
    with measured("F13", "fork server, 2 ranks", case) as figures:
        job = trials.job()
        assert_stopped(job, job.start(CASES[case], SIZE), figures)
        job.finish(SIZE)
        trials.assert_as_undisturbed(job, SIZE)


def test_a_second_signal_means_now(trials: Trials) -> None:
    with measured("F13", "fork server, 2 ranks", "second signal") as figures:
        job = trials.job()
        fault = "step.before_forward,stage=source,step=3,rank=0,stop;step.before_forward,stage=source,step=3,rank=0,sleep:60"
        # Woken up, rank 0 sleeps in its step; the first request waits for the end of the step, the second one does not.
        on_stop = ((0.0, signal.SIGTERM), (0.1, signal.SIGCONT), (2.0, signal.SIGTERM))
        ended = job.start(fault, SIZE, on_stop=on_stop)
        assert ended.codes == [75, 69], ended.screen
        assert read_json(job.directory / "status.json")["reason"].startswith("SIGTERM again")
        figures["worst_seconds"] = round(max(ended.seconds), 2)
        figures["worst_lost_steps"] = lost_steps(job)
        assert figures["worst_lost_steps"] <= 1  # a checkpoint every 2 steps
        job.finish(SIZE)
        trials.assert_as_undisturbed(job, SIZE)


def test_a_rank_that_cannot_stop_in_time_leaves_when_the_grace_is_over(trials: Trials) -> None:
    with measured("F13", "fork server, 2 ranks", "grace over") as figures:
        job = trials.job(distribution={"grace": 3})
        fault = "step.before_forward,stage=source,step=3,rank=1,term;step.before_forward,stage=source,step=3,rank=1,sleep:60"
        ended = job.start(fault, SIZE)
        assert ended.codes == [69, 75], ended.screen
        assert "still at 'source step 3' after the grace period" in (job.directory / "logs" / "rank-1.stuck").read_text()
        figures["worst_seconds"] = round(max(ended.seconds), 2)
        assert max(ended.seconds) <= 45  # 15 on an idle machine; without the end of the grace it is more than 60
        figures["worst_lost_steps"] = lost_steps(job)
        assert figures["worst_lost_steps"] <= 1
        job.finish(SIZE)
        trials.assert_as_undisturbed(job, SIZE)


def test_a_request_in_a_long_step_loses_no_step(trials: Trials) -> None:
    """By default a stop waits as long as a step may take; 20 s were not enough for large backbones."""
    with measured("F13", "fork server, 2 ranks", "a step of 24 s") as figures:
        job = trials.job(distribution={"step_timeout": 60})
        where = "step.before_forward,stage=source,step=3,rank=0,hit=1"
        fault = f"{where},term;{where},sleep:24"
        assert_stopped(job, job.start(fault, SIZE), figures)
