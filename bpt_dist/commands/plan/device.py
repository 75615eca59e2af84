"""The device of a plan: how fast it multiplies matrices, measured for a second, and how much memory a process has."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from bpt_dist.backbones.base import DTYPES

PROBE_SECONDS = 1.0
PROBE_ROWS = 2048
# Share of the probed rate a whole pass reaches: elementwise work, attention and small matrices take the rest.
UTILISATION = {"cpu": 0.6, "cuda": 0.4}
# Host time of an eager forward and backward pass, measured at 27 ms for 12 + 12 blocks.
HOST_SECONDS_A_BLOCK = 0.0011
RUNTIME_BYTES = 600 << 20  # interpreter and libraries of a process, or the context of a GPU
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Device:
    """What one process has: `rate` in FLOP/s of a matrix product, `memory` in bytes."""

    name: str
    kind: str
    rate: float
    memory: int

    @property
    def utilisation(self) -> float:
        """Return the share of `rate` that is assumed."""
        return UTILISATION[self.kind]

    def seconds(self, flops: float, num_passes: float, num_blocks: int) -> float:
        """Return the time of one process for `flops` in `num_passes` passes; a GPU hides the host's part behind its own."""
        work, host = flops / (self.rate * self.utilisation), num_passes * num_blocks * HOST_SECONDS_A_BLOCK
        return max(work, host) if self.kind == "cuda" else work + host


def probe(width: int, inner: int, dtype: str, ranks_here: int) -> Device:
    """Measure this machine with the feed-forward product of a backbone; its memory is shared by `ranks_here` processes."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        sharing = -(-ranks_here // torch.cuda.device_count())
        rate = _rate(width, inner, dtype, torch.device("cuda"))
        return Device(properties.name, "cuda", rate, properties.total_memory // sharing)
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''} a process"
    return Device(name, "cpu", _rate(width, inner, dtype, torch.device("cpu")), machine_memory() // ranks_here)


def processes_here(world_size: int) -> int:
    """Return how many of the processes run on this machine: what the launcher says, or one a GPU, or all on a CPU."""
    said = os.environ.get("LOCAL_WORLD_SIZE")
    if said is not None:
        return int(said)
    return min(world_size, torch.cuda.device_count()) if torch.cuda.is_available() else world_size


def machine_memory() -> int:
    """Return the bytes of memory this machine, or the container around us, has."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


@lru_cache(maxsize=8)
def _rate(width: int, inner: int, dtype: str, device: torch.device) -> float:
    left = torch.ones(PROBE_ROWS, width, dtype=DTYPES[dtype], device=device)
    right = torch.ones(width, inner, dtype=DTYPES[dtype], device=device)
    _ = left @ right
    start, products, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < PROBE_SECONDS:
        result = left @ right
        products += 1
        if device.type == "cuda":
            _ = float(result[0, 0])  # waits for the device
        elapsed = time.perf_counter() - start
    return 2.0 * PROBE_ROWS * width * inner * products / elapsed
