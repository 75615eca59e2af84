"""Who is gone is named, alike by every rank that is left; a slow rank is told from a pause."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import ranks
import tiny_run
import torch.distributed as dist

from bpt_dist.distributed.failure_detection import Diagnosis, FailureDetector, StragglerAlarm
from bpt_dist.distributed.liveness import RankProcess
from bpt_dist.storage.files import read_json
from bpt_dist.train import run_all

HOSTS = ("east", "east", "west")
PROCESSES = [RankProcess(host, 0, None) for host in HOSTS]


def detectors(present: dict[int, tuple[int, str]]) -> tuple[dist.TCPStore, dict[int, FailureDetector]]:
    """The store of a job and the ranks of it that are alive."""
    store = dist.TCPStore("127.0.0.1", ranks.free_port(), is_master=True, wait_for_workers=False)
    return store, {rank: FailureDetector(store, rank, PROCESSES, lambda at=at: at) for rank, at in present.items()}


def diagnoses(calls: dict[int, FailureDetector]) -> list[Diagnosis]:
    """What the ranks say that all notice at once."""
    found: dict[int, Diagnosis] = {}

    def ask(rank: int) -> None:
        found[rank] = calls[rank].diagnose()

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call in calls.values():
        call.close()
    return [found[rank] for rank in calls]


def test_every_rank_that_is_left_names_the_one_that_does_not_answer() -> None:
    _store, calls = detectors({0: (7, "a"), 2: (7, "a")})
    assert diagnoses(calls) == [Diagnosis("rank 1 on east does not answer", 0)] * 2


def test_when_all_answer_the_one_with_the_fewest_collective_calls_is_waited_for() -> None:
    _store, calls = detectors({0: (9, "step 4"), 1: (9, "step 4"), 2: (8, "step 3")})
    assert diagnoses(calls) == [Diagnosis("rank 2 on west is furthest behind, at 'step 3'", 0)] * 3


def test_a_rank_whose_main_thread_waits_answers_the_call_of_another() -> None:
    store, calls = detectors({0: (9, "a"), 1: (9, "a"), 2: (8, "b")})
    assert calls[1].diagnose().text.startswith("rank 2")  # nobody else asks
    assert {json.loads(line)[0] for line in store.get("failure/answers").splitlines()} == {0, 1, 2}
    for call in calls.values():
        call.close()


def test_without_the_store_rank_0_is_the_one_that_is_gone() -> None:
    store, calls = detectors({2: (3, "a")})
    del store
    assert diagnoses(calls) == [Diagnosis("rank 0 on east, which keeps the job's store, does not answer", None)]


def test_a_rank_that_hangs_is_named_in_status_and_all_leave_within_the_time_out(tmp_path: Path) -> None:
    """F10: the sleeper's own thread still answers, so its last place is known."""
    world = tiny_run.world(tmp_path / "world")
    plain = tiny_run.settings(world, {"name": "bpt"}, distribution={"step_timeout": 2})
    config = tiny_run.load(tmp_path, plain)
    began = time.monotonic()
    codes = ranks.launch(lambda: run_all(config), 2, BPT_FAULT="step.before_forward,step=2,rank=1,stage=source,sleep:60")
    assert codes == [69, 69]
    assert (
        time.monotonic() - began < 45
    )  # the time-out of 2 s, the naming, and the start on a busy machine; not the 60 s of the sleeper
    status = read_json(config.directory / "status.json")
    assert status["state"] == "failed"
    assert "is furthest behind, at 'source step 2'" in status["reason"]
    assert status["reason"].startswith("rank 1 on ")
    assert ranks.launch(lambda: run_all(config), 2) == [0, 0]


