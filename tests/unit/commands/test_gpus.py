"""Who has a GPU: one answer for every command, from the device files and CUDA_VISIBLE_DEVICES, or from torch where it is loaded."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import bpt_dist
from bpt_dist.commands.check import probe
from bpt_dist.commands.sweep import cluster
from bpt_dist.commands.table import command, trainers
from bpt_dist.distributed import environment

PACKAGE = Path(bpt_dist.__file__).parent
MACHINES = {
    "no GPU": (["null", "nvidiactl", "nvidia-uvm", "nvidia-modeset"], None, 0),
    "one": (["nvidia0", "nvidiactl"], None, 1),
    "a container with GPU 3 only": (["nvidia3", "nvidiactl"], None, 1),
    "eight": ([f"nvidia{number}" for number in range(8)], None, 8),
    "WSL": (["dxg"], None, 1),
    "hidden": (["nvidia0", "nvidia1"], "", 0),
    "hidden in WSL": (["dxg"], "-1", 0),
    "two of eight": ([f"nvidia{number}" for number in range(8)], "6, 2", 2),
    "by name": (["nvidia0", "nvidia1"], "GPU-8932f937,MIG-7e2f", 2),
    "behind an invalid one": (["nvidia0", "nvidia1"], "0,-1,1", 1),
    "set on a machine without": (["null"], "0,1", 0),
}


@pytest.fixture(params=list(MACHINES))
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Show this process the device files of a machine; the number of its GPUs."""
    files, visible, expected = MACHINES[request.param]
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(environment, "DEVICES", tmp_path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return expected


def test_every_command_counts_the_same(machine: int, tmp_path: Path) -> None:
    assert environment.num_gpus() == machine
    assert probe.num_gpus is trainers.num_gpus is command.num_gpus is environment.num_gpus
    assert environment.child_environment(2).get("DS_ACCELERATOR") == (None if machine else "cpu")
    workers = [trainers.WorkerTrainer(number, 3, tmp_path).environment["LOCAL_RANK"] for number in range(3)]
    assert workers == [str(number % max(1, machine)) for number in range(3)]


def test_a_table_takes_a_worker_for_each_gpu(machine: int, tmp_path: Path) -> None:
    wanted = machine or min(environment.cores(), command.MOST_WORKERS)
    assert len(command._trainers(20, None, None, tmp_path / "jobs")) == wanted


def test_a_sweep_counts_what_torch_will_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert cluster._this_machine() == {"CPU": float(environment.cores()), "GPU": 3.0}


def test_no_other_module_looks_for_devices() -> None:
    for path in PACKAGE.rglob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        places = [
            text
            for text in texts
            if isinstance(text, str) and ("/dev/nvidia" in text or "nvidia[0-9]" in text or text == "nvidia-smi")
        ]
        if path != PACKAGE / "distributed" / "environment.py":
            assert not places, f"{path}: {places}"
