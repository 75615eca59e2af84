"""Train the runs of a table: finished ones are skipped, a failed one does not stop the others, one that died is tried once more."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from bpt_dist import config as configuration
from bpt_dist.config import Config
from bpt_dist.errors import INTERNAL_ERROR, Stopped, StorageError
from bpt_dist.files import read_json
from bpt_dist.lock import holder_of

ORPHAN_SECONDS = 20.0
"""How long a run left alive by a killed command may still need to stop with a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `died` means that its process did, without a word."""

    code: int
    reason: str | None
    seconds: float
    died: bool = False


class Trainer(Protocol):
    """Trains one run after another."""

    def train(self, run: Config) -> Outcome:
        """Train one run from wherever it stands."""

    def stop(self) -> None:
        """Ask the run in progress to stop with a checkpoint (called by a signal handler)."""

    def close(self) -> None:
        """Give back what was held between runs."""


class Display(Protocol):
    """Says how far a table is."""

    def started(self, jobs: Jobs, run: Config, trainer: int) -> None:
        """A trainer took a run."""

    def ended(self, jobs: Jobs, run: Config, outcome: Outcome, *, again: bool) -> None:
        """A run ended; `again`: it will be tried once more."""


class Jobs:
    """The runs of a table that are not finished, and how those of this start ended."""

    def __init__(self, runs: Sequence[Config], display: Display) -> None:
        self.runs, self.display = list(runs), display
        # All rows of one seed before the next seed: an interrupted table has every row.
        order = {seed: place for place, seed in enumerate(dict.fromkeys(run.seed for run in runs))}
        self.waiting = sorted((run for run in runs if not is_finished(run)), key=lambda run: order[run.seed])
        self.num_waiting = len(self.waiting)
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, float] = {}  # name -> when it began
        self.stopping = False
        self._trainers: list[Trainer] = []
        self._retried: set[str] = set()
        self._lock = threading.Lock()

    def train(self, trainers: Sequence[Trainer]) -> int:
        """Train what waits, a thread for each trainer if there are several, and return the exit code."""
        self._trainers = list(trainers)
        threads = [threading.Thread(target=self._work, args=pair) for pair in enumerate(trainers)]
        with self._stop_on_signals():
            if len(trainers) == 1:
                self._work(0, trainers[0])  # in the main thread: a run in this process takes over the signals
            else:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        return self.exit_code()

    def exit_code(self) -> int:
        """Return 75 after a stop, or the code of the first run that failed in the order of the table, or 0."""
        if self.stopping:
            return Stopped.exit_code
        ended = [self.outcomes[run.name].code for run in self.runs if run.name in self.outcomes]
        return next((code for code in ended if code), 0)

    def stop(self) -> None:
        """Take no further run and let those in progress stop with a checkpoint."""
        self.stopping = True
        for trainer in self._trainers:
            trainer.stop()

    def seconds_left(self) -> float | None:
        """Return an estimate of the time still needed: what equal rows took, or else the mean; None before the first run ended."""
        taken: dict[str, list[float]] = {}
        for run in self.runs:
            outcome = self.outcomes.get(run.name)
            if outcome is not None and outcome.code == 0:
                taken.setdefault(row_label(run), []).append(outcome.seconds)
        if not taken:
            return None
        known = {label: sum(times) / len(times) for label, times in taken.items()}
        mean = sum(known.values()) / len(known)
        now = time.monotonic()
        by_name = {run.name: known.get(row_label(run), mean) for run in self.runs}
        left = sum(by_name[run.name] for run in self.waiting)
        left += sum(max(0.0, by_name[name] - (now - began)) for name, began in list(self.running.items()))
        return left / len(self._trainers)

    def _work(self, number: int, trainer: Trainer) -> None:
        try:
            while (run := self._next()) is not None:
                self.running[run.name] = time.monotonic()
                self.display.started(self, run, number)
                outcome = self._train_one(trainer, run)
                self._close(run, outcome)
        finally:
            trainer.close()

    def _train_one(self, trainer: Trainer, run: Config) -> Outcome:
        began = time.monotonic()
        try:
            return trainer.train(run)
        except Exception as error:  # a thread that ends in silence would leave its runs untrained
            return Outcome(INTERNAL_ERROR, f"{type(error).__name__}: {error}", time.monotonic() - began)

    def _close(self, run: Config, outcome: Outcome) -> None:
        with self._lock:
            again = outcome.died and run.name not in self._retried and not self.stopping
            self.running.pop(run.name)
            if outcome.code == Stopped.exit_code:
                self.stopping = True
            if again:
                self._retried.add(run.name)
                self.waiting.insert(0, run)
            else:
                self.outcomes[run.name] = outcome
            self.display.ended(self, run, outcome, again=again)

    def _next(self) -> Config | None:
        """Take the next run that nobody else is training; one that stays occupied is taken last, and says who has it."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not self.stopping:
            with self._lock:
                if not self.waiting:
                    return None
                for run in self.waiting:
                    if time.monotonic() > deadline or not _is_alive(run):
                        self.waiting.remove(run)
                        return run
            time.sleep(0.5)
        return None

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def is_finished(run: Config) -> bool:
    """Return whether this very run finished: its status says so, and it had this configuration."""
    record, status = run.directory / "run.json", run.directory / "status.json"
    if not (record.is_file() and status.is_file()):
        return False
    return bool(read_json(status)["state"] == "finished" and read_json(record)["fingerprint"] == configuration.fingerprint(run))


def row_label(run: Config) -> str:
    """Return the name of the row a run belongs to: its own without the seed."""
    return re.sub(rf"-s{run.seed}$", "", run.name)


def _is_alive(run: Config) -> bool:
    with suppress(StorageError):  # what is wrong with the lock is said when the run is opened
        return holder_of(run.directory) is not None
    return False
