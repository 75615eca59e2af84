"""The source step on 1, 2, 4 gloo processes of one thread in alternating rounds: weak (particles a rank) and strong (M = 5)."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench import correctness
from bpt_dist.commands.bench.processes import Job
from bpt_dist.commands.bench.source import Models
from bpt_dist.commands.bench.source_run import Tell
from bpt_dist.commands.bench.timing import Spread, spread
from bpt_dist.commands.bench.workload import Work, source_work
from bpt_dist.distributed.exchange import SteinExchange
from bpt_dist.distributed.mesh import Exchanged, World
from bpt_dist.svgd import KernelOptions

HEADER = ("scaling", "ranks", "mesh", "M", "s/step", "efficiency", "by CPU time", "waiting", "exchange + kernel", "share of a step")
STRONG_PARTICLES = 5
# Kind of step -> whether the number of particles a rank is fixed, and how particles and scores are exchanged.
KINDS: dict[str, tuple[bool, Exchanged]] = {
    "weak": (True, "all_gather"),
    "weak, coordinates": (True, "coordinates"),
    "strong": (False, "all_gather"),
}


class Step:
    """One source step on the ranks of a job, with the time of each of its phases."""

    def __init__(self, models: Models, dtype: str, shape: T5Shape, particles_a_rank: int, num_prompt: int) -> None:
        self.models, self.dtype, self.shape = models, dtype, shape
        self.particles_a_rank, self.num_prompt = particles_a_rank, num_prompt

    def __call__(self, world: World, kind: str) -> dict[str, float]:
        """Run one step of a KINDS (collective: every rank) and return the seconds of its phases on this rank."""
        torch.set_num_threads(1)
        weak, exchanged = KINDS[kind]
        num_particles = self.particles_a_rank * world.size if weak else STRONG_PARTICLES
        mesh = world.mesh(num_particles, (world.size, 1) if weak else None, exchanged)
        work = source_work(self.shape, num_particles, num_prompt=self.num_prompt)
        own = work.prompts[mesh.rows(num_particles)].contiguous()
        exchange = SteinExchange(mesh, num_particles, self.num_prompt, KernelOptions())
        part = Work(own, work.texts)
        microbatches = correctness.our_microbatches(part, mesh)
        backbone, ours = self.models.backbone(self.dtype), self.models.packed(self.dtype)
        world.barrier()
        marks, cpu = [time.perf_counter()], time.process_time()
        exchange.begin(own)
        _, gradient = correctness.sum_microbatches(backbone, ours, part, microbatches)
        marks.append(time.perf_counter())
        world.barrier()
        marks.append(time.perf_counter())
        mesh.sum_over_data_([gradient])
        exchange.direction(own, gradient)
        marks.append(time.perf_counter())
        compute, waiting, exposed = (after - before for before, after in itertools.pairwise(marks))
        return {
            "step": marks[-1] - marks[0], "cpu": time.process_time() - cpu, "compute": compute, "waiting": waiting,
            "exposed": exposed, "replicas": mesh.data.size, "particles": num_particles,
        }  # fmt: skip


def run_scaling(
    shape: T5Shape, sizes: Sequence[int], dtype: str, particles_a_rank: int, num_prompt: int, rounds: int, tell: Tell
) -> dict[str, Any]:
    """Return efficiency and exposed exchange of every number of ranks; each round goes through all of them."""
    models = Models(shape, torch.device("cpu"), num_prompt)
    models.packed(dtype)  # before forking, so that the ranks share the weights
    step = Step(models, dtype, shape, particles_a_rank, num_prompt)
    answers: dict[str, dict[int, list[list[dict[str, float]]]]] = {kind: {size: [] for size in sizes} for kind in KINDS}
    with ExitStack() as stack:
        jobs = {size: stack.enter_context(Job(size, step)) for size in sizes}
        for number in range(rounds + 1):
            order = list(sizes) if number % 2 else list(reversed(sizes))
            for kind in answers:
                for size in order:
                    tell(f"{'warm-up' if number == 0 else f'round {number} of {rounds}'}: {kind}, {size} process(es)")
                    answer = jobs[size].ask(kind)
                    if number:
                        answers[kind][size].append(answer)
    cores = os.cpu_count() or 1
    notes = [
        f"{size} processes on {cores} cores: they share cores, so the efficiency is bounded by {cores}/{size}"
        for size in sizes if size > cores
    ]  # fmt: skip
    rows = {kind: {str(size): _row(by_size, size, sizes[0], kind) for size in sizes} for kind, by_size in answers.items()}
    return {"dtype": dtype, "particles_a_rank": particles_a_rank, "rounds": rounds, "scaling": rows, "notes": notes}


def _row(by_size: dict[int, list[list[dict[str, float]]]], size: int, first: int, kind: str) -> dict[str, Any]:
    """Compare with the smallest number of ranks round by round; the time of a job is that of its slowest rank."""
    steps, base = ([max(rank["step"] for rank in ranks) for ranks in by_size[n]] for n in (size, first))
    cpu, base_cpu = ([max(rank["cpu"] for rank in ranks) for ranks in by_size[n]] for n in (size, first))
    ideal = 1.0 if KINDS[kind][0] else first / size
    exposed = [max(rank["exposed"] for rank in ranks) for ranks in by_size[size]]
    share = [seconds / step for seconds, step in zip(exposed, steps, strict=True)]
    first_rank = by_size[size][0][0]
    return {
        "seconds": statistics.median(steps),
        "efficiency": spread([ideal * one / many for one, many in zip(base, steps, strict=True)]).to_json(),
        "cpu_efficiency": spread([ideal * one / many for one, many in zip(base_cpu, cpu, strict=True)]).to_json(),
        "waiting_seconds": statistics.median(max(rank["waiting"] for rank in ranks) for ranks in by_size[size]),
        "exchange_and_kernel_seconds": statistics.median(exposed),
        "exchange_and_kernel_share": statistics.median(share),
        "particles": int(first_rank["particles"]),
        "mesh": [size // int(first_rank["replicas"]), int(first_rank["replicas"])],
    }


def scaling_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the lines of the table."""
    rows: list[tuple[str, ...]] = []
    for kind, by_size in report["scaling"].items():
        for size, row in by_size.items():
            rows.append((
                kind, size, f"{row['mesh'][0]} x {row['mesh'][1]}", str(row["particles"]), f"{row['seconds']:.3g}",
                str(Spread(**row["efficiency"])),
                f"{row['cpu_efficiency']['median']:.2f}", f"{1000 * row['waiting_seconds']:.1f} ms",
                f"{1000 * row['exchange_and_kernel_seconds']:.1f} ms",
                f"{100 * row['exchange_and_kernel_share']:.2f} %",
            ))  # fmt: skip
    return rows
