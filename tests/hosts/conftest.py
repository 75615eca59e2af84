"""Fixtures of the tier that needs several hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
import two_hosts


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_hosts.TwoHosts]:
    reason = two_hosts.why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts.TwoHosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 and its tasks."""
    return tiny_run.world(tmp_path_factory.mktemp("tiny_world"))
