"""One trial: the ordinary run in its own run directory, in a thread, so that its driver can wait for its validations.

The driver and the trial talk through files, which outlive both: `pruned.json` in the run directory ends one trial, `stop.json` in
the folder of the sweep all of them. Never imports ray.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.distributed import environment
from bpt_dist.errors import ConfigError, DataError, NonFinite, Stopped, exit_code, reason_of
from bpt_dist.storage import layout
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.storage.layout import PRUNED, STOP, TAGS, target_stage
from bpt_dist.storage.metrics_log import BEST_SCORE, SWEEP_SCORE, TARGET_VALIDATION, RecordFollower

if TYPE_CHECKING:
    from bpt_dist.training.run import TrainingRun

POLL = 0.2
ORPHAN_SECONDS = 30.0  # what a trial of a killed sweep may need to notice
NOT_RETRIED = (ConfigError.exit_code, DataError.exit_code, NonFinite.exit_code, Stopped.exit_code)
"""Exit codes of trials that would end the same way again, or that were asked to end."""


class Pruned(Stopped):
    """The trial fell behind the others and was ended; it could be resumed by hand."""


@dataclass(frozen=True)
class TrialUpdate:
    """A report of a trial: its score, and at its end how it ended."""

    step: int
    score: float
    done: bool = False
    state: str = "running"
    reason: str | None = None
    code: int = 0

    def result(self) -> dict[str, Any]:
        """Return it as the result of a Tune trial."""
        return {"step": self.step, "score": self.score, "done": self.done, "state": self.state, "reason": self.reason}


class TrialThread:
    """A run that is trained in a thread; `next` waits for its next validation or its end."""

    def __init__(self, config: RunConfig, sweep_folder: Path, tags: dict[str, str]) -> None:
        self.config, self.sweep_folder, self.tags = config, sweep_folder, tags
        self.last = Point(0, -math.inf)
        self.run: TrainingRun | None = None
        self.scores = Scores(config)
        self._news: queue.Queue[TrialUpdate] = queue.Queue()
        self._wanted = threading.Event()
        self._closing: str | None = None
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next(self) -> TrialUpdate:
        """Let the run continue to its next validation and return that, or how it ended."""
        self._wanted.set()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._news.get(timeout=POLL)
            if (reason := self.reason_to_stop()) and self.run is not None:
                self.run.watchdog.request_stop(reason)

    def close(self, reason: str, seconds: float = 60.0) -> None:
        """End the run with a checkpoint and wait for it."""
        self._closing = self._closing or reason
        self._wanted.set()
        if self.run is not None:
            self.run.watchdog.request_stop(reason)
        self._thread.join(seconds)

    def reason_to_stop(self) -> str | None:
        """Return why the run should end, or None."""
        if (self.config.directory / PRUNED).is_file():
            return "pruned"
        file = self.sweep_folder / STOP
        if file.is_file():
            return str(read_json(file)["reason"])
        if os.getppid() != self._parent:
            return "the sweep is gone"
        return self._closing

    def _run(self) -> None:
        try:
            train_trial(self.config, self.sweep_folder, self.tags, self._begin, self._validated)
            ending = TrialUpdate(*self._now(), done=True, state="finished")
        except BaseException as error:
            state = "pruned" if isinstance(error, Pruned) else "stopped" if isinstance(error, Stopped) else "failed"
            ending = TrialUpdate(*self.last, done=True, state=state, reason=reason_of(error), code=exit_code(error))
        self.run = None
        self._news.put(ending)

    def _begin(self, run: TrainingRun) -> None:
        self.run = run

    def _now(self) -> Point:
        points = self.scores.look()
        return points[-1] if points else Point(last_step(self.config), -math.inf)

    def _validated(self) -> None:
        """Report a score and wait until the driver has seen it, so that a trial ends a step behind the rung that prunes it."""
        self.last = self._now()
        self._wanted.clear()
        self._news.put(TrialUpdate(*self.last))
        assert self.run is not None
        while not self._wanted.wait(POLL) and not self.reason_to_stop():
            self.run.watchdog.heartbeat("waiting for the sweep")
        if reason := self.reason_to_stop():
            self.run.watchdog.request_stop(reason)


def read_history(config: RunConfig) -> list[Point]:
    """Return the scores in the metrics of a trial's run directory."""
    return Scores(config).look()


