"""The same bits from the same run: GPUs choose among kernels, and some of them add in an order that changes from call to call."""

from __future__ import annotations

import os

import torch

from bpt_dist.distributed.environment import CUBLAS_VARIABLE, CUBLAS_WORKSPACE


def use_deterministic_kernels(device: torch.device) -> None:
    """Let torch take only kernels that give the same bits every time; nothing changes on a CPU, where all of them do.

    Repetition and resume at the same layout promise equal bits. On a GPU the fused attention, for one, splits its backward pass
    over keys and adds the parts as they arrive, unless this mode is on. An operation without such a kernel raises RuntimeError.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)  # for callers that have not prepared the process
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads such memory
