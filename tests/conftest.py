"""Fixtures of every tier."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The pack of real task data: $BPT_DATA_ROOT, or shared/data beside the repository."""
    root = Path(os.environ.get("BPT_DATA_ROOT", REPOSITORY.parent / "shared" / "data"))
    if not (root / "pack.json").is_file():
        pytest.skip(f"no data pack in {root}; set BPT_DATA_ROOT to run this test")
    return root
