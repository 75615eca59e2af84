"""Open a run on every rank: job, directory, lock, watchdog, backbone, data, tracking; and close it whatever happens."""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.backbones.base import Backbone
from bpt_dist.config import RunConfig
from bpt_dist.config.mlflow_environment import notes
from bpt_dist.config.processes import check_processes
from bpt_dist.distributed import environment
from bpt_dist.distributed.mesh import World, peer_lost
from bpt_dist.distributed.watchdog import Watchdog
from bpt_dist.errors import ConfigError, DataError
from bpt_dist.methods.base import Method
from bpt_dist.storage import layout
from bpt_dist.storage.digest import SHORT
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.storage.metrics_log import MetricsLog
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tracking.mirror import Mirror
from bpt_dist.tracking.request import tracking_request
from bpt_dist.training.inputs import pin_inputs
from bpt_dist.training.out_of_memory import out_of_memory
from bpt_dist.training.run import TrainingRun
from bpt_dist.training.sharding.placement import load_backbone, release

log = logging.getLogger(__name__)


def start_world(config: RunConfig, rows: Sequence[str] = ()) -> World:
    """Join the job that trains `config`, or be its only process (collective: every rank); `rows`: those that it trains, or all.

    Ranks meet only the ranks of this job: those with the same configuration and run directory. Raises ConfigError before they
    meet when one of its runs cannot work on the processes that were started.
    """
    num_ranks = environment.world_size(os.environ)
    check_processes(configuration.expand(config, rows), num_ranks, launched=environment.is_launched(os.environ))
    limits, job = config.distribution, f"{configuration.job_identity(config)} {config.directory}"
    return World.start(limits.startup_timeout, limits.expect_world_size, job)


@contextmanager
def open_run(
    config: RunConfig, world: World, *, fresh: bool = False, guard: type[Watchdog] = Watchdog
) -> Iterator[TrainingRun | None]:
    """Open a run on every rank and close it whatever happens; yields None for a run that is finished (collective: every rank).

    `guard` decides what signals and hangs do to this process.
    """
    with ExitStack() as stack:
        limits = config.distribution
        # Before anything is on disk: a signal that arrives now must leave a status, too.
        watchdog = guard(
            None, world.rank, startup_timeout=limits.startup_timeout, step_timeout=limits.step_timeout,
            storage_timeout=limits.storage_timeout, grace=limits.grace, detector=world.detector,
        )  # fmt: skip
        stack.enter_context(watchdog)
        directory = stack.enter_context(_open_directory(config, world, fresh))
        watchdog.set_directory(directory.path(layout.LOGS), _status_on_exit(directory))
        if world.broadcast(directory.finished):
            yield None
            return
        # Another run of this job may have left the short limit of its steps.
        world.set_timeout(config.distribution.startup_timeout)
        try:
            yield _prepare_run(config, world, directory, watchdog, stack)
        except BaseException as error:
            watchdog.ignore_peers()
            if isinstance(error, (MemoryError, RuntimeError)):
                raise peer_lost(error, world) or out_of_memory(error, world) or error from error
            raise
        directory.status("finished")


def _prepare_run(config: RunConfig, world: World, directory: RunDirectory, watchdog: Watchdog, stack: ExitStack) -> TrainingRun:
    """Load what a run needs; `stack` closes it (collective: every rank)."""
    inputs = pin_inputs(directory, config, world)  # first: ranks with other settings of DeepSpeed would wait for each other
    gc.collect()  # the backbone of the run before may be part of a circle
    backbone = load_backbone(config, world, directory.choice("attention"))
    stack.callback(release, backbone)
    world.set_timeout(config.distribution.startup_timeout)  # also for the groups that partitioning has made
    _check_backbone(directory, backbone, world)
    if world.rank == 0 and backbone.attention is not None:
        directory.record_choice("attention", backbone.attention)
    metrics_log = MetricsLog(directory.folder / layout.METRICS) if world.rank == 0 else None
    if metrics_log is not None:
        stack.callback(metrics_log.close)
    fingerprint = world.broadcast(directory.fingerprint)
    run = TrainingRun(config, world, watchdog, directory, metrics_log, backbone, fingerprint, inputs)  # type: ignore[arg-type]
    _check_data(directory, run.data_hashes(), world)
    _check_registered(config, run.method)
    if metrics_log is not None and config.tracking.mlflow:
        # As late as possible: what the first stage cuts off the metrics on a resume need not be sent.
        _say_variables(tuple(notes(config)))
        stack.enter_context(Mirror(directory.folder, tracking_request(config, directory, world.size, run.absolute_rates)))
    return run


@functools.cache
def _say_variables(sentences: tuple[str, ...]) -> None:
    """Say once a process, not for every run of a table, which of MLflow's variables are used."""
    for sentence in sentences:
        log.info("tracking: %s", sentence)


