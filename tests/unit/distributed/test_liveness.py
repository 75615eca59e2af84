"""The kernel tells which ranks of this host have ended; what is not certainly a rank of this job is not watched."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from bpt_dist.distributed.liveness import Neighbours, RankProcess, _started, this_process

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEPER) as process:
        yield process
        process.kill()


def as_rank(process: subprocess.Popen[bytes]) -> RankProcess:
    return RankProcess(this_process().host, process.pid, _started(process.pid))


def ended_soon(neighbours: Neighbours) -> list[int]:
    deadline = time.monotonic() + 5
    while not neighbours.ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    return neighbours.ended()


def test_a_killed_neighbour_is_seen_before_anybody_waits_for_it(other: subprocess.Popen[bytes]) -> None:
    neighbours = Neighbours([this_process(), as_rank(other)], 0)
    assert neighbours.ended() == []
    other.kill()
    assert ended_soon(neighbours) == [1]
    neighbours.close()
    assert neighbours.ended() == []


def test_a_process_of_another_host_is_not_watched(other: subprocess.Popen[bytes]) -> None:
    neighbours = Neighbours([this_process(), as_rank(other)._replace(host="elsewhere")], 0)
    other.kill()
    other.wait()
    assert neighbours.ended() == []


@pytest.mark.parametrize("started", [None, "1"])
def test_an_id_that_names_another_process_here_is_not_watched(started: str | None, other: subprocess.Popen[bytes]) -> None:
    """Two containers of one host name have process ids of their own."""
    neighbours = Neighbours([this_process(), as_rank(other)._replace(started=started)], 0)
    other.kill()
    other.wait()
    assert neighbours.ended() == []
