"""Ranks meet their own job only: real processes, real ports."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import ranks
import torch
import torch.distributed as dist

from bpt_dist.distributed import rendezvous
from bpt_dist.errors import UserError


def meet(job: str, seconds: float = 20, device: str = "cpu") -> int:
    """Join and add up the ranks; the exit code and message of a user's error otherwise."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        rendezvous.join("gloo", job, rank, size, datetime.timedelta(seconds=seconds), device)
    except UserError as error:
        print(error, flush=True)
        return error.exit_code
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    time.sleep(0.5)  # the store of rank 0 stays until the others are done with it
    return 0 if total.item() == size * (size - 1) / 2 else 1


@contextmanager
def started(job: str, which: Sequence[int], size: int, port: int, seconds: float = 20, device: str = "cpu") -> Iterator[list[int]]:
    """Start some ranks of a job of `size`; the list is filled with their exit codes at the end of the block."""
    codes = [-1] * len(which)

    def run(place: int, rank: int) -> None:
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        (codes[place],) = ranks.launch(
            lambda: meet(job, seconds, device), 1, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), **address
        )

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(which)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        for thread in threads:
            thread.join()


def test_the_ranks_of_a_job_meet():
    with started("a", [0, 1, 2], 3, ranks.free_port()) as codes:
        pass
    assert codes == [0, 0, 0]


def test_two_jobs_on_one_port_never_mix(capfd):
    port = ranks.free_port()
    with started("a", [0, 1], 3, port) as first:
        time.sleep(1.5)  # they wait for their rank 2
        with started("b", [0, 1], 2, port) as second:
            pass
        with started("a", [2], 3, port) as late:
            pass
    assert second == [2, 2]
    assert (first, late) == ([0, 0], [0]), "job a is as it would have been alone"
    said = capfd.readouterr().out
    assert f"port {port} of {socket.gethostname()} is in use" in said
    assert f"127.0.0.1:{port}: belongs to another job" in said


@pytest.mark.parametrize("unlike", [0, 2])
def test_a_rank_on_another_kind_of_device_is_named_before_anybody_waits(unlike, capfd):
    """B8: a host whose driver is broken came up on gloo, the others on NCCL; all waited until the limit."""
    port, began = ranks.free_port(), time.monotonic()
    others = [rank for rank in range(3) if rank != unlike]
    with started("a", others, 3, port, 120) as codes, started("a", [unlike], 3, port, 120, device="cuda") as code:
        pass
    assert code == [2]
    assert 2 in codes
    assert time.monotonic() - began < 60
    said = capfd.readouterr().out
    host = socket.gethostname()
    assert f"on {host} computes on" in said
    assert f"rank {unlike} on {host}" in said
    assert "`nvidia-smi`" in said


def test_a_job_that_was_started_twice_is_refused(capfd):
    port = ranks.free_port()
    with started("a", [0, 1], 3, port, seconds=6) as first:
        time.sleep(1.5)
        with started("a", [0, 1], 3, port) as second:
            pass
    assert (first, second) == ([69, 69], [2, 2])
    said = capfd.readouterr().out
    assert "rank 1 of this job is already there" in said
    assert "rank 2 did not appear within 6 s" in said


def test_a_program_that_accepts_and_stays_silent_is_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_at = time.monotonic()
        with started("a", [1], 2, silent.getsockname()[1], 120) as codes:
            pass
        assert time.monotonic() - started_at < 60
    assert codes == [2]
    assert "something other than rank 0 of this job answers there" in capfd.readouterr().out


def test_rank_0_that_never_comes_is_named(capfd):
    port = ranks.free_port()
    with started("a", [1], 2, port, seconds=2) as codes:
        pass
    assert codes == [69]
    assert f"rank 0 at 127.0.0.1:{port} did not appear within 2 s" in capfd.readouterr().out
