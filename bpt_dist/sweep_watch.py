"""How Tune tells the screen what happens; Tune pickles what it is given at every start, so these objects have no state to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray import tune

if TYPE_CHECKING:
    from bpt_dist.sweep_screen import Screen


class Watch(tune.Callback):
    """Passes the changes of trials on to `screen`; `also` is called at every turn of Tune's loop."""

    def __init__(self, screen: Screen, max_failures: int, also: Callable[[], None]) -> None:
        self._screen, self._max_failures, self._also = screen, max_failures, also

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at what is not a trial."""
        self._also()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial starts, or starts again."""
        again = f" again after failure {trial.num_failures}" if trial.num_failures else ""
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
            self._screen.ended(trial.config["trial"], {"done": True, "state": "failed", "reason": "see its logs"})
