"""Train the runs of a table: finished ones are skipped, a failed one does not stop the others, one that died is tried once more.

A run that starts from the posterior of another waits for that one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from bpt_dist.artifacts.stored_run import is_finished
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, Stopped, StorageError
from bpt_dist.storage import layout
from bpt_dist.storage.lock import Holder, holder_of


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `died` means that its process did, without an answer."""

    code: int
    reason: str | None
    seconds: float
    died: bool = False


class Trainer(Protocol):
    """Trains one run after another."""

    def train(self, run: RunConfig) -> Outcome:
        """Train one run, from its newest checkpoint if it has one."""

    def stop(self) -> None:
        """Ask the run in progress to stop with a checkpoint (called by a signal handler)."""

    def close(self) -> None:
        """Give back what was held between runs."""


class Display(Protocol):
    """Says how far a table is."""

    def started(self, jobs: Jobs, run: RunConfig, trainer: int) -> None:
        """A trainer took a run."""

    def ended(self, jobs: Jobs, run: RunConfig, outcome: Outcome, *, again: bool) -> None:
        """A run ended; `again`: it will be tried once more."""

    def elsewhere(self, jobs: Jobs, run: RunConfig, holder: Holder | None) -> None:
        """Another command has a run, which this one waits for; None: it has finished it."""

    def retired(self, jobs: Jobs, trainer: int) -> None:
        """A trainer is not given another run."""


def _texts_read(run: RunConfig) -> float:
    """Return how often the model reads a text with a prompt in a run, at least once: what its time roughly grows with.

    A training step reads a text about three times, forward and backward; rows without `max_eval_rows` count as a thousand.
    """
    particles = run.method.num_particles if run.method.HAS_PARTICLES else 1  # type: ignore[attr-defined]
    predict, samples = run.evaluation.predict, run.evaluation.num_samples
    # A target adapts one prompt, and the particles beside it where they will predict.
    adapted = 1 + particles if run.method.HAS_PARTICLES and predict != "map" and samples is None else 1
    predicting = (samples or particles) if predict == "ensemble" else 1
    source = 0
    if run.method.HAS_SOURCE_STAGE and run.source.posterior is None:
        source = particles * run.source.steps * run.source.batch_size * (run.source.tasks_per_step or len(run.data.source_tasks))
    target = adapted * run.target.steps * run.target.batch_size
    evaluated = predicting * (run.data.max_eval_rows or 1000)
    return max(1, 3 * source + len(run.data.target_tasks) * (3 * target + evaluated))


