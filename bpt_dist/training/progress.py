"""Show long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bpt_dist.config import RunConfig
from bpt_dist.storage.log_lines import SEPARATOR, place

log = logging.getLogger(__name__)
WARM_UP, COMPARED = 2, 20  # steps that set up libraries, and the number of steps after them that are compared with the plan
Planned = Callable[[], float | None]


def log_name(config: RunConfig) -> str:
    """Return what lines of the log call a run: its name, and method and seed unless the name is made of them."""
    method, seed = config.method.name, config.seed
    return config.name if config.name == f"{method}-s{seed}" else f"{config.name} ({method}, seed {seed})"


class StepProgress:
    """Progress over the steps of one stage; silent on every rank but the first.

    `planned` gives the planned seconds of a step, None where there is no plan. It may take a second and is asked once.
    """

    def __init__(self, steps: int, *, start: int, every: int, enabled: bool, planned: Planned = lambda: None) -> None:
        self.steps, self.every, self.enabled = steps, every, enabled
        self.losses: list[float] = []  # of the steps since the last line
        self.skipped = 0
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started, self.start = time.monotonic(), start
        self.planned, self.seconds = planned, 0.0
        # rich prints nothing until the end when the output is no terminal: there, lines are the progress.
        if enabled and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(escape(place()), total=steps, completed=start, note="")

    def __enter__(self) -> StepProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, loss: float | None, seconds: float = 0.0) -> None:
        """Show that `step` steps are done, the last in `seconds`; None for the loss of a step that was skipped.

        Every `every` steps, and after the last, a log gets a line with the mean loss of the steps since the line before.
        """
        if not self.enabled:
            return
        if loss is None:
            self.skipped += 1
        else:
            self.losses.append(loss)
        self._compare_with_plan(step - self.start, seconds)
        is_due = step % self.every == 0 or step == self.steps
        if self.bar:
            self.bar.update(self.task, completed=step, note=self._loss())
        elif is_due:
            seconds = (time.monotonic() - self.started) / max(1, step - self.start)
            left = timedelta(seconds=round(seconds * (self.steps - step)))
            parts = (f"step {step}/{self.steps}", self._loss(), f"{seconds:.2f} s/step", f"{left} left in this stage")
            log.info("%s", SEPARATOR.join(part for part in parts if part))
        if is_due:
            self.losses, self.skipped = [], 0

    def _compare_with_plan(self, taken: int, seconds: float) -> None:
        """Say once, after COMPARED steps, how long a step takes and how long it was planned to take."""
        if WARM_UP < taken <= WARM_UP + COMPARED:
            self.seconds += seconds
        if taken != WARM_UP + COMPARED:
            return
        asked, mean, planned = time.monotonic(), self.seconds / COMPARED, self.planned()
        if planned and mean:
            text = "%d steps took %.3g s each without validations, planned were %.3g s: %.2g times as long"
            log.info(text, COMPARED, mean, planned, mean / planned)
        self.started += time.monotonic() - asked  # the answer is no part of a step

    def _loss(self) -> str:
        number = len(self.losses)
        mean = f"mean loss {sum(self.losses) / number:.4f} of {number} step{'s' if number > 1 else ''}" if number else ""
        return ", ".join(part for part in (mean, f"{self.skipped} skipped" if self.skipped else "") if part)
