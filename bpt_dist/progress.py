"""Show long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class StepProgress:
    """Progress over the steps of one stage; silent on every rank but the first."""

    def __init__(self, title: str, steps: int, *, start: int, every: int, enabled: bool) -> None:
        self.title, self.steps, self.every, self.enabled = title, steps, every, enabled
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.started, self.start = time.monotonic(), start
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
            self.task = self.bar.add_task(title, total=steps, completed=start, note="")

    def __enter__(self) -> StepProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, note: str = "") -> None:
        """Show that `step` steps are done; `note` is shown beside (and, in a log, every `every` steps)."""
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
        elif self.enabled and note and (step % self.every == 0 or step == self.steps):
            seconds = (time.monotonic() - self.started) / max(1, step - self.start)
            log.info("%s  step %d/%d  %s  %.2f s/step", self.title, step, self.steps, note, seconds)
