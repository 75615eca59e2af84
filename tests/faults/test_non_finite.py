"""F5: one number that is not finite is agreed on by all ranks before the kernel; no particle moves, the rows are named."""

from __future__ import annotations

import os
from itertools import product

import pytest
from fault_figures import measured
from trials import Trials

from bpt_dist.storage.files import read_json

FULL = os.environ.get("FAULTS") == "full"
SIZE = 3
SECTIONS = {"source": {"batch_size": 3, "checkpoint_every": 1}}
CASES = list(product(("loss", "gradient", "particle"), range(SIZE), (1, 2)))


class Poison:
    """The action `nan` at `step.after_backward` spoils a loss, a gradient or a particle of this rank."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, rank: int) -> None:
        import math

        from bpt_dist import train

        known = train.fault_point

        def point(name: str, **context: object) -> bool:
            wanted = known(name, **context)
            if not wanted or name != "step.before_forward":
                return wanted
            spoil(self.what, math.nan)
            return False

        train.fault_point = point


def spoil(what: str, value: float) -> None:
    """Reach for the stage whose step is about to begin: the caller's caller."""
    import sys

    stage = sys._getframe(2).f_locals["stage"]
    if what == "particle":
        next(iter(stage.optimizer.names)).data.view(-1)[0] = value
    elif what == "loss":
        known = stage.method.loss
        stage.method.loss = lambda forward, batch: spoiled_loss(stage, known, forward, batch)
    else:
        parameter = next(iter(stage.optimizer.names))
        handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, gradient.new_zeros(1).long(), value))
        parameter.spoiled = handle  # kept for the life of the process: the run ends with this step


def spoiled_loss(stage, known, forward, batch):  # type: ignore[no-untyped-def]
    stage.method.loss = known
    forward.log_likelihood.data.view(-1)[0] = float("nan")
    return known(forward, batch) * float("nan")


@pytest.mark.parametrize(("what", "rank", "step"), CASES if FULL else CASES[::2])
def test_all_ranks_stop_before_the_kernel(what: str, rank: int, step: int, trials: Trials) -> None:
    with measured("F5", "on_non_finite: stop, 3 ranks", f"{what}, rank {rank}, step {step}"):
        job = trials.job(**SECTIONS)
        fault = f"step.before_forward,stage=source,step={step},rank={rank},nan"
        ended = job.start(fault, SIZE, prepare=Poison(what))
        assert ended.codes == [77] * SIZE, ended.screen
        bad = read_json(job.directory / "bad_step.json")
        assert (bad["stage"], bad["step"]) == ("source", step)
        assert list(bad["row_ids"]) == [str(rank)]
        assert bad["row_ids"][str(rank)]
        assert {row.split("/")[0] for row in bad["row_ids"][str(rank)]} <= {"colour", "truth"}
        # Every step has its checkpoint: the particles of this one are those the undisturbed run has.
        job.finish(SIZE)
        trials.assert_as_undisturbed(job, SIZE, **SECTIONS)


@pytest.mark.parametrize(("rank", "steps"), [(0, (1,)), (2, (1, 2)), (1, (1, 2, 3))])
def test_skipping_is_agreed_and_the_third_in_a_row_stops(rank: int, steps: tuple[int, ...], trials: Trials) -> None:
    sections = {"source": {**SECTIONS["source"], "steps": 6, "on_non_finite": "skip"}}
    with measured("F5", "on_non_finite: skip, 3 ranks", f"rank {rank}, {len(steps)} in a row"):
        job = trials.job(**sections)
        fault = ";".join(f"step.after_backward,stage=source,step={step},rank={rank},nan" for step in steps)
        ended = job.start(fault, SIZE)
        assert ended.codes == [77 if len(steps) == 3 else 0] * SIZE, ended.screen
        lines = (job.directory / "metrics.jsonl").read_text()
        assert lines.count('"source/skipped": 1.0') == min(len(steps), 2)
