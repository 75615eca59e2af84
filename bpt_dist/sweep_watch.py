"""How Tune tells the screen what happens; Tune pickles what it is given at every start, so these objects have no state to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

if TYPE_CHECKING:
    from bpt_dist.sweep_screen import Screen

DIED = "its process died; see its logs"


class Watch(tune.Callback):
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
        again = f" again after failure {trial.num_failures}: {_reason(trial) or DIED}" if trial.num_failures else ""
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
            name, reason = trial.config["trial"], _reason(trial)
            if reason is not None:
                self._reasons[name] = reason
            self._screen.ended(name, {"done": True, "state": "failed", "reason": reason or DIED})


def _reason(trial: Any) -> str | None:
    file = Path(trial.error_file) if trial.error_file else None  # Tune's own note of all failures
    return _last_reason(file.read_text(errors="replace")) if file is not None and file.is_file() else None


def _last_reason(errors: str) -> str | None:
    """Return what a trial raised at its last failure, None where its process died without a word."""
    found = re.findall(r"^RuntimeError: (.+)$", errors.rpartition("Failure # ")[2], re.MULTILINE)
    return str(found[-1]) if found else None
