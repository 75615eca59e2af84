"""What the steps of a stage cost: time, tokens, memory, and the share of the device's peak; nothing here waits for the device.

A step ends with numbers that the host needs (losses, flags), so the host's clock measures the device, too.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch

from bpt_dist.distributed.device_table import published
from bpt_dist.storage.metrics_log import COST

GIB = 1 << 30


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak rate of matrix products in FLOP/s where it is known, None elsewhere."""
    if device.type != "cuda" or torch.backends.cuda.matmul.allow_tf32:
        return None
    row = published(torch.cuda.get_device_name(device))
    if row is None:
        return None
    return row.bf16 if dtype == torch.bfloat16 else row.fp32


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: tensors on a GPU, or the resident memory of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepCost:
    """Adds up steps from one record to the next. Validations, checkpoints and waits between steps do not count.

    `peak` is the rate of all ranks together, None where it is not known.
    """

    def __init__(self, device: torch.device, peak: float | None) -> None:
        self.device, self.peak = device, peak
        self.last = 0.0  # seconds of the last step
        self._forget()
        self._began: float | None = None

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._began = time.perf_counter()

    def count(self, tokens: int, flops: float) -> None:
        """Count work of the step over all ranks."""
        self.tokens += tokens
        self.flops += flops

    def end_step(self) -> None:
        """Stop the clock."""
        if self._began is not None:
            self.last = time.perf_counter() - self._began
            self.seconds += self.last
            self.steps += 1
        self._began = None

    def metrics(self, prefix: str) -> Mapping[str, float]:
        """Return the means of the steps since the last call, and the peak memory of this rank; none where there was no step."""
        if not self.steps:
            return {}
        values = {
            "seconds_per_step": round(self.seconds / self.steps, 6),
            "tokens_per_step": round(self.tokens / self.steps, 1),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "peak_memory_gib": round(peak_memory(self.device) / GIB, 4),
        }
        if self.peak is not None and self.flops:
            values["matmul_share"] = round(self.flops / self.seconds / self.peak, 4)
        self._forget()
        return {f"{prefix}/{COST}/{name}": value for name, value in values.items()}

    def _forget(self) -> None:
        self.seconds, self.steps, self.tokens, self.flops = 0.0, 0, 0, 0.0
