"""What is measured of the machine is true, kept in a file, and goes on after a resume."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bpt_dist.storage.metrics_log import read_records
from bpt_dist.tracking.system_metrics import FILE, FIRST_SECONDS, INTERVAL, Machine


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def records(folder: Path) -> list[dict]:
    return read_records(folder / FILE)[0]


def memory_in_use() -> tuple[float, float]:
    """Return used and total memory in bytes as /proc/meminfo has them."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return total - available, total


def test_values_are_those_of_the_kernel() -> None:
    """Memory as /proc/meminfo has it, and cores that one busy process makes busy."""
    machine = Machine()
    used, spun = time.process_time(), time.monotonic()
    while time.process_time() - used < 0.3:
        sum(range(1000))
    elapsed = time.monotonic() - spun
    before, total = memory_in_use()
    found = dict(machine.measure())
    after, _ = memory_in_use()
    # Other processes take and release memory between the readings.
    least, most = min(before, after) - 0.02 * total, max(before, after) + 0.02 * total
    assert least <= found["system_memory_usage_megabytes"] * 1e6 <= most
    assert 100 * least / total <= found["system_memory_usage_percentage"] <= 100 * most / total
    own = 100 * 0.3 / elapsed / psutil.cpu_count()
    assert own / 2 <= found["cpu_utilization_percentage"] <= 100


def test_records_come_at_their_time_and_count_on_after_a_resume(tmp_path: Path) -> None:
    clock, folders = Clock(), [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    machine = Machine(clock)
    machine.measure_if_due(folders)
    assert not (folders[0] / FILE).exists()
    clock.now += FIRST_SECONDS
    machine.measure_if_due(folders)
    machine.measure_if_due(folders)
    clock.now += INTERVAL
    assert machine.seconds_left() == 0
    machine.measure_if_due(folders[:1])
    assert [record["step"] for record in records(folders[0])] == [0, 1]
    assert [record["step"] for record in records(folders[1])] == [0]
    with (folders[0] / FILE).open("a") as file:
        file.write('{"torn')
    again = Machine(clock)
    clock.now += FIRST_SECONDS
    again.measure_if_due([tmp_path / "gone", folders[0]])
    assert [record["step"] for record in records(folders[0])] == [0, 1, 2]
    assert {record["stage"] for record in records(folders[0])} == {"system"}
    assert set(records(folders[0])[0]["metrics"]) >= {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"}


def test_every_gpu_is_measured_and_one_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def utilization(handle: int) -> SimpleNamespace:
        if handle == 1:
            raise NVMLError
        return SimpleNamespace(gpu=37)

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20_000_000_000, total=80_000_000_000),
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetPowerUsage=lambda handle: 301_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = {name: value for name, value in Machine().measure() if name.startswith("gpu_")}
    first = {name: value for name, value in found.items() if name.startswith("gpu_0")}
    assert first == {
        "gpu_0_memory_usage_megabytes": 20_000.0,
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 37.0,
        "gpu_0_power_usage_watts": 301.5,
    }
    assert "gpu_1_utilization_percentage" not in found


def test_without_a_gpu_nothing_is_said_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not [name for name, _ in Machine().measure() if name.startswith("gpu_")]
