"""What is tried next, as Tune asks for it: the trials of a list, or settings that Optuna suggests from the scores so far."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from bpt_dist.commands.sweep.settings import Sweep, Trial
from bpt_dist.commands.sweep.space import Choices, Entry, Values
from bpt_dist.commands.sweep.trial import Point
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout

if TYPE_CHECKING:
    from bpt_dist.commands.sweep.screen import Screen

Task = dict[str, Any]
"""What a trial process is told: see `trainables.InProcess.setup`."""
RAISED = re.compile(r"^(?!ray\.)(?:[A-Za-z_]\w*\.)*[A-Z]\w*: (.+)$", re.MULTILINE)  # the last line of a traceback


class ListSearcher(Searcher):
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
        """Leave an empty file: `sweep.json` and the run directories hold the progress of a sweep."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""


class OptunaSearcher(ListSearcher):
    """Asks Optuna (tree-structured Parzen estimator) for settings; a setting's score is the mean over its seeds.

    `scored` are the values and scores of earlier settings and `waiting` the unfinished trials of an earlier start.
    """

    def __init__(
        self,
        sweep: Sweep,
        waiting: Sequence[Trial],
        scored: Mapping[int, tuple[Values, float | None]],
        task: Callable[[Trial], Task],
        stopping: Callable[[], bool],
    ) -> None:
        super().__init__(waiting, task, stopping)
        optuna = _optuna()
        self._sweep, self._next = sweep, max(scored, default=-1) + 1
        self._distributions = {key: _distribution(optuna, entry) for key, entry in sweep.space.items()}
        sampler = optuna.samplers.TPESampler(seed=sweep.settings.search_seed + self._next)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: dict[int, Any] = {}
        self._scores: dict[int, list[float]] = {}
        self._tasks: dict[str, int] = {}
        for values, score in scored.values():
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


class ProgressCallback(tune.Callback):
    """Passes the changes of trials on to `screen`; `also` is called at every turn of Tune's loop.

    `reasons` learns why a trial failed: one whose disk is full cannot write that down itself.
    """

    def __init__(self, screen: Screen, max_failures: int, also: Callable[[], None], reasons: dict[str, str]) -> None:
        self._screen, self._max_failures, self._also, self._reasons = screen, max_failures, also, reasons

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at what is not a trial."""
        self._also()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial starts, or starts again."""
        again = f" again after failure {trial.num_failures}: {self._why(trial)}" if trial.num_failures else ""
        self._screen.changed(trial.config["trial"], f"starts{again}", "running")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Show a validation."""
        if not result["done"]:
            self._screen.scored(trial.config["trial"], result["step"], result["score"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show how a trial ended."""
        self._screen.ended(trial.config["trial"], trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show a trial that will not be tried again."""
        if trial.num_failures > self._max_failures:
            name, reason = trial.config["trial"], self._why(trial)
            self._reasons[name] = reason
            self._screen.ended(name, {"done": True, "state": "failed", "reason": reason})

    def _why(self, trial: Any) -> str:
        """Return what a trial raised, or where to look for what ended its process."""
        folder = self._screen.record.named(trial.config["trial"]).config.directory
        died = f"its process died without a message; see {folder / layout.LOGS}, and the log of the machine if memory ran out"
        return _reason(trial) or died


def _reason(trial: Any) -> str | None:
    file = Path(trial.error_file) if trial.error_file else None  # Tune's own note of all failures
    return _last_reason(file.read_text(errors="replace")) if file is not None and file.is_file() else None


def _last_reason(errors: str) -> str | None:
    """Return what a trial raised at its last failure, None where its process died without a message."""
    reasons = RAISED.findall(errors.rpartition("Failure # ")[2])
    return str(reasons[-1]) if reasons else None


class ResumableASHA(ASHAScheduler):
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
        """Decide whether a trial continues."""
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
        trial: Any = SimpleNamespace(trial_id=name)  # all that a bracket asks of a trial
        return str(self._brackets[0].on_result(trial, point.step, point.score))
