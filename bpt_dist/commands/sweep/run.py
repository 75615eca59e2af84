"""A sweep from its first trial to its best configuration: Ray Tune schedules trials, the run directories hold their state.

No state of Tune is needed to resume: `sweep.json` lists the trials, each run directory holds the progress of its trial. The same
command with `--resume` restores a sweep that was killed, and nothing is unpickled.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpt_dist.commands.sweep.cluster import Resources, check_resources, cluster
from bpt_dist.commands.sweep.record import Record
from bpt_dist.commands.sweep.report import finish_report
from bpt_dist.commands.sweep.screen import Screen
from bpt_dist.commands.sweep.settings import Sweep, Trial, load, runnable_yaml
from bpt_dist.commands.sweep.tracking import complete_tracking, tags
from bpt_dist.commands.sweep.trial import PRUNED, STOP, Point, last_step, read_history
from bpt_dist.config import RunConfig
from bpt_dist.config.mlflow_environment import with_uri_of_environment
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, Stopped, StorageError, UserError
from bpt_dist.storage.files import write_atomic, write_json_atomic
from bpt_dist.storage.lock import RunLock
from bpt_dist.tracking.answer import warn_of_refusals

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
            if record.has_work():
                warn_of_refusals([trial.config for trial in record.trials] or [record.sweep.example()])
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
    """Check what every trial needs before one is started: the machine, the search, the posterior, its backbone, the rows.

    Raises ConfigError or DataError.
    """
    from bpt_dist.commands.sweep.preflight import check_inputs

    check_resources(sweep.settings)
    known = sweep.known_settings()
    if known is None:
        from bpt_dist.commands.sweep.space import corners
        from bpt_dist.commands.sweep.tune import check_search

        check_search(sweep)
        known = list(corners(sweep.space))
    check_inputs([trial.config for trial in sweep.trials(known)], sweep.settings.workers)


def _run_trials(record: Record, screen: Screen, resources: Resources) -> None:
    """Let Tune run the waiting trials."""
    from ray import tune

    from bpt_dist.commands.sweep.tune import ProgressCallback

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
            callbacks=[ProgressCallback(screen, sweep.settings.max_failures, stop.check, record.reasons)],
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
    """Return the error a user can fix that Tune wrapped in errors of its own, or that a full disk caused; else the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        inner = inner.__cause__ or inner.__context__
    if shutil.disk_usage(folder).free < FULL_BYTES:
        return StorageError(f"{folder}: no space left on the device; free some space, then add --resume to continue")
    return error


def _trainable(sweep: Sweep, resources: Resources) -> Any:
    from ray import tune

    if sweep.settings.stage == "adapt":
        from bpt_dist.commands.sweep.trainables import InProcess

        return tune.with_resources(InProcess, resources.of_a_process)
    from bpt_dist.commands.sweep.trainables import ManyProcesses

    return tune.with_resources(ManyProcesses, {"CPU": 1})


def _scheduler(record: Record) -> Any:
    """Return ASHA with what earlier starts of this sweep already know, or None."""
    settings = record.sweep.settings
    if settings.scheduler == "none":
        return None
    from bpt_dist.commands.sweep.tune import ResumableASHA

    example = record.sweep.trial(0, _example(record), settings.seeds[0]).config

    def pruned(name: str, point: Point) -> None:
        write_json_atomic(record.named(name).config.directory / PRUNED, point._asdict())

    first = settings.first_rung or example.target.eval_every or 1
    asha = ResumableASHA(first, max(last_step(example), first), settings.reduction, pruned)
    for trial in record.trials:
        asha.replay(trial.name, read_history(trial.config))
    return asha


def _example(record: Record) -> dict[str, Any]:
    from bpt_dist.commands.sweep.space import corners

    return record.trials[0].values if record.trials else next(corners(record.sweep.space))


def _searcher(record: Record, waiting: list[Trial], resources: Resources, stopping: Callable[[], bool]) -> Any:
    from bpt_dist.commands.sweep.tune import ListSearcher, OptunaSearcher

    def task(trial: Trial) -> dict[str, Any]:
        """Write the configuration of a trial down and return what its process is told."""
        if all(recorded.name != trial.name for recorded in record.trials):
            record.add([trial])
        file = record.sweep.directory / CONFIGS / f"{trial.name}.yaml"
        write_atomic(file, runnable_yaml(with_uri_of_environment(trial.config)).encode())
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
        return ListSearcher(waiting, task, stopping)
    means = {setting.number: setting.mean for setting in record.means()}
    scored = {trial.number: (trial.values, means.get(trial.number)) for trial in record.trials}
    return OptunaSearcher(record.sweep, waiting, scored, task, stopping)


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
                raise Stopped("ended at once; add --resume to continue from the checkpoints")
            self.ask(f"the sweep received {signal.Signals(number).name}")
            sys.stderr.write("stopping the trials with a checkpoint; once more to end at once\n")

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        previous = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _ending(record: Record, best: RunConfig | None) -> int:
    statuses = record.standings()
    untried = record.sweep.num_settings - len({trial.number for trial in record.trials})
    if untried or any(status.state in ("stopped", "waiting", "running", "created") for status in statuses):
        sys.stderr.write(f"{record.sweep.directory}: not all trials have ended; add --resume to continue\n")
        return Stopped.exit_code
    failed = [status for status in statuses if status.state == "failed" and not status.diverged]
    for status in failed:
        sys.stderr.write(f"{status.name} failed: {status.reason}\n")
    if failed:
        return INTERNAL_ERROR
    if best is None:
        raise ConfigError(
            "space: no setting finished with all seeds, so there is no best one; search elsewhere, or scheduler: none"
        )
    return 0


def sweep(file: Path, overrides: Sequence[str], *, resume: bool, submit: str | None, follow: bool) -> int:
    """Run or submit the sweep of a file with `key=value` overrides and return the exit code.

    Raises ConfigError for everything that can be known to be wrong before anything is started.
    """
    if follow and submit is None:
        raise ConfigError("--follow: has no effect without --submit; a sweep on this machine shows its progress itself")
    loaded = load(file, overrides)
    if submit is not None:
        from bpt_dist.commands.sweep.submit import submit as hand_over

        return hand_over(loaded, file, overrides, submit, resume=resume, follow=follow)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    return run_sweep(loaded, resume=resume)
