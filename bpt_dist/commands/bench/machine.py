"""The machine of a measurement: device, threads, versions, free memory, and the rates it reaches during the run."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bpt_dist.backbones.base import DTYPES
from bpt_dist.commands.bench.timing import Clock, Timing
from bpt_dist.errors import ConfigError
from bpt_dist.training.sharding import placement

PACKAGES = ("torch", "transformers", "peft", "bpt_dist")
CPU_SIDE, CUDA_SIDE = 2048, 8192
COPY_BYTES = 1 << 28
MATMULS_A_ROUND = 2


def choose_device(name: str) -> torch.device:
    """Return the device by name; `auto` takes the GPU where there is one.

    Raises ConfigError for a device this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: is not known; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bf16; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def check_dtype(name: str, device: torch.device) -> None:
    """Raise ConfigError for an unknown dtype, or one that this device only emulates."""
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: is not known; choose {' or '.join(DTYPES)}")
    if name == "bf16" and not has_bf16(device):
        raise ConfigError("--dtype bf16: this device has no instructions for it; use --dtype fp32")


def keep_pages() -> str:
    """Make the C library keep freed memory for all variants, and return a description of the setting."""
    return "pages kept (mallopt)" if placement.keep_pages() else "the C library's default"


def available_bytes(device: torch.device) -> int:
    """Return the free memory of the device in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def matmul(device: torch.device, dtype: str) -> tuple[Callable[[], Any], int]:
    """Return a function that multiplies square matrices, and its FLOPs."""
    side = CUDA_SIDE if device.type == "cuda" else CPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(MATMULS_A_ROUND):
            torch.mm(a, b, out=out)

    run()
    return run, MATMULS_A_ROUND * 2 * side**3


def rate(flops: float, times: list[Timing]) -> float:
    """Return FLOP/s by the median of several times."""
    return flops / statistics.median(timing.seconds for timing in times)


def copy_bandwidth(clock: Clock) -> float:
    """Return bytes read and written a second by a copy too large for any cache, median of 5."""
    source = torch.ones(COPY_BYTES // 4, device=clock.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / statistics.median(clock.time(lambda: target.copy_(source)).seconds for _ in range(5))


def facts(clock: Clock, allocator: str) -> dict[str, Any]:
    """Return the facts about the machine that a reader of the numbers needs."""
    cuda = clock.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": clock.num_threads,
        "cores": os.cpu_count(),
        "time": clock.kind,
        "versions": {name: _version(name) for name in PACKAGES},
        "bf16_instructions": has_bf16(clock.device),
        "copy_bytes_per_second": copy_bandwidth(clock),
        "load_average": os.getloadavg()[0],
        "allocator": "torch's own for CUDA" if cuda else allocator,
    }


def machine_lines(machine: dict[str, Any], matmul: dict[str, float]) -> list[str]:
    """Return the machine in three lines."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    peaks = ", ".join(f"{dtype} {value / 1e9:,.0f} GFLOP/s" for dtype, value in matmul.items())
    return [
        f"{machine['device']}, {machine['threads']} thread(s) of {machine['cores']} cores, load {machine['load_average']:.2f}; "
        f"seconds are {machine['time']}",
        f"{f'matrix products in this run: {peaks}; ' if peaks else ''}copies {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s; "
        f"allocator: {machine['allocator']}",
        versions,
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
