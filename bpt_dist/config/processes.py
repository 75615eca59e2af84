"""Whether runs can work on the processes of a job; asked for all runs before the first one starts. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bpt_dist.config.loading import row_label
from bpt_dist.config.sections import RunConfig
from bpt_dist.distributed import environment
from bpt_dist.distributed.mesh_shape import mesh_shape
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout


def check_processes(runs: Sequence[RunConfig], num_ranks: int, *, launched: bool) -> None:
    """Raise ConfigError when a run cannot work on `num_ranks` processes; every problem at once, with the rows that have it.

    `launched`: a launcher has set the rank variables, so that even one process has a process group.
    """
    rows_of_problem: dict[str, dict[str, None]] = {}
    for run in runs:
        for problem in _problems(run, num_ranks, launched):
            rows_of_problem.setdefault(problem, {})[row_label(run)] = None
    if not rows_of_problem:
        return
    lines = [f"{problem} (in {', '.join(labels)})" for problem, labels in rows_of_problem.items()]
    raise ConfigError("\n".join(lines if len(runs) > 1 else rows_of_problem))


def _problems(run: RunConfig, num_ranks: int, launched: bool) -> Iterator[str]:
    given = run.distribution
    if given.shard != "none" and num_ranks == 1 and not launched:
        yield (
            f"distribution.shard: {given.shard} needs a process group, and this process has none; start with `deepspeed "
            "--num_gpus N launcher/train.py` or torchrun (`--processes N` of run-table), or set distribution.shard=none"
        )
    try:
        environment.check_world_size(given.expect_world_size, num_ranks)
        if not run.method.HAS_SOURCE_STAGE or run.source.posterior is not None or _has_posterior(run):
            return
        explicit = None if isinstance(given.mesh, str) else (given.mesh.particle, given.mesh.data)
        particle, _ = mesh_shape(getattr(run.method, "num_particles", 1), num_ranks, explicit)
    except ConfigError as error:
        yield str(error)
        return
    length = getattr(run.method, "prompt_length", None)
    if given.exchange == "coordinates" and length is not None and particle > length:
        yield (
            f"distribution.exchange: coordinates gives each of {particle} ranks a slice of {length} prompt position(s); use "
            "all_gather, start fewer processes, or set a longer method.length"
        )


def _has_posterior(run: RunConfig) -> bool:
    """Return whether the source stage is over: it may have been trained by another number of processes."""
    return (run.directory / layout.SOURCE / layout.POSTERIOR / layout.POSTERIOR_FACTS).is_file()
