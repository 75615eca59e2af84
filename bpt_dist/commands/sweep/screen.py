"""Says how far a sweep is: a table that follows the trials on a terminal, one line for each change elsewhere."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table

from bpt_dist.commands.output import console
from bpt_dist.commands.sweep.cluster import Resources
from bpt_dist.commands.sweep.record import Record, TrialStatus, standing
from bpt_dist.commands.sweep.settings import show
from bpt_dist.commands.sweep.trial import last_step

MOST_ROWS = 40


class Screen:
    """What is known of every trial of this start, shown as it changes."""

    def __init__(self, record: Record) -> None:
        self.record, self.console = record, console()
        self.shown: dict[str, TrialStatus] = {trial.name: standing(trial) for trial in record.trials}
        self.num_trials, self.num_waiting = 0, 0
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if sys.stdout.isatty() else None

    def __enter__(self) -> Screen:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def opened(self, num_waiting: int, resources: Resources) -> None:
        """Say what there is to do."""
        self.num_trials, self.num_waiting = len(self.record.sweep.settings.seeds) * self.record.sweep.num_settings, num_waiting
        processes = f" of {resources.workers} processes" if resources.workers > 1 else ""
        self.say(f"{num_waiting} of {self.num_trials} trials{processes} to run, {resources.concurrency} side by side")

    def scored(self, name: str, step: int, score: float) -> None:
        """Show a validation."""
        whole = last_step(self.record.named(name).config)
        self.changed(name, f"step {step}/{whole}  score {score:.2f}", "running", step=step, score=score)

    def ended(self, name: str, result: dict[str, Any]) -> None:
        """Show how a trial ended: one that Tune ends while it is running was pruned."""
        state = "pruned" if result["state"] == "running" else result["state"]
        score = result.get("score")
        text = f"{state} with score {score:.2f}" if score is not None and math.isfinite(score) else state
        reason = result.get("reason") if state == "failed" else None
        self.changed(name, f"{text}: {reason}" if reason else text, state)

    def changed(self, name: str, text: str, state: str, **news: Any) -> None:
        """Take over what is new of one trial and show it."""
        trial = self.record.named(name)
        before = self.shown.get(name) or standing(trial)
        score = news.get("score", before.score)
        self.shown[name] = TrialStatus(**{**vars(before), "state": state, **news, "score": score})
        self.record.save()
        num_ended = sum(one.state in ("finished", "pruned", "failed") for one in self.shown.values())
        if self.live:
            self.live.update(self._table(), refresh=True)
        else:
            self.say(f"[{num_ended}/{self.num_trials}] {name} ({trial.title}) {text}")

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for column in ("trial", *(key.rpartition(".")[2] for key in self.record.sweep.keys), "seed", "state", "step", "score"):
            table.add_column(column)
        order = {"running": 0, "failed": 1, "finished": 2, "pruned": 2, "stopped": 3}
        rows = sorted(self.shown.values(), key=lambda one: (order.get(one.state, 4), one.number, one.seed))
        for one in rows[:MOST_ROWS]:
            score = "" if one.score is None else f"{one.score:.2f}"
            values = [show(value) for value in one.values.values()]
            table.add_row(one.name, *values, str(one.seed), one.state, str(one.step or ""), score)
        return table
