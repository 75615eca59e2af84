"""How busy the machine of a run is, as `system.jsonl`: measured by the mirroring process, under the names of MLflow's own page.

MLflow's own monitor sends what it measures at once and ends with the first call that fails. A file is kept through an outage and
mirrored like the metrics. Only what can be measured is written: nothing about a GPU where there is none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from bpt_dist.errors import StorageError
from bpt_dist.storage.metrics_log import MetricsLog, iter_records

FILE, STAGE = "system.jsonl", "system"
FIRST_SECONDS, INTERVAL = 1.0, 10.0
MEGABYTE = 1e6  # as MLflow counts


class Machine:
    """Measures the machine for the runs that are open; the steps of a run's measurements count on after a resume."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        psutil.cpu_percent()  # later calls return the use since the call before
        self._nvml = _nvml()
        self._clock, self._due = clock, clock() + FIRST_SECONDS
        self._steps: dict[Path, int] = {}

    def seconds_left(self) -> float:
        """Return how long it is until the next measurement."""
        return max(0.0, self._due - self._clock())

    def measure_if_due(self, folders: Iterable[Path]) -> None:
        """Append a record to `system.jsonl` of every run directory, when it is time."""
        if self.seconds_left():
            return
        self._due = self._clock() + INTERVAL
        values = {f"{STAGE}/{name}": value for name, value in self.measure()}
        for folder in folders:
            with contextlib.suppress(StorageError, OSError):  # a full disk is for the run to say
                self._append(folder, values)

    def measure(self) -> Iterator[tuple[str, float]]:
        """Yield what is in use now: percent of all cores since the last measurement, memory, and the same of every NVIDIA GPU."""
        yield "cpu_utilization_percentage", psutil.cpu_percent()
        memory = psutil.virtual_memory()
        yield "system_memory_usage_megabytes", round(memory.used / MEGABYTE, 1)
        yield "system_memory_usage_percentage", round(100 * memory.used / memory.total, 1)
        if self._nvml is not None:
            for number in range(self._nvml.nvmlDeviceGetCount()):
                with contextlib.suppress(self._nvml.NVMLError):  # a part of a divided GPU does not say how busy it is
                    yield from self._gpu(number)

    def _gpu(self, number: int) -> Iterator[tuple[str, float]]:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(number)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        yield f"gpu_{number}_memory_usage_megabytes", round(memory.used / MEGABYTE, 1)
        yield f"gpu_{number}_memory_usage_percentage", round(100 * memory.used / memory.total, 1)
        yield f"gpu_{number}_utilization_percentage", float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        yield f"gpu_{number}_power_usage_watts", round(self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1)

    def _append(self, folder: Path, values: dict[str, float]) -> None:
        file = folder / FILE
        log = MetricsLog(file)
        try:
            if folder not in self._steps:
                previous = list(iter_records(file))
                self._steps[folder] = previous[-1]["step"] + 1 if previous else 0
            log.append({"step": self._steps[folder], "stage": STAGE, "metrics": values})
            self._steps[folder] += 1
        finally:
            log.close()


def _nvml() -> Any:
    """Return NVIDIA's library, ready to be asked, or None where it or a GPU is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml
