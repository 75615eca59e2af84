"""Passes as large as memory allows have the same sizes on resume, unless a machine has less."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bpt_dist.distributed.mesh import World
from bpt_dist.training import run as of_run
from bpt_dist.training.run import TrainingRun


class Directory:
    """Keeps choices as a run directory does."""

    def __init__(self) -> None:
        self.choices: dict[str, str] = {}

    def choice(self, name: str) -> str | None:
        return self.choices.get(name)

    def record_choice(self, name: str, value: str) -> None:
        self.choices[name] = value


def test_a_resume_counts_on_no_more_memory_than_the_first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    run = SimpleNamespace(world=world, directory=Directory())
    found = []
    for there in (8 << 30, 16 << 30, 4 << 30):
        monkeypatch.setattr(of_run, "process_memory", lambda device, ranks, there=there: there)
        found.append(TrainingRun._agreed_memory(run))  # type: ignore[arg-type]
    assert found == [8 << 30, 8 << 30, 4 << 30]
    assert run.directory.choices == {"memory": str(8 << 30)}
    assert world.device == torch.device("cpu")
