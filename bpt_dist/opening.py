"""Open a run on every rank: directory, lock, guard, backbone, data, tracking; and close it whatever happens."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from bpt_dist import backbone as backbones
from bpt_dist import config as configuration
from bpt_dist import engine, mini
from bpt_dist.backbone import Backbone
from bpt_dist.config import Config
from bpt_dist.data.prepared import default_cache
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, DataError, OutOfMemory, PeerLost, UserError
from bpt_dist.faults import fault_point
from bpt_dist.files import read_json, write_json_atomic
from bpt_dist.guard import Guard
from bpt_dist.journal import MetricsLog
from bpt_dist.lock import NAME as LOCK
from bpt_dist.mesh import World, peer_lost
from bpt_dist.methods.base import Method
from bpt_dist.mirror import Mirror, shutdown
from bpt_dist.packed_attention import expected, probed
from bpt_dist.run import Run, exit_code, git_state, reason_of, versions
from bpt_dist.session import Session
from bpt_dist.tracking import Request, parameters

log = logging.getLogger(__name__)
UNTRACKED = ("name", "output", "run_dir", "seed", "tracking", "figures", "data.cache", "rows", "seeds")


@contextmanager
def opened(config: Config, world: World, *, fresh: bool) -> Iterator[Session | None]:
    """Open a run on every rank and close it whatever happens; yields None for a run that is finished (collective: every rank)."""
    with ExitStack() as stack:
        limits = config.distribution
        # Before anything is on disk: a signal must find somebody who says what became of the run.
        guard = Guard(None, world.rank, startup_timeout=limits.startup_timeout, step_timeout=limits.step_timeout)
        stack.enter_context(guard)
        run = _open_run(config, world, fresh)
        stack.enter_context(run)
        guard.attend(run.path("logs"), _last_words(run))
        if world.broadcast(run.finished):
            yield None
            return
        # Another run of this job may have left the short limit of its steps.
        world.set_timeout(config.distribution.startup_timeout)
        try:
            yield _session(config, world, run, guard, stack)
        except RuntimeError as error:
            raise peer_lost(error, world) or error from error
        run.status("finished")


def _session(config: Config, world: World, run: Run, guard: Guard, stack: ExitStack) -> Session:
    """Load what a run needs; `stack` closes it (collective: every rank)."""
    backbone = load_backbone(config, world)
    world.set_timeout(config.distribution.startup_timeout)  # also for the groups that partitioning has made
    _check_backbone(run, backbone, world)
    journal = MetricsLog(run.folder / "metrics.jsonl") if world.rank == 0 else None
    if journal is not None:
        stack.callback(journal.close)
    session = Session(config, world, guard, run, journal, backbone, configuration.fingerprint(config))  # type: ignore[arg-type]
    _check_data(run, session.data_hashes(), world)
    _check_registered(config, session.method)
    if journal is not None and config.tracking.mlflow:
        # As late as can be: what the first stage cuts off the metrics on a resume need not be sent.
        stack.enter_context(Mirror(run.folder, tracking_request(config, run, world.size)))
    return session


def _last_words(run: Run) -> Callable[[str, str], None]:
    """Return what leaves a true status behind when the guard ends this process."""

    def say(state: str, reason: str) -> None:
        run.status("stopped" if state == "stopped" else "failed", reason)

    return say


def _open_run(config: Config, world: World, fresh: bool) -> Run:
    """Open the run directory, rank 0 first; what it refuses, every rank refuses."""

    def changed(_old: str) -> list[str]:
        return configuration.changed_keys(configuration.load(config.directory / "config.yaml"), config)

    def open_it() -> Run:
        text = configuration.resolved_yaml(config)
        print_ = configuration.fingerprint(config)
        return Run.open(text, print_, changed, config.directory, fresh=fresh, rank=world.rank, world_size=world.size)

    run, problem = None, None
    if world.rank == 0:
        try:
            run = open_it()
        except Exception as error:
            problem = error
    problem = world.broadcast(problem)
    if problem is not None:
        raise problem
    # The lock names this very start: who reads the same words has the same directory before it.
    lock = config.directory / LOCK
    world.sees(lock, lock.read_bytes() if run is not None else None)
    return run or open_it()


def _check_backbone(run: Run, backbone: Backbone, world: World) -> None:
    """Refuse to go on with another T5 or tokenizer than the run began with: its checkpoints mean nothing to them."""
    file, problem = run.folder / "backbone.json", None
    own = {"backbone_hash": backbone.identity, "tokenizer_hash": backbone.tokenizer_hash}
    strangers = [rank for rank, theirs in enumerate(world.gather_objects(own)) if theirs != own]
    if world.rank == 0 and strangers:
        places = ", ".join(f"rank {rank} on {world.hosts[rank]}" for rank in strangers)
        problem = f"backbone.path: {backbone.path} is another T5 or tokenizer on {places} than on rank 0; copy one to all hosts"
    elif world.rank == 0 and not file.is_file():
        write_json_atomic(file, own)
    elif world.rank == 0 and (before := read_json(file)) != own:
        what = "backbone" if before["backbone_hash"] != backbone.identity else "tokenizer"
        key = f"{what}_hash"
        problem = (
            f"backbone.path: {backbone.path} holds another {what} than {run.folder} began with (hash {before[key][:12]}..., now "
            f"{own[key][:12]}...); put the old one back to resume, or choose another name="
        )
    problem = world.broadcast(problem)
    if problem:
        raise ConfigError(problem)


def _check_data(run: Run, own: dict[str, str], world: World) -> None:
    """Refuse other rows than the run began with, or than another rank has: neither resuming nor one result would mean anything."""
    file, problem = run.folder / "data.json", None
    everyones = world.gather_objects(own)
    others = [(rank, name) for rank, theirs in enumerate(everyones) for name in theirs if theirs[name] != everyones[0].get(name)]
    if others:
        rank, name = others[0]
        problem = (
            f"data: {name} has other rows on rank {rank} ({world.hosts[rank]}) than on rank 0; copy the same files to all hosts"
        )
    elif world.rank == 0 and not file.is_file():
        write_json_atomic(file, own)
    elif world.rank == 0 and (changed := sorted(name for name, found in read_json(file).items() if own.get(name, found) != found)):
        problem = (
            f"data: {', '.join(changed)} (task and split) has other rows than {run.folder} began with; put the old files back to "
            "resume, or choose another name="
        )
    problem = world.broadcast(problem)
    if problem:
        raise DataError(problem)


def _check_registered(config: Config, method: Method) -> None:
    """Refuse to register what a method does not leave: a PEFT folder, made from prompts or low-rank pairs."""
    own = type(method)
    if config.tracking.register_as is not None and (own.prompts, own.low_rank_pairs) == (Method.prompts, Method.low_rank_pairs):
        raise ConfigError(f"tracking.register_as: method {config.method.name} leaves no PEFT folder to register; remove it")


def load_backbone(config: Config, world: World) -> Backbone:
    """Load the T5 of the configuration and put it where it belongs (collective: every rank)."""
    path = str(mini.BACKBONE) if config.backbone.path == "mini" else config.backbone.path
    settings = config.backbone
    backbone = backbones.load(
        path, name=settings.path, revision=settings.revision, dtype=settings.dtype, attention=settings.attention
    )
    fault_point("backbone.loaded")
    engine.place(backbone, config.distribution, world, trained=config.method.TRAINS_BACKBONE)
    if _may_pack(config, world):
        # One rank measures for all: ranks that compute differently would differ in the last bits.
        kind = settings.attention if settings.attention != "auto" else world.broadcast(_faster_attention(backbone, config, world))
        backbone.pack(kind)
    return backbone


def _may_pack(config: Config, world: World) -> bool:
    """Return whether our own pass may stand in for transformers', and say on rank 0 why not."""
    given = config.distribution
    reason = f"distribution.shard is {given.shard}" if given.shard != "none" else None
    reason = "distribution.activation_checkpointing is on" if given.activation_checkpointing else reason
    if config.backbone.forward == "stock" or reason is None:
        return config.backbone.forward != "stock"
    if world.rank == 0:
        log.info("texts are read by transformers' modules, padded: %s", reason)
    return False