def train_trial(
    config: RunConfig,
    sweep_folder: Path,
    tags: dict[str, str],
    begin: Callable[[TrainingRun], None],
    validated: Callable[[], None] = lambda: None,
) -> None:
    """Train the run of a trial as `launcher/train.py` would (collective where the trial has several processes).

    `begin(run)` is called before training and `validated()` after each validation, once its score is logged (rank 0). Raises
    Pruned, which is also the run's status, where the sweep ended the trial.
    """
    from bpt_dist.train import train_run
    from bpt_dist.training.startup import start_world

    world = start_world(config)
    if world.rank == 0:
        _await_orphan(config)
        (config.directory / PRUNED).unlink(missing_ok=True)
    world.barrier()

    @contextlib.contextmanager
    def around(run: TrainingRun) -> Iterator[None]:
        file, scores = run.directory.folder / TAGS, Scores(config)
        if world.rank == 0:
            write_json_atomic(file, tags)

        def log_score() -> None:
            # A record like any other, so tracking shows it for pruned trials as well.
            step, score = scores.look()[-1]
            run.log.append({"step": step, "stage": "sweep", "metrics": {SWEEP_SCORE: score}})
            validated()

        run.on_validation = log_score
        begin(run)
        try:
            yield
        except Stopped as error:
            if not (config.directory / PRUNED).is_file():
                raise
            facts = read_json(config.directory / PRUNED)
            if world.rank == 0:
                write_json_atomic(file, tags | {"bpt.pruned": f"asha@{facts['step']}"})
            raise Pruned(f"pruned by asha at step {facts['step']} with a score of {facts['score']:.2f}") from error

    train_run(config, world, around=around)


def _await_orphan(config: RunConfig) -> None:
    """Wait for the process of an earlier sweep that was killed: it ends as soon as it notices."""
    from bpt_dist.storage.lock import holder_of

    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline and config.directory.is_dir() and holder_of(config.directory) is not None:
        time.sleep(POLL)


def prepare_process(config_file: Path, cwd: Path, cpus: float) -> RunConfig:
    """Make this process one that trains `config_file`, before torch is imported, and return the configuration."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(cpus)))  # Ray's workers inherit the driver's
    environment.prepare_process()
    os.chdir(cwd)
    # What the run records as the command that resumes it.
    sys.argv = ["launcher/train.py", "--config", str(config_file)]
    return configuration.load(config_file)


class Point(NamedTuple):
    """The score of a trial after `step` target steps, counted over its targets."""

    step: int
    score: float


def target_stages(config: RunConfig) -> list[str]:
    """Return the names of the target stages in the order they are trained."""
    return list(dict.fromkeys(target_stage(task, joint=config.target.joint) for task in config.data.target_tasks))


def last_step(config: RunConfig) -> int:
    """Return the target steps of a whole trial."""
    return len(target_stages(config)) * config.target.steps


def is_validation(record: Mapping[str, Any]) -> bool:
    """Return whether a record of metrics.jsonl is a validation."""
    return any(name.startswith(TARGET_VALIDATION) for name in record.get("metrics", {}))


class Scores:
    """The scores in the metrics of a trial's run directory; each look reads only the records that are new."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self._stages = config, target_stages(config)
        self._follower = RecordFollower(config.directory / layout.METRICS)
        self._begin()

    def _begin(self) -> None:
        self._points: list[Point] = []
        self._best: dict[str, float] = {}
        self._reported: float | None = None

    def look(self) -> list[Point]:
        """Return the score after every validation so far: see `history`."""
        records, was_cut = self._follower.new()
        if was_cut:
            self._begin()
        self.add(records)
        return self._points

    @property
    def reported(self) -> float | None:
        """Return the mean headline metric on the last reported split, which a finished run writes once; never used to choose."""
        return self._reported

    def add(self, records: Iterable[Mapping[str, Any]]) -> list[Point]:
        """Take records in their order, and return all points."""
        for record in records:
            metrics = record.get("metrics", {})
            self._reported = metrics.get(BEST_SCORE, self._reported)
            if not is_validation(record) or record["stage"] not in self._stages:
                continue
            values = [value for name, value in metrics.items() if name.startswith(TARGET_VALIDATION)]
            value = -math.inf if None in values else sum(values) / len(values)
            stage, best = record["stage"], self._best
            best[stage] = max(value, best.get(stage, -math.inf))
            step = self._stages.index(stage) * self.config.target.steps + record["step"]
            self._points.append(Point(step, sum(best.values()) / len(best)))
        return self._points


def history(config: RunConfig, records: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return the score after every validation: the best so far of the target in training, averaged with those trained before it.

    The headline metrics are percent. At equal steps all trials of a sweep have met the same targets, so their scores compare. A
    validation that is not a number counts as minus infinity.
    """
    return Scores(config).add(records)
