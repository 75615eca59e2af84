"""The score of a trial: pure functions of its `metrics.jsonl`, so that it is the same whoever asks, and after every resume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bpt_dist.config import Config

VALIDATION = "target/validation/"
SCORE = "sweep/score"


class Point(NamedTuple):
    """The score of a trial after `step` target steps, counted over its targets."""

    step: int
    score: float


def target_stages(config: Config) -> list[str]:
    """Return the names of the target stages in the order they are trained."""
    return ["target/joint"] if config.target.joint else [f"target/{name}" for name in config.data.target_tasks]


def last_step(config: Config) -> int:
    """Return the target steps of a whole trial."""
    return len(target_stages(config)) * config.target.steps


def is_validation(record: Mapping[str, Any]) -> bool:
    """Return whether a record of metrics.jsonl is a validation."""
    return any(name.startswith(VALIDATION) for name in record.get("metrics", {}))


def history(config: Config, records: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return the score after every validation: the best so far of the target in training, averaged with those trained before it.

    The headline metrics are percent. At equal steps all trials of a sweep have met the same targets, so their scores compare. A
    validation that is not a number counts as minus infinity.
    """
    stages, points = target_stages(config), []
    best: dict[str, float] = {}
    for record in records:
        if not is_validation(record) or record["stage"] not in stages:
            continue
        values = [value for name, value in record["metrics"].items() if name.startswith(VALIDATION)]
        value = -math.inf if None in values else sum(values) / len(values)
        stage = record["stage"]
        best[stage] = max(value, best.get(stage, -math.inf))
        points.append(Point(stages.index(stage) * config.target.steps + record["step"], sum(best.values()) / len(best)))
    return points


def reported(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean headline metric on the last reported split, which a finished run writes down once; never used to choose."""
    return next(
        (record["metrics"]["best/score"] for record in reversed(records) if "best/score" in record.get("metrics", {})), None
    )
