"""A sweep from its first trial to its best configuration: Ray Tune hands out trials, the run directories are the truth.

Nothing that Tune keeps is needed to go on: `sweep.json` lists the trials, each run directory says how far its trial is. So a sweep
that was killed is restored by the same command with `--resume`, and nothing is unpickled.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpt_dist.config import Config
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, Stopped, StorageError, UserError
from bpt_dist.files import write_atomic, write_json_atomic
from bpt_dist.lock import RunLock
from bpt_dist.sweep_cluster import Resources, check_resources, cluster
from bpt_dist.sweep_record import Record
from bpt_dist.sweep_report import finish_report
from bpt_dist.sweep_scores import Point, last_step
from bpt_dist.sweep_screen import Screen
from bpt_dist.sweep_settings import Sweep, Trial, runnable_yaml
from bpt_dist.sweep_tracking import complete_tracking, tags, warn_of_silence
from bpt_dist.sweep_work import PRUNED, STOP, read_history

CONFIGS = "configs"
FULL_BYTES = 1 << 20  # less than this is no room for a checkpoint
log = logging.getLogger(__name__)


def run_sweep(sweep: Sweep, *, resume: bool = False) -> int:
    """Run what has not ended and report; return 0, 75 after a stop, or 70 when trials failed.

    Raises ConfigError for a sweep that cannot run, before anything is started.
    """
    folder = sweep.directory
    check(sweep)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = RunLock(folder)
        lock.acquire()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror}); choose another output=") from error
    try:
        record = Record.open(sweep, resume=resume)
        (folder / STOP).unlink(missing_ok=True)
        with Screen(record) as screen:
            if _has_work(record):
                warn_of_silence(record)
                with cluster(sweep.settings, folder) as resources:
                    _run_trials(record, screen, resources)
        record.save()
        if any((trial.config.tracking.mlflow) for trial in record.trials):
            complete_tracking(record)
        return _ending(record, finish_report(record))
    except OSError as error:
        raise _cause(error, folder) from error
    finally:
        lock.release()


def check(sweep: Sweep) -> None:
    """Check what every trial needs before one is started: the machine, the search, the posterior, the T5 it belongs to, the rows.

    Raises ConfigError or DataError.
    """
    from bpt_dist.sweep_checks import check_inputs

    check_resources(sweep.settings)
    known = sweep.known_settings()
    if known is None:
        from bpt_dist.sweep_search import check_search
        from bpt_dist.sweep_space import corners

        check_search(sweep)
        known = list(corners(sweep.space))
    check_inputs([trial.config for trial in sweep.trials(known)], sweep.settings.workers)


def _has_work(record: Record) -> bool:
    return bool(record.waiting()) or len({trial.number for trial in record.trials}) < record.sweep.num_settings


def _run_trials(record: Record, screen: Screen, resources: Resources) -> None:
    """Let Tune run the waiting trials."""
    from ray import tune

    from bpt_dist.sweep_watch import Watch

    sweep, folder = record.sweep, record.sweep.directory
    waiting = record.waiting()
    stop = _Stop(folder / STOP, sweep.settings.time_budget)
    unknown = (sweep.num_settings - len({trial.number for trial in record.trials})) * len(sweep.settings.seeds)
    screen.opened(len(waiting) + unknown, resources)
    shutil.rmtree(folder / "ray", ignore_errors=True)  # of a start that was killed
    tuner = tune.Tuner(
        _trainable(sweep, resources),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=len(waiting) + unknown,
            max_concurrent_trials=resources.concurrency,
            search_alg=_searcher(record, waiting, resources, stop.requested),
            scheduler=_scheduler(record),
            reuse_actors=sweep.settings.stage == "adapt",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str((folder / "ray").resolve()),
            failure_config=tune.FailureConfig(max_failures=sweep.settings.max_failures),
            callbacks=[Watch(screen, sweep.settings.max_failures, stop.check, record.reasons)],
            verbose=0,
        ),
    )
    with stop.on_signals():
        try:
            tuner.fit()
        except Exception as error:
            raise _cause(error, folder) from error
    shutil.rmtree(folder / "ray", ignore_errors=True)


def _cause(error: BaseException, folder: Path) -> BaseException:
    """Return what Tune has wrapped in errors of its own, or met first on a full disk: what a user can mend, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        inner = inner.__cause__ or inner.__context__
    if shutil.disk_usage(folder).free < FULL_BYTES:
        return StorageError(f"{folder}: no space left on the device; make room, then --resume goes on")
    return error


