"""Continuous batching: rows of all requests wait in one queue, and the one thread that computes takes what fits into a pass.

A pass begins when the oldest row has waited for the time budget or the waiting rows fill the token budget. What arrives during a
pass joins the next one, so under load no time is spent waiting.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from bpt_dist.artifacts.inference.predictor import Answer, Predictor, Question

log = logging.getLogger(__name__)
WEIGHT = 0.1  # of the newest pass in the mean rate
LONGEST_RETRY = 60.0


class Full(Exception):
    """There is no room for more rows; `retry_seconds` is when there should be."""

    def __init__(self, retry_seconds: float) -> None:
        super().__init__()
        self.retry_seconds = retry_seconds


class Closed(Exception):
    """Nothing is accepted any more: the server stops, or the computing thread has died."""


class Observer(Protocol):
    """What is told about every pass."""

    def passed(self, rows: int, tokens: int, seconds: float) -> None:
        """Take note of a pass."""


@dataclass(eq=False)
class _Job:
    """The rows of one request, and their answers so far."""

    rows: Sequence[Any]
    future: Future[list[Answer]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    answers: dict[int, Answer] = field(default_factory=dict)

    def settle(self, place: int, answer: Answer) -> None:
        """Record an answer; the last one ends the request."""
        self.answers[place] = answer
        if len(self.answers) == len(self.rows) and self.future.set_running_or_notify_cancel():
            self.future.set_result([self.answers[place] for place in range(len(self.rows))])


@dataclass(eq=False)
class _Errand:
    """Something else that the computing thread does between two passes."""

    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A row that waits for its pass."""

    job: _Job
    place: int
    question: Question


