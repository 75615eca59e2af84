"""`bench exchange`: the SVGD phase of a step over several gloo processes, with gathered particles and with slices."""

from __future__ import annotations

import datetime
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bpt_dist.commands.bench.timing import Spread, spread
from bpt_dist.distributed.exchange import SteinExchange, slices
from bpt_dist.distributed.mesh import Exchanged, Mesh, World
from bpt_dist.svgd import KernelOptions

EXCHANGES: tuple[Exchanged, ...] = ("all_gather", "coordinates")
FLOAT32, FLOAT64 = 4, 8  # bytes
HEADER = ("ranks", "M", "all_gather CPU ms", "coordinates CPU ms", "faster by", "wall: faster by", "MB received",
          "MB by coordinates", "difference")  # fmt: skip


class Job(NamedTuple):
    """The settings of a measurement, sent to every process."""

    num_processes: int
    num_particles: int
    num_positions: int
    width: int
    rule: KernelOptions
    rounds: int
    num_threads: int


def measure(
    num_processes: int,
    num_particles: int,
    *,
    num_positions: int = 100,
    width: int = 768,
    rule: KernelOptions | None = None,
    rounds: int = 5,
    num_threads: int = 1,
    limit_seconds: float = 600.0,
) -> dict[str, Any]:
    """Return seconds and bytes of both exchanges, their ratio (above 1 coordinates is faster), and the difference of their phi.

    The phase is what a step does besides the T5: exchange of particles and scores, distances, kernel, direction. Seconds are
    those of the slowest process, medians over `rounds`: CPU time (its gloo threads included) and wall time. Wall time means
    little where processes share cores. `score_seconds` is the wall time of one exchange of the scores alone, started together.
    Raises ValueError for fewer than two processes or an indivisible number of particles, ConfigError for fewer positions than
    processes, RuntimeError when a process fails or all of them take longer than the limit.
    """
    if num_processes < 2 or num_particles % num_processes:  # noqa: PLR2004
        raise ValueError(f"{num_particles} particles on {num_processes} process(es): choose at least two that divide the particles")
    slices(num_positions, num_processes)
    job = Job(num_processes, num_particles, num_positions, width, rule or KernelOptions(), rounds, num_threads)
    # Not forked: torch's threads may have computed in the caller, and such a process cannot fork.
    context = multiprocessing.get_context("spawn")
    answer, own = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_run, args=(rank, job, folder, own)) for rank in range(num_processes)]
        try:
            for process in processes:
                process.start()
            own.close()
            times = _wait(answer, processes, limit_seconds)
        finally:
            answer.close()
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
    return _summary(job, times)


