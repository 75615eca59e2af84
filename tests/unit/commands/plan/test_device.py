"""Devices of a plan: rows of data sheets, a probe that ends in time on any machine, and what a machine cannot do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from bpt_dist.commands.main import main
from bpt_dist.commands.plan import device
from bpt_dist.commands.plan.device import Device, cpu_has_bf16, of_table, probe, processes_here
from bpt_dist.commands.plan.estimate import estimate
from bpt_dist.distributed.device_table import DEVICES, published
from bpt_dist.errors import ConfigError

ROOT = Path(__file__).parents[4]
LARGE = str(ROOT / "configs/bpt/t5_large_6.yaml")
WIDTH, INNER = 1024, 4096


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this machine was measured")

    monkeypatch.setattr(device, "_rate", refuse)


@pytest.mark.parametrize("name", DEVICES)
def test_a_row_is_plausible_and_has_a_source(name: str) -> None:
    row = DEVICES[name]
    assert row.source.startswith(("https://www.nvidia.com/", "https://images.nvidia.com/"))
    assert 8e9 < row.memory < 1e12
    assert 1e11 < row.bandwidth < 1e13
    assert 5e12 < row.fp32 < 2e14
    if row.bf16 is not None and row.tf32 is not None:
        assert row.fp32 < row.tf32 < row.bf16
        assert row.bf16 / row.tf32 == pytest.approx(2, rel=0.02)  # of every one of them the tensor cores are twice as fast in bf16
    assert published(row.title) is row or name in ("h100", "a100", "a100-pcie", "a100-40gb")
    assert published(f"NVIDIA {row.words.replace(' ', '-')}") is row


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"), ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"), ("Tesla V100-SXM2-32GB", "v100"), ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_a_driver_s_name_finds_its_row(driver: str, name: str | None) -> None:
    assert published(driver) is (None if name is None else DEVICES[name])


@pytest.mark.usefixtures("no_probe")
def test_a_large_model_is_planned_for_another_device_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()  # of this process: others that share its cores must not count
    assert main(["plan", "-c", LARGE, "--device", "h200", "--world", "16", "--json"]) == 0
    assert time.process_time() - began < 10
    (found,) = json.loads(capsys.readouterr().out)
    assert found["device"]["name"] == "NVIDIA H200 SXM"
    assert (found["device"]["rate"], found["device"]["memory"]) == (DEVICES["h200"].bf16, 141 * 10**9)
    assert (found["world_size"], found["ranks_here"]) == (16, 8)
    assert main(["plan", "-c", LARGE, "--device", "h200"]) == 0
    text = capsys.readouterr().out
    assert "of them on a machine" in text
    assert "https://www.nvidia.com/en-us/data-center/h200/" in text


@pytest.mark.usefixtures("no_probe")
def test_a_device_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", LARGE, "--device", "h20"]) == 2
    assert capsys.readouterr().err == (
        "--device h20: is not known; choose one of cpu, h200, h100-pcie, h100-nvl, h100, a100-40gb, a100-pcie, a100, l40s, l4, "
        "a10, v100, t4; "
        "did you mean h200?\n"
    )


@pytest.mark.usefixtures("no_probe")
def test_what_does_not_fit_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", LARGE, "--device", "t4", "source.pass_size=64"]) == 2
    assert "(NVIDIA T4, 1 on a machine)" in capsys.readouterr().err
    assert main(["plan", "-c", LARGE, "--device", "t4"]) == 0  # unless it is told, a pass reads what fits


def test_seconds_are_those_of_the_slowest_part() -> None:
    found = of_table(DEVICES["l4"], "bf16")
    assert found.seconds(121e12 * 0.4, 1, 24) == pytest.approx(1)
    assert of_table(DEVICES["l4"], "fp32").seconds(30.3e12 * 0.4, 1, 24) == pytest.approx(1)  # no TF32
    assert found.seconds(1e9, 10, 24) == pytest.approx(10 * 24 * device.HOST_SECONDS_A_BLOCK)
    assert found.seconds(1e9, 10, 1, pass_bytes=300e9) == pytest.approx(10)  # each pass reads the weights from memory
    assert Device("CPU", "cpu", 1e9, 0).seconds(0.6e9, 10, 24) == pytest.approx(1 + 10 * 24 * device.HOST_SECONDS_A_BLOCK)


def test_bf16_without_units_for_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = of_table(DEVICES["v100"], "bf16")
    assert old.rate == DEVICES["v100"].fp32
    assert old.warning is not None
    assert "NVIDIA V100 SXM2 32 GB has no units for bf16" in old.warning
    assert of_table(DEVICES["v100"], "fp32").warning is None
    monkeypatch.setattr(device, "CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(device, "_rate", lambda *_: 1e9)
    for flags, has_it in (("flags : fpu avx2 avx512f", False), ("flags : fpu avx512_bf16", True), ("Features : fp bf16", True)):
        (tmp_path / "cpuinfo").write_text(flags + "\n")
        assert cpu_has_bf16() is has_it
        warning = probe(WIDTH, INNER, "bf16", 1, only_cpu=True).warning
        assert (warning is None) is has_it
        assert probe(WIDTH, INNER, "fp32", 1, only_cpu=True).warning is None
    (tmp_path / "cpuinfo").unlink()
    assert cpu_has_bf16()


def test_the_warning_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags : fpu avx2\n")
    monkeypatch.setattr(device, "CPU_FACTS", tmp_path / "cpuinfo")
    plain = tiny_run.settings(tiny_run.world(tmp_path / "world"), {"name": "bpt"}, backbone={"dtype": "bf16"})
    found = estimate(tiny_run.load(tmp_path, plain), 1, device="cpu")
    assert [warning for warning in found.warnings if "without instructions for it" in warning]


class SlowMachine:
    """A clock and a matrix product that takes its time on it."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now = rate, 0.0

    def perf_counter(self) -> float:
        return self.now

    def ones(self, *shape: int, **_: Any) -> _Matrix:
        return _Matrix(self, shape)


class _Matrix:
    def __init__(self, machine: SlowMachine, shape: tuple[int, ...]) -> None:
        self.machine, self.shape = machine, shape

    def __matmul__(self, other: _Matrix) -> _Matrix:
        self.machine.now += 2 * self.shape[0] * self.shape[1] * other.shape[1] / self.machine.rate
        return self


@pytest.mark.parametrize("rate", [5e8, 1e10, 1e12, 1e15])
def test_the_probe_takes_less_than_a_second_whatever_the_machine(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SlowMachine(rate)
    monkeypatch.setattr(device, "time", machine)
    monkeypatch.setattr(device.torch, "ones", machine.ones)
    found = device._rate.__wrapped__(WIDTH, INNER, "fp32", torch.device("cpu"))
    assert found == pytest.approx(rate)
    assert machine.now < 1


def test_processes_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [processes_here(size, "h200") for size in (1, 8, 16)] == [1, 8, 8]
    assert processes_here(16, "cpu") == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert processes_here(16) == 3


def test_the_plan_of_another_device_does_not_look_at_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bpt_dist.commands.plan import estimate as module

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    config = tiny_run.load(tmp_path, tiny_run.settings(tiny_run.world(tmp_path / "world"), {"name": "bpt"}))
    assert module.plans(config, 1, device="h200")
    with pytest.raises(ConfigError, match="has 0 B free"):
        module.plans(config, 1)