class Batcher:
    """Answers the rows of many requests on one thread.

    `wait_seconds` is the time budget of the oldest row, `tokens` what one pass reads at most, `most_waiting` how many rows wait.
    """

    def __init__(
        self, predictor: Predictor, *, wait_seconds: float, tokens: int, most_waiting: int, observer: Observer | None = None
    ) -> None:
        self.predictor, self.wait_seconds, self.tokens, self.most_waiting = predictor, wait_seconds, tokens, most_waiting
        self.num_waiting = 0  # rows that have no answer yet
        self._observer = observer
        self._seconds_a_row = 0.0
        self._changed = threading.Condition()
        self._incoming: deque[_Job | _Errand] = deque()
        self._pool: deque[_Waiting] = deque()  # of the computing thread alone
        self._open: set[Future[Any]] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="passes", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether rows are still answered."""
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Any]) -> Future[list[Answer]]:
        """Queue the rows of a request; cancelling the result leaves out those that still wait. Raises Full or Closed."""
        job = _Job(rows)
        with self._changed:
            self._refuse_if_closed()
            if self.num_waiting + len(rows) > self.most_waiting:
                raise Full(min(max(1.0, math.ceil(self.num_waiting * self._seconds_a_row)), LONGEST_RETRY))
            self.num_waiting += len(rows)
            self._queue(job)
        return job.future

    def call(self, run: Callable[[], Any]) -> Future[Any]:
        """Let the computing thread do something between two passes. Raises Closed."""
        errand = _Errand(run)
        with self._changed:
            self._refuse_if_closed()
            self._queue(errand)
        return errand.future

    def close(self) -> None:
        """Accept nothing more, answer what was accepted, and return when that is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _queue(self, one: _Job | _Errand) -> None:
        self._open.add(one.future)
        one.future.add_done_callback(self._open.discard)
        self._incoming.append(one)
        self._changed.notify()

    def _refuse_if_closed(self) -> None:
        if self._closing or not self.is_alive:
            raise Closed

    # --- the computing thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._gather()
                self._pass()
        finally:  # at the end nothing is left; after an error of ours nobody may wait for ever
            with self._changed:
                self._closing = True
                left = list(self._open)
            for future in left:
                if not future.done():
                    future.set_exception(Closed())

    def _wait_for_work(self) -> bool:
        """Return whether there is something to do, once that is known; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._incoming or self._pool or self._closing)
            return bool(self._incoming or self._pool)

    def _gather(self) -> None:
        """Take in what has arrived, and wait for more while the budgets of time and tokens allow."""
        cost = sum(item.question.cost for item in self._pool)
        while True:
            with self._changed:
                arrived, self._incoming = self._incoming, deque()
            for one in arrived:
                cost += self._admit(one)
            rest = self._pool[0].job.arrived + self.wait_seconds - time.monotonic() if self._pool else 0.0
            if rest <= 0 or cost >= self.tokens:
                return
            with self._changed:
                if not self._changed.wait_for(lambda: self._incoming or self._closing, rest) or not self._incoming:
                    return

    def _admit(self, one: _Job | _Errand) -> int:
        """Read the rows of a request, or do an errand; return the tokens that now wait for a pass as well."""
        if isinstance(one, _Errand):
            _do(one)
            return 0
        if one.future.cancelled():
            self._forget(len(one.rows))
            return 0
        cost = 0
        for place, found in enumerate(self._read(one.rows)):
            if isinstance(found, Question):
                self._pool.append(_Waiting(one, place, found))
                cost += found.cost
            else:
                self._settle(one, place, found)
        return cost

    def _read(self, rows: Sequence[Any]) -> list[Question | Answer]:
        """Return what is asked; a row that breaks the reader has no neighbours."""
        try:
            return self.predictor.read(rows)
        except Exception as error:
            if len(rows) > 1:
                return [found for row in rows for found in self._read([row])]
            return [_internal(error)]

    def _pass(self) -> None:
        """Answer the oldest rows that fit into the token budget."""
        items: list[_Waiting] = []
        cost = 0
        while self._pool and (not items or cost + self._pool[0].question.cost <= self.tokens):
            item = self._pool.popleft()
            if item.job.future.cancelled():  # the client is gone
                self._forget(1)
                continue
            items.append(item)
            cost += item.question.cost
        if items:
            self._answer(items)

    def _answer(self, items: Sequence[_Waiting]) -> None:
        """Answer rows together; where a pass fails they are halved until the row that breaks it is alone."""
        left = dict(enumerate(items))
        failure: Exception | None = None
        try:
            began = time.monotonic()
            for found in self.predictor.passes([replace(item.question, place=place) for place, item in left.items()]):
                seconds = time.monotonic() - began
                self._note(sum(left[place].question.cost for place in found), len(found), seconds)
                for place, answer in found.items():
                    item = left.pop(place)
                    self._settle(item.job, item.place, answer)
                began = time.monotonic()
        except Exception as error:
            failure = error
        if failure is None:
            return
        rest = list(left.values())
        if len(rest) == 1:
            self._settle(rest[0].job, rest[0].place, _internal(failure, rest[0].question))
            return
        for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            self._answer(half)

    def _settle(self, job: _Job, place: int, answer: Answer) -> None:
        self._forget(1)
        job.settle(place, answer)

    def _forget(self, num_rows: int) -> None:
        with self._changed:
            self.num_waiting -= num_rows

    def _note(self, tokens: int, num_rows: int, seconds: float) -> None:
        mean = self._seconds_a_row
        self._seconds_a_row = seconds / num_rows if mean == 0 else mean + WEIGHT * (seconds / num_rows - mean)
        if self._observer is not None:
            self._observer.passed(num_rows, tokens, seconds)


def _do(errand: _Errand) -> None:
    if not errand.future.set_running_or_notify_cancel():
        return
    try:
        errand.future.set_result(errand.run())
    except Exception as error:
        errand.future.set_exception(error)


def _internal(error: Exception, question: Question | None = None) -> Answer:
    """Return the answer to a row that broke something of ours; the log has the rest."""
    log.error("a row could not be answered", exc_info=error)
    known = {} if question is None else {"task": question.prompt.export.name, "id": question.id}
    message = f"the row could not be answered ({type(error).__name__}); report it with the log of the server"
    return Answer(kind="internal", error=message, **known)
