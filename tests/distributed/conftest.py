"""DeepSpeed is imported once, before ranks are forked: each would take seconds to import it."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def deepspeed_imported() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
