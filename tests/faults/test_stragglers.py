"""F9: a slow rank is named with its factor; healthy ranks raise no alarm; the result is the same."""

from __future__ import annotations

import os
import re
import time

from fault_figures import measured
from trials import Trials

FULL = os.environ.get("FAULTS") == "full"
HEALTHY_STEPS = 500 if FULL else 100
SLOW_FROM = 20


class Slow:
    """This rank needs `seconds` longer for every pass of the steps from `first` on."""

    def __init__(self, rank: int, first: int, seconds: float) -> None:
        self.rank, self.first, self.seconds = rank, first, seconds

    def __call__(self, rank: int) -> None:
        from bpt_dist import train

        if rank != self.rank:
            return
        known = train.fault_point

        def point(name: str, **context: object) -> bool:
            if name == "step.before_forward" and int(str(context["step"])) >= self.first:
                time.sleep(self.seconds)
            return known(name, **context)

        train.fault_point = point


def settings(steps: int) -> dict[str, dict[str, object]]:
    return {"source": {"steps": steps, "checkpoint_every": steps}, "data": {"target_tasks": ["mood"]}}


def alarms(screen: str) -> list[tuple[int, int, float]]:
    """Return (step, rank, factor) of every alarm."""
    found = re.findall(r"source step (\d+): rank (\d+) on \S+ works ([\d.]+) times as long", screen)
    return [(int(step), int(rank), float(factor)) for step, rank, factor in found]


def test_a_slow_rank_is_named_within_25_steps(trials: Trials) -> None:
    with measured("F9", "sleep of several steps from step 20 on") as figures:
        job = trials.job(**settings(50))
        ended = job.start("", 2, prepare=Slow(1, SLOW_FROM, 0.3))
        assert ended.codes == [0, 0], ended.screen
        found = [alarm for alarm in alarms(ended.screen) if alarm[1] == 1]
        assert found, ended.screen
        figures |= {"worst_steps_to_alarm": found[0][0] - SLOW_FROM, "factor": str(found[0][2])}
        assert found[0][0] - SLOW_FROM <= 25
        assert found[0][2] > 2
        trials.assert_as_undisturbed(job, 2, **settings(50))


def test_healthy_ranks_raise_no_alarm(trials: Trials) -> None:
    with measured("F9", "healthy steps without a false alarm", trials=HEALTHY_STEPS) as figures:
        job = trials.job(**settings(HEALTHY_STEPS))
        ended = job.start("", 2, seconds=300)
        assert ended.codes == [0, 0], ended.screen
        figures["false_alarms"] = len(alarms(ended.screen))
        assert figures["false_alarms"] == 0
