"""Fixtures of every tier."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads of several tests that wait for each other's cores made the suite ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).parents[1]
# The doors in launcher/ are no part of the installed package. Behind everything else: PYTHONPATH may hold another bpt_dist.
sys.path.append(str(REPOSITORY))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The pack of real task data: $BPT_DATA_ROOT, or shared/data beside the repository."""
    root = Path(os.environ.get("BPT_DATA_ROOT", REPOSITORY.parent / "shared" / "data"))
    if not (root / "pack.json").is_file():
        pytest.skip(f"no data pack in {root}; set BPT_DATA_ROOT to run this test")
    return root


@pytest.fixture(autouse=True)
def no_store_is_left_in_the_environment() -> Iterator[None]:
    """A test that leaves MLflow's address there would send the runs of later tests to its own store."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert os.environ.get("MLFLOW_TRACKING_URI") == before