def _status_on_exit(directory: RunDirectory) -> Callable[[str, str], None]:
    """Return what writes the final status when the watchdog ends this process."""

    def write(state: str, reason: str) -> None:
        directory.status("stopped" if state == "stopped" else "failed", reason)

    return write


def _open_directory(config: RunConfig, world: World, fresh: bool) -> RunDirectory:
    """Open the run directory, rank 0 first; what it refuses, every rank refuses (collective: every rank)."""

    stored = config.directory / layout.CONFIG

    def changed(_old: str) -> list[str]:
        return configuration.changes(stored, config)

    def is_same(record: Mapping[str, Any]) -> bool:
        return configuration.is_same_run(record, stored, config)

    def open_it() -> RunDirectory:
        text, fingerprint = configuration.resolved_yaml(config), configuration.fingerprint(config)
        return RunDirectory.open(
            text, fingerprint, changed, config.directory, fresh=fresh, rank=world.rank, world_size=world.size, is_same=is_same
        )

    directory, problem = None, None
    if world.rank == 0:
        try:
            moved = configuration.moved_inputs(stored, config)  # before the file is written again
            directory = open_it()
            for line in moved if directory.resumed else []:
                log.info("%s; the contents are compared with those the run was started with", line)
        except Exception as error:
            problem = error
    problem = world.broadcast(problem)
    if problem is not None:
        raise problem
    # The lock has a new id at every start: a rank that reads the same bytes sees the same directory.
    lock = config.directory / layout.LOCK
    world.wait_for_file(lock, lock.read_bytes() if directory is not None else None)
    return directory or open_it()


def _check_backbone(directory: RunDirectory, backbone: Backbone, world: World) -> None:
    """Check that weights and tokenizer are the same on all ranks and unchanged since the run started (collective: every rank)."""
    file, problem = directory.folder / layout.BACKBONE, None
    hashes = {"backbone_hash": backbone.identity, "tokenizer_hash": backbone.tokenizer_hash}
    strangers = [rank for rank, theirs in enumerate(world.gather_objects(hashes)) if theirs != hashes]
    if world.rank == 0 and strangers:
        places = ", ".join(f"rank {rank} on {world.hosts[rank]}" for rank in strangers)
        problem = (
            f"backbone.path: weights or tokenizer at {backbone.path} differ between rank 0 and {places}; "
            "copy the same files to all hosts"
        )
    elif world.rank == 0 and not file.is_file():
        write_json_atomic(file, hashes)
    elif world.rank == 0 and (pinned := read_json(file)) != hashes:
        what = "backbone" if pinned["backbone_hash"] != backbone.identity else "tokenizer"
        key = f"{what}_hash"
        problem = (
            f"backbone.path: the {what} at {backbone.path} changed since {directory.folder} was started "
            f"(hash {pinned[key][:SHORT]} -> {hashes[key][:SHORT]}); restore the original files to resume, or choose another name="
        )
    problem = world.broadcast(problem)
    if problem:
        raise ConfigError(problem)


def _check_data(directory: RunDirectory, hashes: dict[str, str], world: World) -> None:
    """Check that the rows are the same on all ranks and unchanged since the run started (collective: every rank)."""
    file, problem = directory.folder / layout.DATA, None
    everyones = world.gather_objects(hashes)
    others = [(rank, name) for rank, theirs in enumerate(everyones) for name in theirs if theirs[name] != everyones[0].get(name)]
    if others:
        rank, name = others[0]
        where = f"rank {rank} ({world.hosts[rank]})"
        problem = f"data: the rows of {name} differ between rank 0 and {where}; copy the same files to all hosts"
    elif world.rank == 0 and not file.is_file():
        write_json_atomic(file, hashes)
    elif world.rank == 0:
        old = read_json(file)
        changed = [name for name in sorted(old.keys() & hashes.keys()) if old[name] != hashes[name]]
        if changed:
            values = ", ".join(f"{old[name][:SHORT]} -> {hashes[name][:SHORT]}" for name in changed)
            problem = (
                f"data: the rows of {', '.join(changed)} (stage, task and split) changed since {directory.folder} was started "
                f"(hash {values}); restore the original files to resume, or choose another name="
            )
    problem = world.broadcast(problem)
    if problem:
        raise DataError(problem)


def _check_registered(config: RunConfig, method: Method) -> None:
    """Refuse to register a method that exports no PEFT folder: it has neither prompts nor low-rank pairs."""
    kind = type(method)
    if config.tracking.register_as is not None and (kind.prompts, kind.low_rank_pairs) == (Method.prompts, Method.low_rank_pairs):
        raise ConfigError(f"tracking.register_as: method {config.method.name} leaves no PEFT folder to register; remove it")