def test_a_killed_rank_ends_the_others_in_time_also_one_that_waits_for_nobody(tmp_path: Path) -> None:
    """Rank 1 is killed while rank 2 computes: rank 0 notices in its collective, rank 2 is told by its own thread."""
    world = tiny_run.world(tmp_path / "world")
    config = tiny_run.load(tmp_path, tiny_run.settings(world, {"name": "bpt"}))
    fault = "step.before_forward,step=2,rank=2,stage=source,sleep:100;step.before_forward,step=2,rank=1,stage=source,kill"
    ended: dict[int, float] = {}
    codes = ranks.launch(lambda: run_all(config), 3, ended=ended, BPT_FAULT=fault)
    assert codes == [69, -signal.SIGKILL, 69]
    assert max(ended.values()) - ended[1] < 10
    status = read_json(config.directory / "status.json")
    assert status["state"] == "failed"
    assert status["reason"].startswith("rank 1 on ")
    said = (config.directory / "logs" / "rank-2.stuck").read_text()
    assert "rank 1 on " in said.splitlines()[0]
    assert ranks.launch(lambda: run_all(config), 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "place", ["ckpt.before_rename,step=2,rank=0,hit=1", "results.before_write,rank=0", "posterior.before_write"]
)
def test_rank_0_may_write_longer_than_a_step_may_take(place: str, tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path / "world")
    plain = tiny_run.settings(world, {"name": "bpt"}, distribution={"step_timeout": 2, "storage_timeout": 60})
    config = tiny_run.load(tmp_path, plain)
    assert ranks.launch(lambda: run_all(config), 2, BPT_FAULT=f"{place},sleep:14") == [0, 0]  # 2 s and 8 s to name who is missing


def test_a_rank_0_that_was_stopped_while_it_writes_is_noticed_within_the_limit_of_a_step(tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path / "world")
    plain = tiny_run.settings(world, {"name": "bpt"}, distribution={"step_timeout": 3})
    config = tiny_run.load(tmp_path, plain)
    ended: dict[int, float] = {}
    fault = "ckpt.before_rename,step=2,rank=0,stop"
    codes = ranks.launch(lambda: run_all(config), 2, ended=ended, kill_stopped=True, BPT_FAULT=fault)
    assert codes == [-signal.SIGKILL, 69]
    assert ended[1] - ended[0] < 3 + 20  # on a busy machine


def test_five_hundred_healthy_steps_raise_no_alarm_and_a_slow_rank_is_named_within_25() -> None:
    """F9. Times as a busy machine gives them: a fifth of noise, and every tenth step of some rank three times as long."""
    alarm, noise = StragglerAlarm(HOSTS), random.Random(3)

    def healthy() -> list[float]:
        return [0.1 * noise.uniform(0.9, 1.1) * (3 if noise.random() < 0.1 else 1) for _ in HOSTS]

    assert not any(alarm.observe(healthy()) for _ in range(500))
    said = [alarm.observe([a, 4 * b, c]) for a, b, c in (healthy() for _ in range(25))]
    (message,) = [text for text in said if text]  # once, not in every step
    assert message.startswith("rank 1 on east works ")
    assert 3 < float(message.split(" works ")[1].split(" times")[0]) < 5


def test_one_process_has_no_stragglers() -> None:
    alarm = StragglerAlarm(("here",))
    assert not any(alarm.observe([float(step)]) for step in range(100))


@pytest.mark.parametrize("slow", [0, 2])
def test_the_alarm_waits_for_a_whole_window(slow: int) -> None:
    alarm = StragglerAlarm(HOSTS, window=15, lasting=8)
    seconds = [1.0 if rank == slow else 0.1 for rank in range(3)]
    assert [bool(alarm.observe(seconds)) for _ in range(23)] == [False] * 21 + [True, False]


def test_ranks_without_texts_are_no_measure_for_the_others() -> None:
    """Two of three ranks are idle: the third works, and nobody waits for it without need."""
    alarm = StragglerAlarm(HOSTS, window=3, lasting=2)
    assert [alarm.observe([0.4, 0.0, 0.0]) for _ in range(30)] == [None] * 30
    alarm = StragglerAlarm(("a", "b", "c", "d"), window=3, lasting=2)
    assert any("rank 2 on c works 4.0 times" in (alarm.observe([0.1, 0.0, 0.4, 0.0]) or "") for _ in range(30))
