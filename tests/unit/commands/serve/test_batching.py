"""The queue in front of the passes: what shares a pass, who waits how long, and that no row costs another one its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpt_dist.artifacts.inference.predictor import Answer, Question
from bpt_dist.commands.serve.batching import Batcher, Closed, Full

PROMPT: Any = SimpleNamespace(hypotheses=torch.zeros(1, 2, 4), export=SimpleNamespace(name="task"))


class Passes:
    """A predictor whose rows are numbers: each costs itself in tokens; passes wait for the gate, and 13 breaks one."""

    def __init__(self, *, shut: bool = False) -> None:
        self.seen: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        if not shut:
            self.gate.set()

    def read(self, rows: Sequence[Any]) -> list[Question | Answer]:
        if 17 in rows:
            raise ValueError("17 cannot be read")
        return [
            Answer(kind="row", error="bad") if row == "bad" else Question(place, PROMPT, row - 2, [row] * (row - 2), row)
            for place, row in enumerate(rows)
        ]

    def passes(self, questions: Sequence[Question]) -> Iterator[dict[int, Answer]]:
        self.threads.add(threading.get_ident())
        self.begun.release()
        assert self.gate.wait(60)
        rows = [question.id for question in questions]
        self.seen.append(rows)
        if 13 in rows:
            raise RuntimeError("13 breaks a pass")
        yield {question.place: Answer(prediction=str(question.id)) for question in questions}


def batcher(passes: Passes, **more: Any) -> Batcher:
    given = {"wait_seconds": 0.0, "tokens": 100, "most_waiting": 20, **more}
    return Batcher(passes, **given)  # type: ignore[arg-type]


def words(answers: list[Answer]) -> list[str | None]:
    return [answer.prediction or answer.kind for answer in answers]


def test_what_arrives_during_a_pass_shares_the_next_one() -> None:
    passes = Passes(shut=True)
    own = batcher(passes)
    first = own.submit([10])
    assert passes.begun.acquire(timeout=60)
    others = [own.submit([20, 21]), own.submit(["bad", 22])]
    passes.gate.set()
    assert words(first.result(60)) == ["10"]
    assert [words(other.result(60)) for other in others] == [["20", "21"], ["row", "22"]]
    assert passes.seen == [[10], [20, 21, 22]]
    own.close()
    assert own.num_waiting == 0


def test_a_pass_takes_the_oldest_rows_within_its_tokens() -> None:
    passes = Passes(shut=True)
    own = batcher(passes)
    first = own.submit([10])
    assert passes.begun.acquire(timeout=60)
    others = [own.submit([60, 30]), own.submit([20, 5]), own.submit([250]), own.submit([6])]
    passes.gate.set()
    for other in (first, *others):
        other.result(60)
    assert passes.seen == [[10], [60, 30], [20, 5], [250], [6]]
    own.close()


def test_the_oldest_row_waits_for_the_time_budget_only() -> None:
    passes = Passes()
    own = batcher(passes, wait_seconds=0.4)
    began = time.monotonic()
    first, second = own.submit([10]), own.submit([11])
    assert words(first.result(60) + second.result(60)) == ["10", "11"]
    assert time.monotonic() - began >= 0.4
    assert passes.seen == [[10, 11]]
    own.close()


def test_a_full_pass_does_not_wait() -> None:
    own = batcher(Passes(), wait_seconds=3600)
    assert words(own.submit([60, 40]).result(60)) == ["60", "40"]
    own.close()


def test_more_rows_than_may_wait_are_refused_until_there_is_room() -> None:
    passes = Passes(shut=True)
    own = batcher(passes)
    accepted = own.submit([3] * 20)
    with pytest.raises(Full) as refused:
        own.submit([3])
    assert 1 <= refused.value.retry_seconds <= 60
    passes.gate.set()
    accepted.result(60)
    assert words(own.submit([4]).result(60)) == ["4"]
    own.close()


def test_rows_of_a_client_that_is_gone_are_left_out() -> None:
    passes = Passes(shut=True)
    own = batcher(passes)
    first = own.submit([10])
    assert passes.begun.acquire(timeout=60)
    gone, stays = own.submit([20, 21]), own.submit([22])
    assert gone.cancel()
    passes.gate.set()
    assert words(stays.result(60)) == ["22"]
    first.result(60)
    own.close()
    assert passes.seen == [[10], [22]]
    assert own.num_waiting == 0


def test_a_row_that_breaks_a_pass_costs_no_neighbour_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    passes = Passes()
    own = batcher(passes)
    (answers, others) = (own.submit([10, 11, 13, 12]).result(60), own.submit([14, 17, 15]).result(60))
    assert words(answers) == ["10", "11", "internal", "12"]
    assert words(others) == ["14", "internal", "15"]
    assert answers[2].error == "the row could not be answered (RuntimeError); report it with the log of the server"
    assert (answers[2].id, answers[2].task) == (13, "task")
    assert caplog.text.count("a row could not be answered") == 2
    own.close()


def test_closing_answers_what_was_accepted_and_nothing_more() -> None:
    passes = Passes(shut=True)
    own = batcher(passes, wait_seconds=3600)
    accepted = [own.submit([10 + place]) for place in range(3)]
    closing = threading.Thread(target=own.close)
    closing.start()
    assert passes.begun.acquire(timeout=60)
    with pytest.raises(Closed):
        own.submit([9])
    with pytest.raises(Closed):
        own.call(int)
    passes.gate.set()
    closing.join(60)
    assert [words(one.result(0)) for one in accepted] == [[str(10 + place)] for place in range(3)]
    assert not own.is_alive


def test_errands_are_done_by_the_thread_of_the_passes() -> None:
    passes = Passes()
    own = batcher(passes)
    own.submit([10]).result(60)
    assert {own.call(threading.get_ident).result(60)} == passes.threads
    with pytest.raises(ZeroDivisionError):
        own.call(lambda: 1 // 0).result(60)
    assert own.is_alive
    own.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_died() -> None:
    class Dying(Passes):
        def passes(self, questions: Sequence[Question]) -> Iterator[dict[int, Answer]]:
            raise SystemExit

    own = batcher(Dying(), tokens=10)
    in_pass, waiting = own.submit([10]), None
    with pytest.raises(Closed):
        waiting = own.submit([10])
        waiting.result(60)
    with pytest.raises(Closed):
        in_pass.result(60)
    own._thread.join(60)
    assert not own.is_alive
