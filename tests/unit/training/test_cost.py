"""What steps cost is added up between records, in units anybody can check."""

from __future__ import annotations

import mmap
import time

import psutil
import pytest
import torch

from bpt_dist.training import cost
from bpt_dist.training.cost import StepCost, known_peak, peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_means_of_the_steps_since_the_last_record(clock: list[float]) -> None:
    steps = StepCost(CPU, peak=1e9)
    for seconds, tokens in ((1.0, 100), (3.0, 300)):
        steps.begin_step()
        steps.count(tokens, flops=1e6 * tokens)
        clock[0] += seconds
        steps.end_step()
        clock[0] += 50  # a validation
    found = steps.metrics("source")
    memory = found.pop("source/cost/peak_memory_gib")
    assert found == {
        "source/cost/seconds_per_step": 2.0,
        "source/cost/tokens_per_step": 200.0,
        "source/cost/tokens_per_second": 100.0,
        "source/cost/matmul_share": 0.1,
    }
    assert 0.05 < memory < 50
    assert steps.metrics("source") == {}, "the next record begins from zero"


def test_without_a_known_peak_there_is_no_share(clock: list[float]) -> None:
    steps = StepCost(CPU, peak=None)
    steps.begin_step()
    steps.count(10, 1e9)
    clock[0] += 1
    steps.end_step()
    assert "target/cost/matmul_share" not in steps.metrics("target")


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory(CPU)
    fallen = before - psutil.Process().memory_info().rss  # since the peak, which the block must exceed
    # Pages of its own: of the C library a block may get pages that were freed and are still resident.
    with mmap.mmap(-1, fallen + (256 << 20)) as block:
        for place in range(0, len(block), mmap.PAGESIZE):
            block[place] = 1
        assert 128 << 20 < peak_memory(CPU) - before < 512 << 20


@pytest.mark.parametrize(
    ("name", "single", "half"),
    [
        ("NVIDIA H200", 67.0, 989.0), ("NVIDIA H100 80GB HBM3", 67.0, 989.0), ("NVIDIA H100 PCIe", 51.0, 756.0),
        ("NVIDIA A100-SXM4-80GB", 19.5, 312.0), ("NVIDIA L40S", 91.6, 362.0), ("NVIDIA L4", 30.3, 121.0),
        ("NVIDIA A10G", None, None), ("NVIDIA GeForce RTX 4090", None, None),
    ],
)  # fmt: skip
def test_peaks_are_known_by_the_words_of_a_name(
    name: str, single: float | None, half: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost.torch.cuda, "get_device_name", lambda _device: name)
    gpu = torch.device("cuda")
    assert known_peak(gpu, torch.float32) == (None if single is None else pytest.approx(1e12 * single))
    assert known_peak(gpu, torch.bfloat16) == (None if half is None else pytest.approx(1e12 * half))
    assert known_peak(CPU, torch.float32) is None