def _faster_attention(backbone: Backbone, config: Config, world: World) -> str | None:
    if world.rank:
        return None
    if config.distribution.exact:  # never a matter of measured times
        return expected(world.device, backbone.model.dtype)
    return probed(world.device, backbone.model.dtype, config.data.cache or default_cache())


def leave(error: Exception, world: World) -> int:
    """Say why the job ends and return its exit code; with peers, end this process at once.

    After a failed collective the process group can neither be used nor destroyed, and a rank that waits for it would hang.
    """
    if isinstance(error, RuntimeError):
        error = peer_lost(error, world) or error
    code = exit_code(error)
    if code == INTERNAL_ERROR and not isinstance(error, UserError):
        logging.getLogger(__name__).error("internal error", exc_info=error)
    if not isinstance(error, PeerLost):
        world.say_last(reason_of(error))
    if not isinstance(error, UserError) or isinstance(error, OutOfMemory) or world.rank == _spokesman(error, world):
        sys.stderr.write(f"{reason_of(error)}\n")
    if world.rank == 0:
        shutdown()
    if world.size > 1 and world.rank == 0:
        time.sleep(0.5)  # this process keeps the job's store: the others still read there who is missing
    if world.size > 1:
        sys.stderr.flush()
        os._exit(code)
    return code


def _spokesman(error: UserError, world: World) -> int:
    """Return the rank that tells the user; when rank 0 has taken the job's store with it, the first one left of each host."""
    if not isinstance(error, PeerLost):
        return 0
    if error.spokesman is not None or world.rank == 0:
        return error.spokesman or 0
    return next(rank for rank, host in enumerate(world.hosts) if rank and host == world.hosts[world.rank])


def tracking_request(config: Config, run: Run, world_size: int) -> Request:
    """Return where and under which name, parameters and tags MLflow mirrors the run."""
    store = (config.output if config.run_dir is None else config.run_dir.parent.parent).resolve() / "mlflow.db"
    commit = git_state() or {}
    tags = {
        "git.commit": str(commit.get("commit", "")),
        "git.dirty": str(commit.get("dirty", "")),
        "config.sha256": configuration.fingerprint(config),
        "method": config.method.name,
        "seed": str(config.seed),
        "bpt.stage": "source, target" if config.method.HAS_SOURCE_STAGE else "target",
        "world_size": str(world_size),
        **{f"version.{package}": version for package, version in versions().items()},
    }
    return Request(
        id=run.id,
        uri=config.tracking.uri or f"sqlite:///{store}",
        experiment=config.tracking.experiment or config.name,
        run_name=config.name,
        params=parameters(config.model_dump(mode="json"), leave_out=UNTRACKED),
        tags=tags,
        alias=config.tracking.register_as,
    )
