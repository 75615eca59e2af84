"""`bpt_dist.train`: a configuration becomes finished runs inside the program that calls, which is left as it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpt_dist import config as configuration
from bpt_dist.config.processes import check_processes
from bpt_dist.config.strict_yaml import read
from bpt_dist.distributed import environment
from bpt_dist.errors import ConfigError
from bpt_dist.library.runs import Run, Runs
from bpt_dist.library.task import Task, write_tasks

if TYPE_CHECKING:
    from bpt_dist.config import RunConfig

    Source = str | Path | Mapping[str, Any] | RunConfig


def train(config: Source, *, tasks: Sequence[Task] = (), fresh: bool = False, **overrides: Any) -> Run | Runs:
    """Train as a configuration says and return the finished run, or for `rows` and `seeds` all of them.

        run = bpt_dist.train("configs/bpt/mini.yaml", output="runs", target__steps=100)

    `config` is a YAML file, the same keys as a dictionary, or a `RunConfig`. `overrides` are keys with values: a unique last name
    (`sigma=0.1`), `__` for the dot (`target__steps=100`), or a mapping (`target={"steps": 100}`). `tasks` are those in memory that
    `data.source_tasks` or `data.target_tasks` names; their rows are written to `<output>/tasks`. `fresh` refuses a run directory
    that is in use. A run that was stopped goes on from its checkpoint, and one that is finished is read.

    The first interrupt (Ctrl-C) ends the training after its step and raises Stopped, the next one raises KeyboardInterrupt. What is
    wrong raises a UserError: ConfigError before anything is started, DataError, NonFinite and the others of `bpt_dist.errors`.
    Signal handlers, environment and process groups are then as they were before.
    """
    settings = _settings(config, tasks, overrides)
    if environment.is_launched(os.environ) and environment.world_size(os.environ) > 1:
        raise ConfigError(
            f"train: is called in one of {environment.world_size(os.environ)} processes and trains in one; start several with "
            "`torchrun -m bpt_dist.commands.train --config FILE`"
        )
    runs = configuration.expand(settings)
    check_processes(runs, 1, launched=False)
    with _restored():
        _train_all(settings, runs, fresh=fresh)
    done = [Run.open(run.directory) for run in runs]
    return Runs(done) if settings.rows is not None or settings.seeds is not None else done[0]


def _settings(config: Source, tasks: Sequence[Task], overrides: Mapping[str, Any]) -> RunConfig:
    source: Any = Path(config) if isinstance(config, str | Path) else config
    if isinstance(source, configuration.RunConfig):
        source = source.model_dump(mode="json", exclude_unset=True)
    if not isinstance(source, Path | Mapping):
        raise ConfigError(f"train: a configuration is a file, a dictionary or a RunConfig (got {type(config).__name__})")
    given = dict(overrides)
    if tasks:
        plain = read(source).data if isinstance(source, Path) else source
        data = plain.get("data") if isinstance(plain.get("data"), Mapping) else {}
        own = write_tasks(tasks, Path(given.get("output") or plain.get("output") or "runs"))
        given["data__task_files"] = [*map(str, (data or {}).get("task_files") or ()), *own]
    settings = configuration.load_values(source, given)
    named = {name for run in configuration.expand(settings) for name in (*run.data.source_tasks, *run.data.target_tasks)}
    for task in tasks:
        if task.name not in named:
            raise ConfigError(f"tasks: {task.name!r} is not trained on; name it in data.source_tasks or data.target_tasks")
    return settings


def _train_all(settings: RunConfig, runs: Sequence[RunConfig], *, fresh: bool) -> None:
    import bpt_dist.train as training
    from bpt_dist.distributed.embedded import EmbeddedWatchdog
    from bpt_dist.errors import Stopped
    from bpt_dist.tracking.mirror import shutdown
    from bpt_dist.training.startup import start_world

    world = start_world(settings)
    try:
        for number, one in enumerate(runs, 1):
            of_several = f"{number}/{len(runs)} "
            late = training.train_run(one, world, fresh=fresh, number=of_several, guard=EmbeddedWatchdog)
            # An interrupt that came too late for a step of this run is meant for the next.
            if late and one is not runs[-1]:
                raise Stopped(f"stopped on request after {one.name}; train again to continue with the next run")
    finally:
        shutdown()


@contextmanager
def _restored() -> Iterator[None]:
    """Give back what a training sets in this process: environment, process group, level of our log, torch's kernels."""
    variables, logger = dict(os.environ), logging.getLogger("bpt_dist")
    level = logger.level
    environment.prepare_process()  # before torch is imported
    import torch
    from torch import distributed as dist

    had_group, deterministic = dist.is_initialized(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        logger.setLevel(level)
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