def exchange_row(measured: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table."""
    gathered, sliced = measured["all_gather"], measured["coordinates"]
    return (
        str(measured["num_processes"]), str(measured["num_particles"]),
        f"{1000 * gathered['cpu_seconds']:.1f}", f"{1000 * sliced['cpu_seconds']:.1f}",
        str(Spread(**measured["ratio_cpu"])), str(Spread(**measured["ratio_wall"])),
        f"{gathered['received_bytes'] / 1e6:.1f}", f"{sliced['received_bytes'] / 1e6:.1f}",
        f"{measured['relative_difference']:.0e}",
    )  # fmt: skip


def received_bytes(job: Job, exchange: Exchanged) -> int:
    """Return the bytes a rank receives from the others in a step; with uneven slices, those of the largest."""
    of_position, others = FLOAT32 * job.width, job.num_particles - job.num_particles // job.num_processes
    if exchange == "all_gather":
        return 2 * others * job.num_positions * of_position
    longest = max(each.stop - each.start for each in slices(job.num_positions, job.num_processes))
    back = job.num_particles // job.num_processes * (job.num_positions - longest)
    # A ring all-reduce sends each number twice, less the own share.
    distances = 2 * FLOAT64 * job.num_particles**2 * (job.num_processes - 1) // job.num_processes
    return (2 * others * longest + back) * of_position + (distances if job.rule.scope == "prompt" else 0)


def _wait(answer: Connection, processes: Sequence[BaseProcess], limit_seconds: float) -> dict[str, Any]:
    """Return what rank 0 sends; RuntimeError as soon as a process fails or the limit is reached."""
    deadline = time.monotonic() + limit_seconds
    while not answer.poll(0.1) and time.monotonic() < deadline and not any(process.exitcode for process in processes):
        pass
    try:
        times: dict[str, Any] | None = answer.recv() if answer.poll() else None
    except EOFError:  # all have closed their end without an answer
        times = None
    if time.monotonic() < deadline:
        for process in processes:
            process.join(5)
    codes = [process.exitcode for process in processes]
    if times is None or any(codes):
        raise RuntimeError(
            f"{len(processes)} processes did not finish timing their exchanges within {limit_seconds:g} s; exit codes {codes}; "
            "see the messages of those that failed"
        )
    return times


def _summary(job: Job, times: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        name: getattr(job, name) for name in ("num_processes", "num_particles", "num_positions", "width", "rounds")
    }
    for exchange in EXCHANGES:
        summary[exchange] = {f"{kind}_seconds": statistics.median(times[exchange][kind]) for kind in ("cpu", "wall", "score")}
        summary[exchange]["received_bytes"] = received_bytes(job, exchange)
    for kind in ("cpu", "wall"):
        pairs = zip(times["all_gather"][kind], times["coordinates"][kind], strict=True)
        summary[f"ratio_{kind}"] = spread([theirs / ours for theirs, ours in pairs]).to_json()
    summary["relative_difference"] = times["difference"]
    return summary


def _run(rank: int, job: Job, folder: str, answer: Connection) -> None:
    torch.set_num_threads(job.num_threads)
    # A file, not a port: no other job can join.
    store = dist.FileStore(str(Path(folder) / "store"), job.num_processes)
    limit = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.num_processes, timeout=limit)
    times = _time(World(rank, job.num_processes), job)
    if rank == 0:
        answer.send(times)
    answer.close()
    dist.destroy_process_group()


def _time(world: World, job: Job) -> dict[str, Any]:
    """Run both exchanges in alternation and return, on every rank, the seconds of the slowest rank in each round."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, job.num_particles, job.num_positions, job.width)
    meshes = {exchange: world.mesh(job.num_particles, exchange=exchange) for exchange in EXCHANGES}
    own = meshes["all_gather"].rows(job.num_particles)
    particles, scores = (each[own].clone() for each in torch.randn(shape, generator=generator))
    phi = {exchange: _step(mesh, job, particles, scores)[1] for exchange, mesh in meshes.items()}  # this warms up, too
    times: dict[str, Any] = {exchange: {"cpu": [], "wall": [], "score": []} for exchange in EXCHANGES}
    for number in range(job.rounds):
        for exchange in EXCHANGES if number % 2 == 0 else reversed(EXCHANGES):
            seconds, _ = _step(meshes[exchange], job, particles, scores)
            for kind, slowest in zip(times[exchange], map(max, zip(*world.gather_numbers(seconds), strict=True)), strict=True):
                times[exchange][kind].append(slowest)
    apart, whole = (float(each.double().square().sum()) for each in (phi["coordinates"] - phi["all_gather"], phi["all_gather"]))
    sums = [sum(values) for values in zip(*world.gather_numbers([apart, whole]), strict=True)]
    return {**times, "difference": (sums[0] / sums[1]) ** 0.5}


def _step(mesh: Mesh, job: Job, particles: Tensor, scores: Tensor) -> tuple[list[float], Tensor]:
    stein = SteinExchange(mesh, job.num_particles, job.num_positions, job.rule)
    mesh.world.barrier()
    wall = time.perf_counter()
    stein.layout.start_gather(scores)()
    score_seconds = time.perf_counter() - wall
    mesh.world.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    stein.begin(particles)
    phi = stein.direction(particles, scores)
    return [time.process_time() - cpu, time.perf_counter() - wall, score_seconds], phi
