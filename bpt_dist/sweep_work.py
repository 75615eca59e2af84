"""One trial: the ordinary run in its own run directory, in a thread, so that whoever drives it can wait for its validations.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.config import Config
from bpt_dist.errors import ConfigError, DataError, NonFinite, Stopped
from bpt_dist.files import read_json, write_json_atomic
from bpt_dist.sweep_scores import SCORE, Point, history, is_validation, last_step

PRUNED, STOP, TAGS = "pruned.json", "stop.json", "tags.json"
POLL = 0.2
ORPHAN_SECONDS = 30.0  # what a trial of a killed sweep may need to notice
HOPELESS = (ConfigError.exit_code, DataError.exit_code, NonFinite.exit_code, Stopped.exit_code)
"""Exit codes of trials that would end the same way again, or that were asked to end."""


class Pruned(Stopped):
    """The trial fell behind the others and was ended; it could be resumed by hand."""


@dataclass(frozen=True)
class News:
    """What a trial has to say: a score, and at its end how it ended."""

    step: int
    score: float
    done: bool = False
    state: str = "running"
    reason: str | None = None
    code: int = 0

    def result(self) -> dict[str, Any]:
        """Return it as the result of a Tune trial."""
        return {"step": self.step, "score": self.score, "done": self.done, "state": self.state, "reason": self.reason}


class Reporting:
    """The metrics log of a trial: behind every validation it writes the trial's score and calls `after`.

    The score is a record like any other, so tracking shows it for pruned trials as well.
    """

    def __init__(self, log: Any, config: Config, after: Callable[[], None] = lambda: None) -> None:
        self._log, self._config, self._after = log, config, after

    def append(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self._log.append(record)
        if is_validation(record):
            step, score = read_history(self._config)[-1]
            self._log.append({"step": step, "stage": "sweep", "metrics": {SCORE: score}})
            self._after()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


class Work:
    """A run that is trained in a thread; `next` waits for its next validation or its end."""

    def __init__(self, config: Config, sweep_folder: Path, tags: dict[str, str]) -> None:
        self.config, self.sweep_folder, self.tags = config, sweep_folder, tags
        self.last = Point(0, -math.inf)
        self.session: Any = None
        self._news: queue.Queue[News] = queue.Queue()
        self._wanted = threading.Event()
        self._closing: str | None = None
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next(self) -> News:
        """Let the run go on to its next validation and return that, or how it ended."""
        self._wanted.set()
        while True:
            with contextlib.suppress(queue.Empty):
                return self._news.get(timeout=POLL)
            if (reason := self.reason_to_stop()) and self.session is not None:
                self.session.guard.request_stop(reason)

    def close(self, reason: str, seconds: float = 60.0) -> None:
        """End the run with a checkpoint and wait for it."""
        self._closing = self._closing or reason
        self._wanted.set()
        if self.session is not None:
            self.session.guard.request_stop(reason)
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
        from bpt_dist.run import exit_code, reason_of

        try:
            with trial_session(self.config, self.sweep_folder, self.tags) as session:
                if session is not None:
                    from bpt_dist.train import train

                    self.session = session
                    session.log = Reporting(session.log, self.config, self._validated)  # type: ignore[assignment]
                    train(session)
            ending = News(*self._now(), done=True, state="finished")
        except BaseException as error:
            state = "pruned" if isinstance(error, Pruned) else "stopped" if isinstance(error, Stopped) else "failed"
            ending = News(*self.last, done=True, state=state, reason=reason_of(error), code=exit_code(error))
        self.session = None
        self._news.put(ending)

    def _now(self) -> Point:
        points = read_history(self.config)
        return points[-1] if points else Point(last_step(self.config), -math.inf)

    def _validated(self) -> None:
        """Report a score and wait until the driver has seen it, so that a trial ends a step behind the rung that prunes it."""
        self.last = self._now()
        self._wanted.clear()
        self._news.put(News(*self.last))
        while not self._wanted.wait(POLL) and not self.reason_to_stop():
            self.session.guard.beat("waiting for the sweep")
        if reason := self.reason_to_stop():
            self.session.guard.request_stop(reason)


def read_history(config: Config) -> list[Point]:
    """Return the scores in the metrics of a trial's run directory."""
    from bpt_dist.journal import read_records

    return history(config, read_records(config.directory / "metrics.jsonl", limit=1 << 30)[0])


@contextlib.contextmanager
def trial_session(config: Config, sweep_folder: Path, tags: dict[str, str]) -> Iterator[Any]:
    """Open the run of a trial as `launcher/train.py` would; a stop that the sweep asked for says so in the run's status.

    Collective where the trial has several processes. Yields None for a run that is finished.
    """
    from bpt_dist.mesh import World
    from bpt_dist.opening import opened

    limits = config.distribution
    world = World.start(limits.startup_timeout, limits.expect_world_size)
    if world.rank == 0:
        _await_orphan(config)
        (config.directory / PRUNED).unlink(missing_ok=True)
    world.barrier()
    with opened(config, world, fresh=False) as session:
        if session is not None and world.rank == 0:
            write_json_atomic(session.run.folder / TAGS, tags)
        try:
            yield session
        except Stopped as error:
            file = config.directory / PRUNED
            if session is None or not file.is_file():
                raise
            facts = read_json(file)
            if session.run.rank == 0:
                write_json_atomic(session.run.folder / TAGS, tags | {"bpt.pruned": f"asha@{facts['step']}"})
            raise Pruned(f"pruned by asha at step {facts['step']} with a score of {facts['score']:.2f}") from error


def _await_orphan(config: Config) -> None:
    """Wait for the process of an earlier sweep that was killed: it ends as soon as it notices."""
    from bpt_dist.lock import holder_of

    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline and config.directory.is_dir() and holder_of(config.directory) is not None:
        time.sleep(POLL)


def prepare_process(config_file: Path, cwd: Path, cpus: float) -> Config:
    """Make this process one that trains `config_file`, before torch is imported, and return the configuration."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(cpus)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.chdir(cwd)
    # What the run writes down as the command that goes on with it.
    sys.argv = ["launcher/train.py", "--config", str(config_file)]
    return configuration.load(config_file)
