"""F1, F2: a rank that is killed anywhere takes the others along in seconds, and the same command ends with the undisturbed bits."""

from __future__ import annotations

import os
import signal
from itertools import product

import pytest
from fault_figures import measured
from trials import Trials

STEP_POINTS = ("step.before_forward", "step.after_backward", "step.before_update", "step.after_update")
MOMENTS = ("stage=source,step=1", "stage=source,step=2", "stage=source,step=3", "stage=target/mood,step=2")
ON_EVERY_RANK = (
    *(f"{point},{moment}" for point, moment in product(STEP_POINTS, MOMENTS)),
    "backbone.loaded", "data.row,hit=1", "data.row,hit=90", "eval.batch,hit=1", "eval.batch,task=mood,hit=3",
    "eval.batch,task=count",
    "stage.finished,stage=source", "stage.finished,stage=target/mood", "stage.finished,stage=target/count",
)  # fmt: skip
ON_RANK_0 = (
    "run.opened", "posterior.before_write", "export.before_write,task=mood", "export.before_write,task=count",
    "metrics.before_append,stage=source,step=1", "metrics.before_append,stage=source,step=3",
    "metrics.before_append,stage=target/count,step=3", "results.before_write,stage=target/mood",
    "results.before_write,stage=target/count", "status.before_write,state=created", "status.before_write,state=running,hit=2",
    "status.before_write,state=finished",
)  # fmt: skip
WRITES = tuple(
    f"ckpt.{place},{step}"
    for place, step in product(
        ("before_write", "before_rename", "after_rename", "after_delete"), ("step=2", "step=4", "step=3,hit=2")
    )
)
CASES = [
    (size, rank, point)
    for size in (1, 2, 3)
    for points, ranks in ((ON_EVERY_RANK, range(size)), (ON_RANK_0, (0,)), (WRITES, (0,)))
    for point, rank in product(points, ranks)
]
FULL = os.environ.get("FAULTS") == "full"
POINTS = ON_EVERY_RANK + ON_RANK_0 + WRITES


def _is_chosen(size: int, rank: int, point: str) -> bool:
    """Every point with one rank of two, and some with one of three: a minute instead of five."""
    number = POINTS.index(point)
    return (size == 2 and (rank == number % 2 or point not in ON_EVERY_RANK)) or (
        size == 3 and number % 6 == 0 and rank == number % 3
    )


CHOSEN = [case for case in CASES if FULL or _is_chosen(*case)]


@pytest.mark.parametrize(("size", "rank", "point"), CHOSEN, ids=str)
def test_a_killed_rank_takes_the_others_along_and_the_run_ends_as_if_nothing_had_happened(
    size: int, rank: int, point: str, trials: Trials
) -> None:
    row, part = ("F2", "SIGKILL around a checkpoint, then resumed") if point in WRITES else ("F1", f"{size} rank(s), fork server")
    with measured(row, part, f"{size} {rank} {point}") as figures:
        job = trials.job()
        ended = job.start(f"{point},rank={rank},kill", size)
        assert ended.codes[rank] == -signal.SIGKILL, ended.screen
        last = "state=finished" in point
        assert all(code == 69 or (last and code == 0) for other, code in enumerate(ended.codes) if other != rank), ended.codes
        if size > 1 and not last:
            figures["worst_seconds"] = round(ended.notice, 2)
            assert ended.notice <= 3
        job.finish(size)
        trials.assert_as_undisturbed(job, size)


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
@pytest.mark.parametrize("point", ["step.before_forward,stage=source,step=2", "step.after_backward,stage=target/mood,step=2"])
def test_a_rank_that_waits_for_weights_of_a_killed_one_ends_and_the_run_goes_on(point: str, shard: str, trials: Trials) -> None:
    sections = {"distribution": {"shard": shard}}
    with measured("F1", f"2 ranks, sharded by {shard}", point) as figures:
        job = trials.job(**sections)
        ended = job.start(f"{point},rank=1,kill", 2)
        assert ended.codes == [69, -signal.SIGKILL], ended.screen
        figures["worst_seconds"] = round(ended.notice, 2)
        assert ended.notice <= 3
        job.finish(2)
        trials.assert_as_undisturbed(job, 2, **sections)


def test_the_cases_cover_the_bar() -> None:
    assert len(CASES) >= 200
