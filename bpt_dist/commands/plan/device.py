"""The device of a plan: the rate of its matrix products and the memory of a process, measured here or from a data sheet."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from bpt_dist.backbones.base import DTYPES
from bpt_dist.config.base import did_you_mean
from bpt_dist.distributed.device import process_memory
from bpt_dist.distributed.device_table import DEVICES, PublishedDevice
from bpt_dist.errors import ConfigError

LOCAL = "cpu"  # the one name that is measured: CPUs are too different for a table
PROBE_SECONDS, PRODUCT_SECONDS = 0.5, 0.1  # of the whole measurement, and of one product
FEW_ROWS, PROBE_ROWS = 8, 2048
# Share of the rate a whole pass reaches: elementwise work, attention and small matrices take the rest.
UTILISATION = {"cpu": 0.6, "cuda": 0.4}
# Host time of an eager forward and backward pass, measured at 27 ms for 12 + 12 blocks.
HOST_SECONDS_A_BLOCK = 0.0011
GPUS_OF_A_HOST = 8
CPU_FACTS = Path("/proc/cpuinfo")
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86, and of ARM


@dataclass(frozen=True)
class Device:
    """What one process has: `rate` in FLOP/s of a matrix product, `memory` in bytes, `bandwidth` of it in bytes a second if known.

    `source` is the data sheet of a device that is not this one; `warning` what the user should know of it.
    """

    name: str
    kind: str
    rate: float
    memory: int
    bandwidth: float | None = None
    source: str | None = None
    warning: str | None = None

    @property
    def utilisation(self) -> float:
        """Return the share of `rate` that is assumed."""
        return UTILISATION[self.kind]

    def seconds(self, flops: float, num_passes: float, num_blocks: int, pass_bytes: float = 0.0) -> float:
        """Return the time of one process for `flops` in `num_passes` passes, each of which reads `pass_bytes` of weights.

        A GPU hides the host's part behind its own.
        """
        work, host = flops / (self.rate * self.utilisation), num_passes * num_blocks * HOST_SECONDS_A_BLOCK
        if self.bandwidth is not None:
            work = max(work, num_passes * pass_bytes / self.bandwidth)
        return max(work, host) if self.kind == "cuda" else work + host


def named_device(name: str, width: int, inner: int, dtype: str, ranks_here: int) -> Device:
    """Return the device of that name; the processor of this machine is measured. Raises ConfigError for a name nobody knows."""
    check_name(name)
    return probe(width, inner, dtype, ranks_here, only_cpu=True) if name == LOCAL else of_table(DEVICES[name], dtype)


def check_name(name: str | None) -> None:
    """Raise ConfigError for a device that is neither in the table nor the CPU of this machine."""
    if name is not None and name not in (LOCAL, *DEVICES):
        known = (LOCAL, *DEVICES)
        raise ConfigError(f"--device {name}: is not known; choose one of {', '.join(known)}{did_you_mean(name, known)}")


def of_table(row: PublishedDevice, dtype: str) -> Device:
    """Return a device as its data sheet describes it, for a process that has it alone; float32 is computed without TF32."""
    rate, warning = row.fp32, None
    if dtype == "bf16":
        if row.bf16 is None:
            warning = f"backbone.dtype: {row.title} has no units for bf16, the rate of fp32 is assumed; set backbone.dtype=fp32"
        rate = row.bf16 or row.fp32
    return Device(row.title, "cuda", rate, int(row.memory), row.bandwidth, row.source, warning)


def probe(width: int, inner: int, dtype: str, ranks_here: int, *, only_cpu: bool = False) -> Device:
    """Measure this machine with the feed-forward product of a backbone `width` wide; `ranks_here` processes share its memory."""
    if torch.cuda.is_available() and not only_cpu:
        properties = torch.cuda.get_device_properties(0)
        rate = _rate(width, inner, dtype, torch.device("cuda"))
        return Device(properties.name, "cuda", rate, process_memory(torch.device("cuda"), ranks_here))
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''} a process"
    rate, warning = _rate(width, inner, dtype, torch.device("cpu")), None
    if dtype == "bf16" and not cpu_has_bf16():
        warning = (
            "backbone.dtype: bf16 on a CPU without instructions for it (avx512_bf16, amx_bf16) is slower than fp32; set "
            "backbone.dtype=fp32 to train here, or plan for another device by --device"
        )
    return Device(name, "cpu", rate, process_memory(torch.device("cpu"), ranks_here), warning=warning)


def processes_here(world_size: int, device: str | None = None) -> int:
    """Return how many of the processes run on one machine: what the launcher says, one a GPU, or all on a CPU.

    Of a `device` of the table a host has GPUS_OF_A_HOST.
    """
    if device in DEVICES:
        return min(world_size, GPUS_OF_A_HOST)
    said = os.environ.get("LOCAL_WORLD_SIZE")
    if said is not None:
        return int(said)
    return min(world_size, torch.cuda.device_count()) if torch.cuda.is_available() and device != LOCAL else world_size


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 by instructions of its own; assumed where the system does not say."""
    try:
        words = set(CPU_FACTS.read_text().split())
    except OSError:
        return True
    return bool(words.intersection(BF16_INSTRUCTIONS))


@lru_cache(maxsize=8)
def _rate(width: int, inner: int, dtype: str, device: torch.device) -> float:
    """Return the rate of a product in FLOP/s, measured in about PROBE_SECONDS also where one of PROBE_ROWS would take minutes."""
    began, rows = time.perf_counter(), FEW_ROWS
    right = torch.ones(width, inner, dtype=DTYPES[dtype], device=device)

    def product(rows: int) -> float:
        left = torch.ones(rows, width, dtype=DTYPES[dtype], device=device)
        start = time.perf_counter()
        result = left @ right
        if device.type == "cuda":
            _ = float(result[0, 0])  # waits for the device
        return time.perf_counter() - start

    product(rows)  # the first one sets up libraries
    taken = product(rows)
    while rows < PROBE_ROWS and 4 * taken < PRODUCT_SECONDS:
        rows *= 4
        taken = min(product(rows), product(rows)) if 8 * taken < PRODUCT_SECONDS else product(rows)
    products, elapsed = 1, taken
    while time.perf_counter() - began < PROBE_SECONDS:
        elapsed += product(rows)
        products += 1
    return 2.0 * rows * width * inner * products / elapsed