class Jobs:
    """The runs of a table that are not finished, and how those of this start ended."""

    def __init__(self, runs: Sequence[RunConfig], display: Display) -> None:
        self.runs, self.display = list(runs), display
        # All rows of one seed before the next seed: an interrupted table has every row.
        order = {seed: place for place, seed in enumerate(dict.fromkeys(run.seed for run in runs))}
        self.waiting = sorted((run for run in runs if not is_finished(run)), key=lambda run: order[run.seed])
        self.num_waiting = len(self.waiting)
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, float] = {}  # name -> when it began
        self.stopping = False
        self._trainers: list[Trainer] = []
        self._at_work: set[int] = set()
        self._retried: set[str] = set()
        self._held: set[str] = set()
        self._lock = threading.Lock()

    def train(self, trainers: Sequence[Trainer]) -> int:
        """Train what waits, a thread for each trainer if there are several, and return the exit code."""
        self._trainers, self._at_work = list(trainers), set(range(len(trainers)))
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
        """Return 75 after a stop, or the code of the first run that failed in the order of the table, or 0.

        A run that is not finished and whose ending is unknown counts as an internal error.
        """
        if self.stopping:
            return Stopped.exit_code
        return next((code for code in map(self._code, self.runs) if code), 0)

    def stop(self) -> None:
        """Take no further run and let those in progress stop with a checkpoint."""
        self.stopping = True
        for trainer in self._trainers:
            trainer.stop()

    def seconds_left(self) -> float | None:
        """Return an estimate of the time still needed; None before the first run ended.

        A row takes what it took with another seed, or else what the finished runs say of its number of texts.
        """
        taken: dict[str, list[float]] = {}
        seconds, texts = 0.0, 0.0
        for run in self.runs:
            outcome = self.outcomes.get(run.name)
            if outcome is not None and outcome.code == 0:
                taken.setdefault(row_label(run), []).append(outcome.seconds)
                seconds, texts = seconds + outcome.seconds, texts + _texts_read(run)
        if not taken:
            return None
        mean_of_row = {label: sum(times) / len(times) for label, times in taken.items()}
        now = time.monotonic()
        by_name = {run.name: mean_of_row.get(row_label(run), seconds * _texts_read(run) / texts) for run in self.runs}
        left = sum(by_name[run.name] for run in self.waiting)
        left += sum(max(0.0, by_name[name] - (now - began)) for name, began in list(self.running.items()))
        return left / max(1, len(self._at_work))

    def _code(self, run: RunConfig) -> int:
        if run.name in self.outcomes:
            return self.outcomes[run.name].code
        return 0 if is_finished(run) else INTERNAL_ERROR

    def _work(self, number: int, trainer: Trainer) -> None:
        proven = False  # whether this trainer has reached a step, or reported what is wrong with a run
        try:
            while number in self._at_work and (run := self._next(number)) is not None:
                self.running[run.name] = time.monotonic()
                self.display.started(self, run, number)
                before = _recorded_bytes(run)
                outcome = self._train_one(trainer, run)
                broke = outcome.died or outcome.code == INTERNAL_ERROR
                proven = proven or not broke or _recorded_bytes(run) != before
                self._close(run, outcome, number, suspect=not proven)
        finally:
            self._at_work.discard(number)
            trainer.close()

    def _train_one(self, trainer: Trainer, run: RunConfig) -> Outcome:
        began = time.monotonic()
        try:
            return trainer.train(run)
        except Exception as error:  # a thread that ends in silence would leave its runs untrained
            return Outcome(INTERNAL_ERROR, f"{type(error).__name__}: {error}", time.monotonic() - began)

    def _close(self, run: RunConfig, outcome: Outcome, number: int, *, suspect: bool) -> None:
        """Settle what becomes of a run, and of a trainer that is suspect: its run broke off before a first step."""
        with self._lock:
            self.running.pop(run.name)
            if outcome.code == ConfigError.exit_code and (_holder(run) is not None or is_finished(run)):
                self.waiting.append(run)  # another command was faster: it is not this one's failure
                return
            may_repeat = run.name not in self._retried and not self.stopping
            # Not where the run has failed on another trainer too, nor the last one: a trainer is needed that reports what is wrong.
            retired = suspect and may_repeat and len(self._at_work) > 1
            again = retired or (outcome.died and may_repeat)
            if outcome.code == Stopped.exit_code:
                self.stopping = True
            if again:
                self._retried.add(run.name)
                self.waiting.insert(0, run)
            else:
                self.outcomes[run.name] = outcome
            self.display.ended(self, run, outcome, again=again)
            if retired:
                self._at_work.discard(number)
                self.display.retired(self, number)

    def _next(self, number: int) -> RunConfig | None:
        """Take the next run that nobody else is training; one that another command has is waited for."""
        while not self.stopping:
            with self._lock:
                for run in list(self.waiting):
                    if self._is_free(run):
                        self.waiting.remove(run)
                        if not is_finished(run):
                            return run
                        self.display.elsewhere(self, run, None)
                if not self.waiting:
                    self._at_work.discard(number)
                    return None
            time.sleep(0.5)
        return None

    def _is_free(self, run: RunConfig) -> bool:
        if self._waits_for_posterior(run):
            return False
        holder = _holder(run)
        if holder is not None and run.name not in self._held:
            self._held.add(run.name)
            self.display.elsewhere(self, run, holder)
        return holder is None

    def _waits_for_posterior(self, run: RunConfig) -> bool:
        """Whether another run of the table is still to learn the posterior that this one starts from.

        If that run fails, this one is tried all the same: what it reports is the missing posterior.
        """
        if run.source.posterior is None:
            return False
        place = run.source.posterior.absolute()
        makers = (one for one in self.runs if one.source.posterior is None and place.is_relative_to(one.directory.absolute()))
        return any(one.name not in self.outcomes and not is_finished(one) for one in makers)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, lambda *_: self.stop()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _holder(run: RunConfig) -> Holder | None:
    with suppress(StorageError):  # what is wrong with the lock is reported when the run is opened
        return holder_of(run.directory)
    return None


def _recorded_bytes(run: RunConfig) -> int:
    """Return how much a run has recorded of its steps."""
    file = run.directory / layout.METRICS
    return file.stat().st_size if file.is_file() else 0
