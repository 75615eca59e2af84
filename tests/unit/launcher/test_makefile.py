"""What `make` removes: caches without asking, runs only after a yes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("runs/a", ".venv", ".ruff_cache", ".pytest_cache", ".mypy_cache"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "a" / "results.json").write_text("[]")
    return tmp_path


def make(checkout: Path, target: str, answer: str = "") -> int:
    return subprocess.run(["make", "-C", checkout, target], input=answer, text=True, check=False, capture_output=True).returncode


def test_clean_removes_caches_only(checkout: Path) -> None:
    assert make(checkout, "clean") == 0
    assert {path.name for path in checkout.iterdir()} == {"Makefile", "runs", ".venv"}
    assert (checkout / "runs" / "a" / "results.json").is_file()


@pytest.mark.parametrize("answer", ["", "no\n", "y\n", "YES please\n"])
def test_runs_stay_without_a_yes(checkout: Path, answer: str) -> None:
    assert make(checkout, "remove-runs", answer) != 0
    assert (checkout / "runs" / "a" / "results.json").is_file()


def test_runs_are_removed_after_a_yes(checkout: Path) -> None:
    assert make(checkout, "remove-runs", "yes\n") == 0
    assert not (checkout / "runs").exists()


def test_a_failed_freeze_keeps_the_constraints(checkout: Path) -> None:
    (checkout / "constraints.txt").write_text("# measured\ntorch==2\n")
    (checkout / "pyproject.toml").touch()
    (checkout / ".venv" / "bin").mkdir()
    python = checkout / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o700)
    (checkout / ".venv" / ".ready").touch()
    assert make(checkout, "lock") != 0
    assert (checkout / "constraints.txt").read_text() == "# measured\ntorch==2\n"
