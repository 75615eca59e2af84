"""Which device a rank computes on, and whether the ranks of a job fit together."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bpt_dist.errors import ConfigError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class RankDevice(NamedTuple):
    """The device of one rank: its host, `cpu` or `cuda`, and which GPU it is whatever its number on the host (None on a CPU)."""

    host: str
    kind: str
    gpu: str | None


def own_device(local_rank: int) -> torch.device:
    """Return the GPU of this rank, or the CPU where there is none; the GPU becomes torch's current one.

    A rank that sees one GPU takes it: SLURM's `--gpus-per-task` and many containers show each rank its own. Raises ConfigError
    where several ranks of a host see the same GPUs and there are too few.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    place = 0 if count == 1 else local_rank
    if place >= count:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank} on {socket.gethostname()}, which has {count} GPU(s); start as many processes a host as it "
            "has, or hide them with CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def process_memory(device: torch.device, ranks_here: int) -> int:
    """Return the bytes for each of `ranks_here` processes of this machine: their share of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        sharing = -(-ranks_here // torch.cuda.device_count())
        return int(torch.cuda.get_device_properties(device).total_memory) // sharing
    return machine_memory() // ranks_here


def machine_memory() -> int:
    """Return the bytes of memory this machine, or the container around us, has."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


def describe(device: torch.device) -> RankDevice:
    """Return what the other ranks need to know of this rank's device."""
    gpu = None
    if device.type == "cuda":
        # Parts of one GPU (MIG) have names of their own in the variable only.
        gpu = f"{torch.cuda.get_device_properties(device).uuid} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    return RankDevice(socket.gethostname(), device.type, gpu)


def check_devices(devices: Sequence[RankDevice]) -> None:
    """Raise ConfigError, the same on every rank, where two ranks have the same GPU."""
    first: dict[tuple[str, str], int] = {}
    for rank, device in enumerate(devices):
        if device.gpu is None:
            continue
        other = first.setdefault((device.host, device.gpu), rank)
        if other != rank:
            raise ConfigError(
                f"rank {other} and rank {rank} have the same GPU of {device.host}; start as many processes a host as it has GPUs, "
                "or hide them with CUDA_VISIBLE_DEVICES= to use the CPU"
            )


def unlike(own: str, own_rank: int, first: str) -> str | None:
    """Return what is wrong when this rank computes on another kind of device than the `first` (`<kind> rank <r> on <host>`)."""
    kind, _, place = first.partition(" ")
    if kind == own:
        return None
    names = {"cpu": "the CPU", "cuda": "a GPU"}
    return (
        f"rank {own_rank} on {socket.gethostname()} computes on {names[own]}, {place} on {names[kind]}; repair the GPU's driver on "
        "the host that has none (`nvidia-smi` says more), or hide all GPUs with CUDA_VISIBLE_DEVICES= on every host"
    )
