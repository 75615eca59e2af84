"""`bpt-dist memory`: start ranks on this machine, let each hold its shard of the backbone, and compare the bytes with its share.

Ranks are forked after everything is imported, use gloo and the CPU: bytes are the same on every device.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import typer

from bpt_dist import config as configuration
from bpt_dist.commands.output import print_list
from bpt_dist.distributed.environment import free_port
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, UserError

if TYPE_CHECKING:
    from bpt_dist.config import DistributionConfig, RunConfig
    from bpt_dist.training.sharding.memory import Share

HEADER = ("shard", "scope", "ranks", "whole", "resident", "share", "allowed", "gathered after a step", "")


def print_memory(path: Path, overrides: Sequence[str], sizes: str, shards: str | None, *, as_json: bool = False) -> bool:
    """Print a line for each sharding and number of ranks, the rank with the most bytes, and return whether all promises hold.

    Raises ConfigError for a list that is none, and for what a rank found wrong.
    """
    runs = configuration.expand(configuration.load(path, overrides))
    kinds: list[str | None] = [None] if shards is None else [*_kinds(shards)]
    cases = {repr(case): case for kind in kinds for run in runs for case in [(run.backbone, _distribution(run, kind))]}
    numbers = _sizes(sizes)
    # Before torch is imported, so that no rank takes a GPU or all cores.
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    if any(distribution.shard == "deepspeed" for _, distribution in cases.values()):
        from bpt_dist.training.sharding.zero import import_deepspeed

        import_deepspeed()
    shares = [_measured(runs[0].model_copy(update={"backbone": backbone, "distribution": distribution}), size)
             for size in numbers for backbone, distribution in cases.values()]  # fmt: skip
    if as_json:
        typer.echo(json.dumps([{**vars(share), "allowed": share.allowed, "kept": share.kept} for share in shares], indent=1))
    else:
        print_list(HEADER, [_row(share) for share in shares], right=(2, 3, 4, 5, 6, 7))
    return all(share.kept for share in shares)


def _kinds(text: str) -> list[str]:
    known = get_args(configuration.DistributionConfig.model_fields["shard"].annotation)
    if not set(text.split(",")) <= set(known):
        raise ConfigError(f"--shard {text}: is no list of {', '.join(known)}; write it like deepspeed,fsdp2")
    return text.split(",")


def _distribution(run: RunConfig, kind: str | None) -> DistributionConfig:
    """Return the distribution of a run, with another sharding if `kind` names one: then without the keys that sharding ignores."""
    settings = run.distribution
    if kind in (None, settings.shard):
        return settings
    kept = {} if kind == "none" else {"scope": settings.scope, "offload": settings.offload}
    return type(settings).model_validate({"shard": kind, "activation_checkpointing": settings.activation_checkpointing, **kept})


def _sizes(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ConfigError(f"--ranks {text}: is no list of numbers of processes; write it like 1,2,4")
    return [int(count) for count in counts]


def _row(share: Share) -> tuple[str, ...]:
    from bpt_dist.commands.output import size

    verdict = "ok" if share.kept else "TOO MUCH"
    percent = f"{100 * share.resident / share.whole:.1f} %"
    return (share.shard, share.scope, str(share.ranks), size(share.whole), size(share.resident), percent, size(share.allowed),
            size(share.gathered), verdict)  # fmt: skip


def _measured(config: RunConfig, num_ranks: int) -> Share:
    """Return the share of the rank that holds most on `num_ranks` processes."""
    from bpt_dist.training.sharding.memory import Share

    port = free_port()
    context = multiprocessing.get_context("fork")
    answer, own = context.Pipe(duplex=False)
    ranks = [context.Process(target=_as_rank, args=(config, rank, num_ranks, port, own)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    own.close()
    try:
        # Whichever comes first: the answer of rank 0, or the end of a rank, for which the others would wait.
        ended = wait([answer, *(process.sentinel for process in ranks)])
        text = answer.recv() if answer in ended and answer.poll() else None
        for process in ranks:
            process.join(None if text else 0)
    except EOFError:
        text = None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    if text is None:
        code = max(process.exitcode or 0 for process in ranks)
        kind = ConfigError if code == ConfigError.exit_code else RuntimeError
        raise kind(f"--ranks {num_ranks}: a rank ended with code {code}; see its message above")
    return Share(**json.loads(text))


def _as_rank(config: RunConfig, rank: int, size: int, port: int, answer: Connection) -> None:
    job = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in job.items()}, MASTER_ADDR="127.0.0.1")
    code = INTERNAL_ERROR
    try:
        _measure(config, answer)
        code = 0
    except UserError as error:
        code = error.exit_code
        sys.stderr.write(f"{error}\n" if rank == 0 else "")
    except Exception:
        traceback.print_exc()
    finally:
        # Not sys.exit: what the parent registered for its own end is not this process's business.
        sys.stderr.flush()
        os._exit(code)


def _measure(config: RunConfig, answer: Connection) -> None:
    """Measure the backbone of a run; rank 0 answers with the largest share."""
    from bpt_dist.distributed.mesh import World
    from bpt_dist.training.sharding.memory import measure
    from bpt_dist.training.sharding.placement import load_backbone

    world = World.start(config.distribution.startup_timeout)
    # Whole first, as transformers loads it: our own pass would join weights that are about to be parted.
    plain = {"distribution": type(config.distribution)(), "backbone": config.backbone.model_copy(update={"forward": "stock"})}
    whole = load_backbone(config.model_copy(update=plain), World())
    shares = world.gather_objects(measure(whole, config.distribution, world))
    if world.rank == 0:
        answer.send(json.dumps(vars(max(shares, key=lambda share: (share.resident, share.gathered)))))
    world.stop()