def _trainable(sweep: Sweep, resources: Resources) -> Any:
    from ray import tune

    if sweep.settings.stage == "adapt":
        from bpt_dist.sweep_trial import InProcess

        return tune.with_resources(InProcess, resources.of_a_process)
    from bpt_dist.sweep_train import ManyProcesses

    return tune.with_resources(ManyProcesses, {"CPU": 1})


def _scheduler(record: Record) -> Any:
    """Return ASHA with what earlier starts of this sweep already know, or None."""
    settings = record.sweep.settings
    if settings.scheduler == "none":
        return None
    from bpt_dist.sweep_pruning import Halving

    example = record.sweep.trial(0, _example(record), settings.seeds[0]).config

    def pruned(name: str, point: Point) -> None:
        write_json_atomic(record.named(name).config.directory / PRUNED, point._asdict())

    first = settings.first_rung or example.target.eval_every or 1
    asha = Halving(first, max(last_step(example), first), settings.reduction, pruned)
    for trial in record.trials:
        asha.replay(trial.name, read_history(trial.config))
    return asha


def _example(record: Record) -> dict[str, Any]:
    from bpt_dist.sweep_space import corners

    return record.trials[0].values if record.trials else next(corners(record.sweep.space))


def _searcher(record: Record, waiting: list[Trial], resources: Resources, stopping: Callable[[], bool]) -> Any:
    from bpt_dist.sweep_search import Listed, Suggested

    def task(trial: Trial) -> dict[str, Any]:
        """Write the configuration of a trial down and return what its process is told."""
        if all(known.name != trial.name for known in record.trials):
            record.add([trial])
        file = record.sweep.directory / CONFIGS / f"{trial.name}.yaml"
        write_atomic(file, runnable_yaml(trial.config).encode())
        record.save()
        return {
            "trial": trial.name,
            "file": str(file),
            "cwd": str(Path.cwd()),
            "cpus": resources.cpus,
            "gpus": resources.gpus,
            "workers": resources.workers,
            "sweep": str(record.sweep.directory.resolve()),
            "tags": tags(record, trial),
        }

    if record.sweep.known_settings() is not None:
        return Listed(waiting, task, stopping)
    means = {one.number: one for one in record.means()}
    before = {trial.number: (trial.values, means[trial.number].mean if trial.number in means else None) for trial in record.trials}
    return Suggested(record.sweep, waiting, before, task, stopping)


class _Stop:
    """Asks all trials to stop with a checkpoint, by a file that they look for: on a signal, or when the time is over."""

    def __init__(self, file: Path, minutes: float | None) -> None:
        self.file, self.deadline = file, time.monotonic() + 60 * minutes if minutes is not None else None
        self.reason: str | None = None
        self.budget = minutes

    def requested(self) -> bool:
        """Return whether trials should end."""
        return self.reason is not None

    def check(self) -> None:
        """Look at the clock."""
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.ask(f"the time budget of {self.budget:g} minutes is over")

    def ask(self, reason: str) -> None:
        """Ask all trials to stop."""
        self.reason = reason
        write_json_atomic(self.file, {"reason": reason})

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Ask on SIGINT, SIGTERM and SIGUSR1 (which schedulers send before the time is over); the second one ends at once."""

        def handle(number: int, frame: object) -> None:
            if self.reason is not None:
                raise Stopped("ended at once; --resume goes on from the checkpoints")
            self.ask(f"the sweep received {signal.Signals(number).name}")
            sys.stderr.write("stopping the trials with a checkpoint; once more to end at once\n")

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ending(record: Record, best: Config | None) -> int:
    standings = record.standings()
    if any(one.state in ("stopped", "waiting", "running") for one in standings):
        sys.stderr.write(f"{record.sweep.directory}: not all trials have ended; --resume goes on\n")
        return Stopped.exit_code
    failed = [one for one in standings if one.state == "failed" and not one.diverged]
    for one in failed:
        sys.stderr.write(f"{one.name} failed: {one.reason}\n")
    if failed:
        return INTERNAL_ERROR
    if best is None:
        raise ConfigError(
            "space: no setting finished with all seeds, so there is no best one; search elsewhere, or scheduler: none"
        )
    return 0
