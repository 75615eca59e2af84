"""`bpt-dist memory`: start ranks on this machine, let each hold its part of the T5, and compare bytes with the promise.

Ranks are forked after everything is imported, use gloo and the CPU: bytes are the same on every device.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from bpt_dist import config as configuration
from bpt_dist.cli_output import print_list
from bpt_dist.errors import INTERNAL_ERROR, ConfigError, UserError

if TYPE_CHECKING:
    from bpt_dist.config import Config, Distribution
    from bpt_dist.engine_memory import Share

HEADER = ("shard", "scope", "ranks", "whole", "resident", "share", "allowed", "gathered after a step", "")


def print_memory(path: Path, overrides: Sequence[str], sizes: str, shards: str | None) -> bool:
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
        from bpt_dist.engine_zero import import_deepspeed

        import_deepspeed()
    found = [_measured(runs[0].model_copy(update={"backbone": backbone, "distribution": distribution}), size)
             for size in numbers for backbone, distribution in cases.values()]  # fmt: skip
    print_list(HEADER, [_row(share) for share in found], right=(2, 3, 4, 5, 6, 7))
    return all(share.kept for share in found)


def _kinds(text: str) -> list[str]:
    known = get_args(configuration.Distribution.model_fields["shard"].annotation)
    if not set(text.split(",")) <= set(known):
        raise ConfigError(f"--shard {text}: is no list of {', '.join(known)}; write it like deepspeed,fsdp2")
    return text.split(",")


def _distribution(run: Config, kind: str | None) -> Distribution:
    """Return the distribution of a run, with another sharding if `kind` names one: then without the keys that sharding ignores."""
    own = run.distribution
    if kind in (None, own.shard):
        return own
    kept = {} if kind == "none" else {"scope": own.scope, "offload": own.offload}
    return type(own).model_validate({"shard": kind, "activation_checkpointing": own.activation_checkpointing, **kept})


def _sizes(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"--ranks {text}: is no list of numbers of processes; write it like 1,2,4")
    return [int(word) for word in words]


def _row(share: Share) -> tuple[str, ...]:
    from bpt_dist.plan_text import size

    verdict = "ok" if share.kept else "TOO MUCH"
    percent = f"{100 * share.resident / share.whole:.1f} %"
    return (share.shard, share.scope, str(share.ranks), size(share.whole), size(share.resident), percent, size(share.allowed),
            size(share.gathered), verdict)  # fmt: skip


def _measured(config: Config, num_ranks: int) -> Share:
    """Return the share of the rank that holds most on `num_ranks` processes."""
    from bpt_dist.engine_memory import Share

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
        raise kind(f"--ranks {num_ranks}: a rank ended with code {code}; it has said why above")
    return Share(**json.loads(text))


def _as_rank(config: Config, rank: int, size: int, port: int, answer: Connection) -> None:
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


def _measure(config: Config, answer: Connection) -> None:
    """Measure the T5 of a run; rank 0 answers with the largest share."""
    from bpt_dist.engine_memory import measure
    from bpt_dist.mesh import World
    from bpt_dist.opening import load_backbone

    world = World.start(config.distribution.startup_timeout)
    # Whole first, as transformers loads it: our own pass would join weights that are about to be parted.
    plain = {"distribution": type(config.distribution)(), "backbone": config.backbone.model_copy(update={"forward": "stock"})}
    whole = load_backbone(config.model_copy(update=plain), World())
    shares = world.gather_objects(measure(whole, config.distribution, world))
    if world.rank == 0:
        answer.send(json.dumps(vars(max(shares, key=lambda share: (share.resident, share.gathered)))))
    world.stop()
