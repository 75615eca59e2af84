"""`bench sharded`: the source step on gloo processes with the T5 whole or partitioned, by the stock modules and by our pass.

All variants alternate in one job. A rank's work is what training would give it: with a partitioned T5 one pass, because each pass
gathers nearly all of the T5 twice. The ranks of a host read each other's weights from memory; our pass is also timed with weights
that are sent, as between hosts. Peak memory is that of fresh processes that run one variant only.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.correctness import GRADIENT_FLOOR, LOSS_FLOOR, Gradients, relative, sum_microbatches
from bpt_dist.commands.bench.processes import Job
from bpt_dist.commands.bench.source_run import Tell
from bpt_dist.commands.bench.timing import Spread, spread
from bpt_dist.commands.bench.workload import Work, in_dtype, our_pass, random_backbone, source_work, use_attention
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.distributed.traffic import Traffic
from bpt_dist.training.microbatches import MicroBatchLimits, shared_microbatches
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.gather import Exchange
from bpt_dist.training.sharding.host_memory import HostMemory
from bpt_dist.training.sharding.zero import import_deepspeed

HEADER = ("T5", "pass", "weights", "s/step", "CPU s/step", "x faster than stock, same T5", "by CPU time", "x of packed, whole",
          "by CPU time", "MB received a step", "receiving alone, s", "peak memory")  # fmt: skip
LIMIT_SECONDS = 900.0
WARM_UP = 3  # rounds: ZeRO learns the order of the modules in two, and prefetches from then on
UNDER_WAY = 8  # about the weights of a block
COUNTED = " counted"  # behind the name of a variant: count what its collectives receive, which takes time
MESSAGES = " messages"  # behind the name of a variant: receive as many bytes as were counted, as often, and compute nothing
WHOLE, STOCK, PACKED = "none", "stock", "packed"
KEPT, READ, SENT = "kept", "read", "sent"


class Variant(NamedTuple):
    """How the T5 is held, who reads the texts, and how the weights of other ranks arrive."""

    shard: str
    forward: str
    arrive: str

    @classmethod
    def of(cls, name: str) -> Variant:
        """Read the name that `str` writes."""
        return cls(*name.split(" "))

    def __str__(self) -> str:
        """Write all with blanks between them."""
        return " ".join(self)


BASE = Variant(WHOLE, PACKED, KEPT)
VARIANTS = [
    Variant(WHOLE, STOCK, KEPT),
    BASE,
    *(Variant(shard, *way) for shard in ("deepspeed", "fsdp2") for way in ((STOCK, READ), (PACKED, READ), (PACKED, SENT))),
]


class Step:
    """The source step on a rank of a job, which places its copies of the T5 when a variant first asks for one."""

    def __init__(self, whole: T5Backbone, work: Work) -> None:
        self.whole, self.work = whole, work
        # A copy each: ZeRO prefetches in the order of the pass before.
        self.placed: dict[Variant, tuple[T5Backbone, PackedT5]] = {}
        self.reference: Gradients | None = None
        self.received: dict[Variant, tuple[list[int], list[int]]] = {}  # bytes of each message, and of each part that was read

    def __call__(self, world: World, name: str) -> dict[str, float]:
        """Run one step (collective: every rank) and return its seconds, its bytes and its distance from packed, whole."""
        torch.set_num_threads(1)
        if name.endswith(MESSAGES):
            return _receive(*self.received[Variant.of(name.removesuffix(MESSAGES))], world)
        variant, mesh = Variant.of(name.removesuffix(COUNTED)), world.mesh(len(self.work.prompts))
        backbone, ours = self._place(variant, world)
        traffic = Traffic()
        own = Work(self.work.prompts[mesh.rows(len(self.work.prompts))].contiguous(), self.work.texts)
        limits = MicroBatchLimits(None, own.prompts.shape[1], together=variant.shard != WHOLE)
        passes = list(shared_microbatches(own.texts, slice(0, len(own.prompts)), mesh, limits))
        world.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        with traffic if name.endswith(COUNTED) else nullcontext():
            found = sum_microbatches(backbone, ours if variant.forward == PACKED else None, own, passes)
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        if variant == BASE:
            self.reference = found
        loss, gradient = (0.0, 0.0) if self.reference is None else relative(found, self.reference)
        received = float(sum(traffic.bytes.values()))
        if name.endswith(COUNTED):
            self.received[variant] = traffic.messages, traffic.reads
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        read = float(sum(traffic.reads))
        return {**seconds, "loss": loss, "gradient": gradient, "received": received, "read": read, "peak": float(peak)}

    def _place(self, variant: Variant, world: World) -> tuple[T5Backbone, PackedT5]:
        if variant not in self.placed:
            shard: Any = variant.shard
            backbone = self.whole if shard == WHOLE else in_dtype(self.whole, "fp32")
            use_attention(backbone, "sdpa")
            hosts = tuple(f"host {rank}" for rank in range(world.size)) if variant.arrive == SENT else world.hosts
            placement.place(backbone, DistributionConfig(shard=shard), dataclasses.replace(world, hosts=hosts))
            self.placed[variant] = backbone, our_pass(backbone)
        return self.placed[variant]


def _receive(messages: Sequence[int], reads: Sequence[int], world: World) -> dict[str, float]:
    """Return the seconds of messages that bring this rank so many bytes each, some under way at a time, and of such reads.

    Each read is of another place, as the weights of a step are.
    """
    of_ranks: list[tuple[Sequence[int], Sequence[int]]] = [((), ())] * world.size
    dist.all_gather_object(of_ranks, (messages, reads))
    # Of rows of a table, other ranks may ask for other numbers.
    parts = [torch.zeros(received) for number in of_ranks[0][0] if (received := number // torch.float32.itemsize)]
    longest = [max(numbers) for numbers in itertools.zip_longest(*(reads for _, reads in of_ranks), fillvalue=0)]
    memory = HostMemory([torch.zeros(number // torch.float32.itemsize) for number in longest], None, world.hosts)
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    under_way: list[Exchange] = []
    kept: deque[Tensor] = deque(maxlen=2 * UNDER_WAY)  # about what is gathered at one time
    world.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    for part in parts:
        under_way.append(Exchange([dist.irecv(torch.empty_like(part), before), dist.isend(part, after)]))
        if len(under_way) == UNDER_WAY:
            under_way.pop(0).wait()
    for rest in under_way:
        rest.wait()
    for number, length in enumerate(reads):
        kept.append(torch.empty(length // torch.float32.itemsize))
        memory.read(number, before, kept[-1])
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def run_sharded(
    shape: T5Shape, num_particles: int, size: int, shards: Sequence[Literal["deepspeed", "fsdp2"]], rounds: int, tell: Tell
) -> dict[str, Any]:
    """Return times, ratios and memory of every variant over `size` processes; each round goes through all of them."""
    import_deepspeed()  # before the ranks are forked
    variants = [variant for variant in VARIANTS if variant.shard in (WHOLE, *shards)]
    whole = random_backbone(shape, torch.device("cpu"))
    step = Step(whole, source_work(shape, num_particles))
    answers: dict[Variant, list[list[dict[str, float]]]] = {variant: [] for variant in variants}
    received: dict[Variant, float] = {}
    read: dict[Variant, float] = {}
    messages: dict[Variant, list[float]] = {variant: [] for variant in variants}
    with Job(size, step, LIMIT_SECONDS) as job:
        job.ask(str(BASE))  # what the others are compared with
        for number in range(WARM_UP):
            for variant in variants:
                tell(f"warm-up {number + 1} of {WARM_UP}: {variant}")
                found = job.ask(str(variant) + (COUNTED if number == WARM_UP - 1 else ""))
                received[variant], read[variant] = (max(rank[key] for rank in found) for key in ("received", "read"))
        for number in range(1, rounds + 1):
            for variant in variants if number % 2 else variants[::-1]:
                tell(f"round {number} of {rounds}: {variant}")
                answers[variant].append(job.ask(str(variant)))
                if received[variant]:
                    messages[variant].append(max(rank["wall"] for rank in job.ask(str(variant) + MESSAGES)))
    peaks = {}
    for variant in variants:
        tell(f"memory: {variant}")
        with Job(size, Step(whole, step.work), LIMIT_SECONDS) as job:
            peaks[variant] = max(rank["peak"] for rank in job.ask(str(variant)))
    rows = [
        _row(variant, answers, received[variant], peaks[variant])
        | {"messages_seconds": statistics.median(messages[variant]) if messages[variant] else 0.0}
        for variant in variants
    ]
    cores = os.cpu_count() or 1
    notes = [f"{size} processes on {cores} cores: they share cores"] if size > cores else []
    if any(variant.arrive == READ and not read[variant] for variant in variants):
        notes.append("processes cannot read each other's memory here: all weights are sent")
    return {"particles": num_particles, "ranks": size, "rounds": rounds, "variants": rows, "notes": notes}


def _row(variant: Variant, answers: dict[Variant, list[list[dict[str, float]]]], received: float, peak: float) -> dict[str, Any]:
    """Compare round by round; the time of a job is that of its slowest rank."""

    def seconds(of: Variant, kind: str) -> list[float]:
        return [max(rank[kind] for rank in ranks) for ranks in answers[of]]

    def ratio(to: Variant, kind: str) -> dict[str, float]:
        return spread([theirs / ours for theirs, ours in zip(seconds(to, kind), seconds(variant, kind), strict=True)]).to_json()

    ranks = [rank for of_round in answers[variant] for rank in of_round]
    stock = Variant(variant.shard, STOCK, KEPT if variant.shard == WHOLE else READ)
    return {
        "shard": variant.shard, "forward": variant.forward, "weights": variant.arrive,
        "received_bytes": received, "peak_bytes": peak,
        "loss_difference": max(rank["loss"] for rank in ranks), "gradient_difference": max(rank["gradient"] for rank in ranks),
        **{f"{kind}_seconds": statistics.median(seconds(variant, kind)) for kind in ("wall", "cpu")},
        **{f"to_stock_{kind}": ratio(stock, kind) for kind in ("wall", "cpu")},
        **{f"to_whole_{kind}": ratio(BASE, kind) for kind in ("wall", "cpu")},
    }  # fmt: skip


def wrong_variants(report: dict[str, Any]) -> list[str]:
    """Return the variants whose losses or gradients are not those of our pass through the whole T5."""
    return [
        f"wrong result: {row['shard']} {row['forward']} {row['weights']}: loss off by {row['loss_difference']:.0e}, "
        f"gradient by {row['gradient_difference']:.0e}"
        for row in report["variants"]
        if not (row["loss_difference"] <= LOSS_FLOOR and row["gradient_difference"] <= GRADIENT_FLOOR)
    ]


def sharded_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the lines of the table."""
    return [
        (
            "whole" if row["shard"] == WHOLE else row["shard"], row["forward"], row["weights"],
            f"{row['wall_seconds']:.3g}", f"{row['cpu_seconds']:.3g}",
            *(str(Spread(**row[name])) for name in ("to_stock_wall", "to_stock_cpu", "to_whole_wall", "to_whole_cpu")),
            f"{row['received_bytes'] / 1e6:,.0f}", f"{row['messages_seconds']:.3g}", f"{row['peak_bytes'] / 1e9:.2f} GB",
        )
        for row in report["variants"]
    ]  # fmt: skip
