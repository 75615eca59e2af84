"""What is tried next, as Tune asks for it: the trials of a list, or settings that Optuna suggests from the scores so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from bpt_dist.errors import ConfigError
from bpt_dist.sweep_settings import Sweep, Trial
from bpt_dist.sweep_space import Choices, Entry, Values

Task = dict[str, Any]
"""What a trial process is told: see `sweep_trial.InProcess.setup`."""


class Listed(Searcher):
    """Hands out known trials in their order."""

    def __init__(self, trials: Sequence[Trial], task: Callable[[Trial], Task], stopping: Callable[[], bool]) -> None:
        super().__init__(metric="score", mode="max")
        self._waiting, self._task, self._stopping = list(trials), task, stopping

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it at every start, and nobody reads that

    def suggest(self, trial_id: str) -> Any:
        """Return what the next trial is told."""
        if self._stopping() or not self._waiting:
            return Searcher.FINISHED
        return self._task(self._waiting.pop(0))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn nothing: the list is fixed."""

    def save(self, checkpoint_path: str) -> None:
        """Leave an empty file: `sweep.json` and the run directories say where a sweep stands."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


class Suggested(Listed):
    """Asks Optuna (tree-structured Parzen estimator) for settings; a setting's score is the mean over its seeds.

    `before` are the scores of finished settings and `waiting` the unfinished trials of an earlier start.
    """

    def __init__(
        self,
        sweep: Sweep,
        waiting: Sequence[Trial],
        before: Mapping[int, tuple[Values, float | None]],
        task: Callable[[Trial], Task],
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__(waiting, task, stopping)
        optuna = _optuna()
        self._sweep, self._next = sweep, max(before, default=-1) + 1
        self._distributions = {key: _distribution(optuna, entry) for key, entry in sweep.space.items()}
        sampler = optuna.samplers.TPESampler(seed=sweep.settings.search_seed + self._next)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: dict[int, Any] = {}
        self._scores: dict[int, list[float]] = {}
        self._tasks: dict[str, int] = {}
        for values, score in before.values():
            if score is not None:
                done = optuna.trial.create_trial(params=values, distributions=self._distributions, value=score)
                self._study.add_trial(done)

    def suggest(self, trial_id: str) -> Any:
        """Return what the next trial is told: another seed of a setting, or the first of a new one."""
        if not self._stopping() and not self._waiting and self._next < self._sweep.num_settings:
            asked = self._study.ask(self._distributions)
            self._waiting += self._sweep.trials([asked.params], self._next)
            self._asked[self._next] = asked
            self._next += 1
        number = self._waiting[0].number if self._waiting else -1
        self._tasks[trial_id] = number
        return super().suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the mean of a setting whose seeds have all ended."""
        number = self._tasks.pop(trial_id, -1)
        scores = self._scores.setdefault(number, [])
        scores.append((result or {}).get("score", -math.inf))
        if number in self._asked and len(scores) == len(self._sweep.settings.seeds):
            mean = sum(scores) / len(scores)
            optuna = _optuna()
            state = None if math.isfinite(mean) else optuna.trial.TrialState.FAIL
            self._study.tell(self._asked.pop(number), mean if state is None else None, state=state)


def check_search(sweep: Sweep) -> None:
    """Raise ConfigError when what the search needs is not installed."""
    if sweep.settings.search == "optuna":
        _optuna()


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError('search: optuna is not installed; pip install "bpt_dist[hpo]", or use search: random') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _distribution(optuna: Any, entry: Entry) -> Any:
    kinds = optuna.distributions
    if isinstance(entry, Choices):
        return kinds.CategoricalDistribution(entry.values)
    if entry.kind == "integer":
        return kinds.IntDistribution(int(entry.low), int(entry.high))
    return kinds.FloatDistribution(entry.low, entry.high, log=entry.kind == "log_uniform")
