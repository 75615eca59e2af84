"""`bench svgd`: the SVGD step alone over numbers of particles: ours, naive differences, Pyro, BlackJAX."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.commands.bench.baselines import Peer, peers
from bpt_dist.commands.bench.machine import available_bytes
from bpt_dist.commands.bench.processes import in_fresh_process
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup
from bpt_dist.commands.bench.workload import SPREAD, stein_phi

HEADER = ("M", "variant", "ms", "memory", "error", "ours is faster by")
POSITIONS = 100  # of a prompt
SHARE_OF_FREE = 0.6
SECONDS_A_SIZE = 60.0


def run_svgd(
    sizes: Sequence[int], num_coordinates: int, clock: Clock, repeats: int, tell: Callable[[str], None], seed: int = 0
) -> dict[str, Any]:
    """Return time, peak memory and error for every number of particles; what would not fit is named in `notes`."""
    implementations = [Peer("ours", "ours", ours, 0), *peers()]
    notes: list[str] = []
    report: dict[str, Any] = {"coordinates": num_coordinates, "sizes": {}, "notes": notes}
    memory = {size: _memory(implementations, size, num_coordinates, clock, notes, tell, seed) for size in sizes}
    clock.use_threads()
    for size in sizes:
        particles, score = cloud(size, num_coordinates, seed, clock.device)
        runs = {peer.name: partial(peer.run, particles, score) for peer in implementations if peer.name in memory[size]}
        tell(f"M = {size}: warm-up and errors")
        directions = {name: run() for name, run in runs.items()}
        errors: dict[str, float] = {
            name: direction_error(directions[name], particles, score) for name in ("ours", "naive") if name in directions
        }
        del directions
        times = alternate(runs, clock, repeats, limit_seconds=SECONDS_A_SIZE, tell=tell)
        rows = [peer for peer in implementations if peer.name in runs]
        report["sizes"][str(size)] = {peer.name: _row(peer, times, memory[size], errors) for peer in rows}
    return report


def svgd_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    return [
        (size, row["title"], f"{1000 * row['seconds']:.3g}", f"{row['memory_bytes'] / 1e9:.2f} GB",
         "" if row["error"] is None else f"{row['error']:.0e}", ratio_cell(row["ours_is_faster_by"]))
        for size, rows in report["sizes"].items() for row in rows.values()
    ]  # fmt: skip


def ours(particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Return the direction as the source stage computes it."""
    positions = math.gcd(particles.shape[1], POSITIONS)
    shape = (len(particles), positions, -1)
    return stein_phi(particles.view(shape), score.view(shape)).flatten(1)


def cloud(num_particles: int, num_coordinates: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return particles around one common prompt, and scores."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(num_coordinates, generator=generator)
    particles = centre + SPREAD * torch.randn(num_particles, num_coordinates, generator=generator)
    return particles.to(device), torch.randn(num_particles, num_coordinates, generator=generator).to(device)


def direction_error(direction: Float[Tensor, "M E"], particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> float:
    """Return the relative error of three rows of a direction against explicit differences in float64."""
    wide, count = particles.double(), len(particles)
    centred = wide - wide.mean(0)
    gram = centred @ centred.T
    squared = gram.diagonal()[:, None] + gram.diagonal()[None] - 2 * gram
    row, column = torch.triu_indices(count, count, offset=1, device=particles.device)
    bandwidth = statistics.median(squared[row, column].tolist()) / math.log(count + 1)
    worst = 0.0
    for i in sorted({0, count // 2, count - 1}):
        kernel = torch.exp(-(wide[i] - wide).square().sum(1) / bandwidth)
        exact = (kernel @ score.double() + 2 / bandwidth * (kernel @ (wide[i] - wide))) / count
        worst = max(worst, float((direction[i].double() - exact).norm() / exact.norm()))
    return worst


def _memory(
    implementations: list[Peer],
    size: int,
    num_coordinates: int,
    clock: Clock,
    notes: list[str],
    tell: Callable[[str], None],
    seed: int,
) -> dict[str, int]:
    """Return the peak memory of every implementation that fits: of a fresh process, or of the GPU."""
    peaks = {}
    for peer in implementations:
        needed, free = peer.tensors * size * size * num_coordinates * 4, available_bytes(clock.device)
        if needed > SHARE_OF_FREE * free:
            notes.append(f"M = {size}, {peer.title}: needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; left out")
            continue
        tell(f"M = {size}: memory of {peer.name}")

        def once(peer: Peer = peer) -> None:
            peer.run(*cloud(size, num_coordinates, seed, clock.device))

        if clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            once()
            peaks[peer.name] = torch.cuda.max_memory_allocated()
        elif (answer := in_fresh_process(once, clock.num_threads)) is not None:
            peaks[peer.name] = answer[1]
        else:
            notes.append(f"M = {size}, {peer.title}: its process was killed, probably for lack of memory; left out")
    return peaks


def _row(peer: Peer, times: dict[str, list[Timing]], memory: dict[str, int], errors: dict[str, float]) -> dict[str, Any]:
    return {
        "title": peer.title,
        "seconds": statistics.median(time.seconds for time in times[peer.name]),
        "memory_bytes": memory[peer.name],
        "error": errors.get(peer.name),
        "ours_is_faster_by": speedup(times[peer.name], times["ours"]).to_json(),
    }
