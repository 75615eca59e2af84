"""Let a training say how its steps compare with the plan, which is made when the first stage has taken some."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from bpt_dist.commands.plan.estimate import Plan, estimate
from bpt_dist.errors import UserError
from bpt_dist.training.run import TrainingRun

log = logging.getLogger(__name__)


@contextmanager
def compared_with_plan(run: TrainingRun) -> Iterator[None]:
    """Give the stages of `run` the seconds that a step was planned to take; what cannot be planned is not compared."""
    made: list[Plan | None] = []

    def planned(stage: str) -> float | None:
        if not made:
            made.append(_plan_of(run))
        found = [each for each in made[0].stages if each.name == stage] if made[0] is not None else []
        return made[0].step_seconds(found[0]) if found and made[0] is not None else None

    run.planned_seconds = planned
    yield


def _plan_of(run: TrainingRun) -> Plan | None:
    try:
        return estimate(run.config, run.world.size)
    except UserError as error:
        # The run does train: a plan that refuses it is too careful, or does not know its kind of backbone.
        log.info("there is no plan to compare with: %s", error)
        return None
