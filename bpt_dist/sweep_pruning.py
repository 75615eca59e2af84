"""ASHA (Li et al., 2020, asynchronous successive halving) as Ray Tune has it, made to survive a restart of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from bpt_dist.sweep_scores import Point


class Halving(ASHAScheduler):
    """Ends a trial whose score at a rung is not among the best 1/`reduction` that reached it.

    Ray's scheduler keeps its rungs in memory under ids that change with every start. Here a trial is known by its name, and
    `replay` fills the rungs from the metrics of the trials; the last step is no rung, for there is nothing left to save.
    """

    def __init__(self, first_rung: int, last_step: int, reduction: int, pruned: Callable[[str, Point], None]) -> None:
        super().__init__(
            time_attr="step", metric="score", mode="max", grace_period=first_rung, max_t=last_step, reduction_factor=reduction
        )
        self._last_step, self._pruned = last_step, pruned

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it at every start, and nobody reads that

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept what Tune was told as well."""
        return True

    def replay(self, name: str, history: Iterable[Point]) -> None:
        """Fill the rungs with what a trial of an earlier start reached."""
        for point in history:
            self._decide(name, point)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on."""
        name, point = trial.config["trial"], Point(result["step"], result["score"])
        decision = self._decide(name, point)
        if decision == TrialScheduler.STOP:
            self._pruned(name, point)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forget the id: the rungs know the name."""
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget the id."""
        self._trial_info.pop(trial.trial_id, None)

    def _decide(self, name: str, point: Point) -> str:
        if point.step >= self._last_step:
            return str(TrialScheduler.CONTINUE)
        known: Any = SimpleNamespace(trial_id=name)  # all that a bracket asks of a trial
        return str(self._brackets[0].on_result(known, point.step, point.score))
