"""What ranks ask of the job's store does not grow with their number: requests are counted."""

from __future__ import annotations

import datetime
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch.distributed as dist

from bpt_dist.distributed import failure_detection, rendezvous
from bpt_dist.distributed.failure_detection import FailureDetector
from bpt_dist.distributed.liveness import RankProcess
from bpt_dist.errors import ConfigError, PeerLost, UserError

NUM_RANKS = (2, 4, 8, 16)


class CountedStore:
    """A client of a store that counts its requests by name."""

    def __init__(self, store: Any) -> None:
        self.store, self.requests = store, Counter[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.store, name)

        def counted(*arguments: Any) -> Any:
            self.requests[name] += 1
            return call(*arguments)

        return counted

    def clone(self) -> CountedStore:
        return self


@pytest.fixture
def clients() -> Callable[[int], list[CountedStore]]:
    """Return clients of one store, each with a connection of its own."""

    def connect(number: int) -> list[CountedStore]:
        store = dist.TCPStore("127.0.0.1", ranks.free_port(), is_master=True, wait_for_workers=False)
        return [CountedStore(store), *(CountedStore(store.clone()) for _ in range(number - 1))]

    return connect


def in_threads(work: Callable[[int], Any], which: list[int]) -> dict[int, Any]:
    """Return what each rank returned or raised."""
    found: dict[int, Any] = {}

    def call(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in which]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(autouse=True)
def _address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")


def checked_in(stores: list[CountedStore], which: list[int], seconds: float = 30, **unlike: str) -> dict[int, Any]:
    limit = datetime.timedelta(seconds=seconds)

    def check_in(rank: int) -> None:
        rendezvous.check_in(stores[rank], "job", rank, len(stores), limit, unlike.get(f"rank{rank}", "cpu"))

    return in_threads(check_in, which)


@pytest.mark.parametrize("size", NUM_RANKS)
def test_a_rank_meets_the_others_with_as_many_requests_whatever_their_number(size: int, clients: Any) -> None:
    stores = clients(size)
    assert checked_in(stores, list(range(size))) == dict.fromkeys(range(size))
    for store in stores:
        store.requests.pop("wait")  # once, and once more for every second
        assert sum(store.requests.values()) <= 7


def test_ranks_that_do_not_come_are_named_by_every_rank_that_waits(clients: Any) -> None:
    stores = clients(5)
    found = checked_in(stores, [0, 2, 3], seconds=2.5)
    for error in found.values():
        assert isinstance(error, PeerLost)
        assert str(error).startswith("ranks 1, 4 did not appear within 2.5 s")
    assert all(sum(store.requests.values()) < 16 for store in stores)


def test_a_rank_that_comes_too_late_hears_that_the_others_have_given_up(clients: Any) -> None:
    stores = clients(2)
    checked_in(stores, [0], seconds=0.2)
    assert str(checked_in(stores, [1])[1]).startswith("rank 1 did not appear within 0.2 s")


def test_rank_0_stays_until_late_ranks_have_heard_of_a_refusal(clients: Any) -> None:
    stores = clients(3)
    limit, found = datetime.timedelta(seconds=30), {}

    def check_in(rank: int) -> None:
        time.sleep(rank)
        with pytest.raises(ConfigError):
            rendezvous.check_in(stores[rank], "job", rank, 3, limit, "cuda" if rank == 1 else "cpu")
        found[rank] = time.monotonic()

    in_threads(check_in, [0, 1, 2])
    assert found[1] < found[2] < found[0]


def test_a_refusal_wakes_ranks_that_wait(clients: Any) -> None:
    began = time.monotonic()
    found = checked_in(clients(3), [0, 1, 2], rank2="cuda")
    assert all(isinstance(error, ConfigError) for error in found.values())
    assert time.monotonic() - began < 25  # not the 30 s they would wait


def detectors(stores: list[CountedStore], absent: int | None = None) -> dict[int, FailureDetector]:
    processes = [RankProcess("host", 0, None) for _ in stores]
    return {
        rank: FailureDetector(store, rank, processes, lambda: (3, "step")) for rank, store in enumerate(stores) if rank != absent
    }


@pytest.mark.parametrize("size", NUM_RANKS)
def test_a_look_for_news_is_one_request(size: int, clients: Any) -> None:
    stores = clients(size)
    found = detectors(stores)
    time.sleep(6 * failure_detection.POLL_SECONDS)
    for detector in found.values():
        detector.close()
    assert all(store.requests.keys() == {"check"} and store.requests["check"] <= 6 for store in stores)


@pytest.mark.parametrize("size", NUM_RANKS)
def test_when_all_ranks_ask_at_once_one_of_them_reads_the_answers(size: int, clients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank read a key of every other one, over and over: 1,024 of them would have drowned the store."""
    for limit in ("ANSWER_SECONDS", "STORE_SECONDS", "COLLECTED_SECONDS"):  # a busy machine
        monkeypatch.setattr(failure_detection, limit, 4 * getattr(failure_detection, limit))
    stores = clients(size)
    found = detectors(stores, absent=size - 1)
    said = in_threads(lambda rank: found[rank].diagnose(), list(found))
    for detector in found.values():
        detector.close()
    assert {diagnosis.text for diagnosis in said.values()} == {f"rank {size - 1} on host does not answer"}
    read = sorted(store.requests["get"] for store in stores)
    assert all(number <= 2 for number in read[:-1])  # the diagnosis, once by each thread of a rank
    looks = 4 * 1.2 / (failure_detection.POLL_SECONDS / 5)
    assert all(sum(store.requests.values()) < 3 * looks for store in stores)
