"""What the run was measured on: device, threads, versions, and the rates this machine reaches while the run lasts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bpt_dist import allocator
from bpt_dist.backbone import DTYPES
from bpt_dist.bench.paired import Clock, Timing
from bpt_dist.errors import ConfigError

PACKAGES = ("torch", "transformers", "peft", "bpt_dist")
CPU_SIDE, CUDA_SIDE = 2048, 8192
COPY_BYTES = 1 << 28
MATMULS_A_ROUND = 2


def choose_device(name: str) -> torch.device:
    """Return the device by name; `auto` takes the GPU where there is one.

    Raises ConfigError for a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: is not known; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 by instructions of its own; emulated, it only loses time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def check_dtype(name: str, device: torch.device) -> None:
    """Raise ConfigError for a dtype that is none, or that this device only emulates."""
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: is not known; choose {' or '.join(DTYPES)}")
    if name == "bf16" and not has_bf16(device):
        raise ConfigError("--dtype bf16: this device has no instructions for it; use --dtype fp32")


def keep_pages() -> str:
    """Let the C library keep freed memory for everybody in the comparison, and say in words what is set."""
    return "pages kept (mallopt)" if allocator.keep_pages() else "the C library's default"


def matmul(device: torch.device, dtype: str) -> tuple[Callable[[], Any], int]:
    """Return a product of square matrices to time, and its FLOPs."""
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
    """Return what a reader has to know about the machine."""
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


def available_bytes(device: torch.device) -> int:
    """Return how much memory is free for a variant."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)
