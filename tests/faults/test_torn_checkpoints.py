"""F4: damage to a checkpoint is noticed before its bytes are used; the step before takes over, never a fresh start."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_figures import measured, record_figure
from server import Start
from trials import Trials

from bpt_dist.errors import StorageError
from bpt_dist.storage import checkpoint

FILES = ("state.safetensors", "meta.json", "MANIFEST.json")


@pytest.fixture(scope="module")
def stopped(trials: Trials) -> Path:
    """The two checkpoints of a run that was killed behind its source stage."""
    job = trials.job()
    job.start("stage.finished,stage=source,kill")
    return job.directory / "source" / "checkpoints"


def cuts(step: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in FILES:
        size = (step / name).stat().st_size
        for length in sorted({0, 1, size - 1, *(rng.randrange(size) for _ in range(47))}):
            yield (
                f"cut {name} to {length}",
                lambda name=name, length=length: (step / name).write_bytes((step / name).read_bytes()[:length]),
            )


def flips(step: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in FILES:
        for _ in range(200):
            place, bit = rng.randrange((step / name).stat().st_size), rng.randrange(8)
            yield f"flip {name} {place} {bit}", lambda name=name, place=place, bit=bit: flip(step / name, place, bit)


def swaps(step: Path, other: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in FILES:
        yield f"delete {name}", lambda name=name: (step / name).unlink()
        yield f"empty {name}", lambda name=name: (step / name).write_bytes(b"")
        yield f"{name} of another step", lambda name=name: shutil.copy(other / name, step / name)
        yield f"grow {name}", lambda name=name: (step / name).write_bytes((step / name).read_bytes() + b"\0")
    yield "files swapped", lambda: swap(step / "meta.json", step / "MANIFEST.json")


def flip(file: Path, place: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_every_damage_is_detected_and_the_step_before_is_taken(stopped: Path, tmp_path: Path) -> None:
    rng, accepted, total = random.Random(4), [], 0
    disk = tmp_path / "disk"
    shutil.copytree(stopped, disk)
    newest, older = disk / "step-00000004", disk / "step-00000002"
    for what, damage in [*cuts(newest, rng), *flips(newest, rng), *swaps(newest, older)]:
        damage()
        warnings: list[str] = []
        found = checkpoint.latest(disk, fingerprint=None, warn=warnings.append)
        total += 1
        if found is None or found.step != 2 or "step-00000004" not in warnings[0]:
            accepted.append(what)
        shutil.rmtree(newest)
        shutil.copytree(stopped / newest.name, newest)
    record_figure("F4", "damage to the newest checkpoint", trials=total, passed=total - len(accepted), wrong_loads=len(accepted))
    assert accepted == []
    assert total >= 250


def test_none_valid_is_never_a_fresh_start(stopped: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    shutil.copytree(stopped, disk)
    for step in disk.iterdir():
        flip(step / "state.safetensors", 200, 3)
    with pytest.raises(StorageError, match="none of its 2 checkpoints is intact"):
        checkpoint.latest(disk, fingerprint=None, warn=print)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_falls_back_with_a_warning_and_ends_with_the_same_bits(size: int, trials: Trials) -> None:
    with measured("F4", "whole runs, newest checkpoint damaged", f"{size} rank(s)"):
        job = trials.job()
        job.start("stage.finished,stage=source,kill", size)
        flip(job.directory / "source" / "checkpoints" / "step-00000004" / "state.safetensors", 300, 1)
        ended = job.start("", size)
        assert ended.codes == [0] * size
        assert "step-00000004/state.safetensors: its SHA-256" in ended.screen
        trials.assert_as_undisturbed(job, size)


def test_a_run_without_a_valid_checkpoint_is_refused_with_74(trials: Trials) -> None:
    with measured("F4", "whole runs, no checkpoint valid"):
        job = trials.job()
        job.start("stage.finished,stage=source,kill")
        kept = {step: step.read_bytes() for step in job.directory.rglob("state.safetensors")}
        for step in kept:
            flip(step, 300, 1)
        ended = job.server.start(Start(job.config))
        assert ended.codes == [74]
        assert "none of its 2 checkpoints is intact" in ended.screen
        for step, data in kept.items():
            step.write_bytes(data)
        job.finish()
        trials.assert_as_undisturbed(job)
