"""Find the rank that is missing after a failed collective.

A failed collective names no rank, or a neighbour that exited because another rank did. So the first rank to fail asks for answers
in the job's key-value store; a thread of every other rank answers, also while its main thread waits in a collective. A rank that
does not answer was killed, stopped or cut off. If all answer, the others wait for the rank with the fewest collective calls.

The same thread notices a rank of its host that ended and a store that is silent, and asks by itself. The watchdog then ends this
process, for the main thread may be in a kernel of a GPU that waits without limit.

All ranks may ask at once, so one of them collects: all answers are one list in the store, read by that rank alone. While nothing is
wrong a look into the store is one request.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

from bpt_dist.distributed.liveness import Neighbours, RankProcess

POLL_SECONDS = 0.25
ANSWER_SECONDS = 0.7
STORE_SECONDS = 0.5
NOTICEABLE_SECONDS = 0.02  # steps of a few milliseconds vary that much by themselves
COLLECTED_SECONDS = 0.2  # after ANSWER_SECONDS: then the rank that collects the answers is gone, too
NEWS, ASKED, DIAGNOSIS, COLLECTOR = "failure/news", "failure/asked", "failure/diagnosis", "failure/collector"
ANSWERS = "failure/answers"  # a line of JSON each: [rank, calls, place], or [rank, words] of a rank that ended
REASON_0, BEAT = "failure/reason-0", "failure/beat"


class Diagnosis(NamedTuple):
    """A clause naming the missing rank, and the rank that reports it to the user (None: one per host)."""

    text: str
    reporting_rank: int | None


class FailureDetector:
    """Answers for this rank until `close`; `progress` returns (number of collective calls, place of the main thread).

    `processes` are those of all ranks. While `patient` is set, rank 0 works and the others wait for it: it shows with a beat that
    it is there, and they look for the beat.
    """

    def __init__(self, store: Any, rank: int, processes: Sequence[RankProcess], progress: Callable[[], tuple[int, str]]) -> None:
        # A client of its own: a blocking request of the main thread would hold up the answer.
        self._store, self.rank, self.progress = store.clone(), rank, progress
        self.hosts = tuple(process.host for process in processes)
        self.patient = False
        self._neighbours = Neighbours(processes, rank)
        self._closed, self._answered = threading.Event(), threading.Lock()
        self._heard: Diagnosis | None = None
        self._heard_at = self._last_sign = time.monotonic()
        self._beat = 0
        self._thread = threading.Thread(target=self._watch, name="failure detector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        self._thread.join(timeout=2 * POLL_SECONDS)
        if not self._thread.is_alive():
            self._neighbours.close()

    def heard(self, for_seconds: float) -> Diagnosis | None:
        """Return which rank is missing, once that is known for so long: the main thread had time to find out by itself."""
        return self._heard if self._heard is not None and time.monotonic() - self._heard_at >= for_seconds else None

    def silence(self) -> float:
        """Return the seconds since the job's store, and a rank 0 that the others wait for, last gave a sign of life."""
        return 0.0 if self._closed.is_set() else time.monotonic() - self._last_sign

    def reports(self, reporting_rank: int | None) -> bool:
        """Return whether this rank tells the user; where None does, the first of each host but for rank 0."""
        if reporting_rank is not None or self.rank == 0:
            return self.rank == (reporting_rank or 0)
        return self.rank == next(rank for rank, host in enumerate(self.hosts) if rank and host == self.hosts[self.rank])

    def report_exit(self, words: str) -> None:
        """Tell the other ranks why this one exits; takes a second at most, whatever is broken."""
        thread = threading.Thread(target=self._send_reason, args=(words,), daemon=True)
        thread.start()
        thread.join(1.0)

    def diagnose(self) -> Diagnosis:
        """Return which rank is missing, the same on every rank that asks; takes a few seconds, whatever is broken."""
        answers: list[Diagnosis] = []
        # In a thread: a request to a store behind a cut cable waits for the system's own limit, which is minutes.
        thread = threading.Thread(target=lambda: answers.append(self._ask()), daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS + COLLECTED_SECONDS + STORE_SECONDS)
        return answers[0] if answers else self._heard or self._without_store()

    def _ask(self) -> Diagnosis:
        try:
            self._store.set(ASKED, b"1")
            self._store.set(NEWS, b"1")
            self._answer()
            collects = self._store.compare_set(COLLECTOR, "", str(self.rank)).decode() == str(self.rank)
            deadline = time.monotonic() + ANSWER_SECONDS + (0.0 if collects else COLLECTED_SECONDS)
            while time.monotonic() < deadline and not self._store.check([DIAGNOSIS]):
                if collects and len(set().union(*self._answers())) == len(self.hosts):
                    break
                time.sleep(POLL_SECONDS / 5)
            if (stored := self._stored(DIAGNOSIS)) is not None:
                return Diagnosis(*json.loads(stored))
            present, words = self._answers()
            own = Diagnosis(self._diagnose(present, words), min(set(present) - set(words), default=self.rank))
            return Diagnosis(*json.loads(self._store.compare_set(DIAGNOSIS, "", json.dumps(own))))
        except RuntimeError:
            return self._heard or self._without_store()

    def _stored(self, key: str) -> bytes | None:
        value: bytes | None = self._store.get(key) if self._store.check([key]) else None
        return value

    def _answers(self) -> tuple[dict[int, tuple[int, str]], dict[int, str]]:
        """Return (calls, place) of the ranks that answered, and the words of those that ended; one request, or two."""
        present: dict[int, tuple[int, str]] = {}
        words: dict[int, str] = {}
        for rank, *answer in map(json.loads, (self._stored(ANSWERS) or b"").splitlines()):
            if len(answer) == 1:
                words[rank] = answer[0]
            else:
                present[rank] = (answer[0], answer[1])
        return present, dict(sorted(words.items()))

    def _diagnose(self, present: dict[int, tuple[int, str]], words: dict[int, str]) -> str:
        if words:
            return "; ".join(f"{self._name(rank)} ended: {text}" for rank, text in words.items())
        absent = [self._name(rank) for rank in range(len(self.hosts)) if rank not in present]
        if absent:
            return f"{', '.join(absent)} {'does' if len(absent) == 1 else 'do'} not answer"
        slowest = min(present, key=lambda rank: present[rank][0])
        return f"{self._name(slowest)} is furthest behind, at {present[slowest][1]!r}"

    def _without_store(self) -> Diagnosis:
        return Diagnosis(f"{self._name(0)}, which keeps the job's store, does not answer", None)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _answer(self) -> None:
        if self._answered.acquire(blocking=False):
            self._store.append(ANSWERS, json.dumps([self.rank, *self.progress()]) + "\n")

    def _send_reason(self, words: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.append(ANSWERS, json.dumps([self.rank, words[:1000]]) + "\n")
            if self.rank == 0:  # it takes the store with it: nobody will be able to ask
                self._store.set(REASON_0, words[:1000].encode())
                self._store.set(NEWS, b"1")

    def _watch(self) -> None:
        try:
            while not self._closed.wait(POLL_SECONDS):
                has_news = self._store.check([NEWS])
                if has_news and self._heard is None and (reason := self._stored(REASON_0)) is not None:
                    self._hear(Diagnosis(self._diagnose({}, {0: reason.decode()}), 0))
                if self._neighbours.ended():
                    self._hear(self._ask())
                    return
                if has_news and self._store.check([ASKED]):
                    self._answer()
                    if (diagnosis := self._stored(DIAGNOSIS)) is not None:
                        self._hear(Diagnosis(*json.loads(diagnosis)))
                        return
                self._exchange_beats()
        except RuntimeError:
            self._hear(self._heard or self._without_store())

    def _hear(self, diagnosis: Diagnosis) -> None:
        if self._heard is None:
            self._heard_at = time.monotonic()
        self._heard = diagnosis

    def _exchange_beats(self) -> None:
        """Show or see that rank 0 is there; outside of `patient` it is enough that the store answers."""
        if not self.patient or self.rank == 0:
            if self.patient:
                self._beat += 1
                self._store.set(BEAT, str(self._beat))
            self._last_sign = time.monotonic()
            return
        beat = int(self._stored(BEAT) or 0)
        if beat != self._beat:
            self._beat, self._last_sign = beat, time.monotonic()


class StragglerAlarm:
    """Notices a rank whose own work takes `factor` times as long as the others' over `window` steps, `lasting` steps in a row."""

    def __init__(self, hosts: Sequence[str], window: int = 15, factor: float = 2.0, lasting: int = 8) -> None:
        self.hosts, self.window, self.factor, self.lasting = tuple(hosts), window, factor, lasting
        self._slow_steps = 0
        self._seconds: list[Sequence[float]] = []
        self._silent_until = 0
        self._step = 0

    def observe(self, seconds: Sequence[float]) -> str | None:
        """Take the seconds each rank worked in a step (0: it had no texts); return the alarm when a window ends with a slow rank.

        Medians, so that single pauses (a checkpoint, a page fault) do not count. Said once every ten windows.
        """
        self._step += 1
        self._seconds = [*self._seconds[-self.window + 1 :], seconds]
        if len(seconds) == 1 or len(self._seconds) < self.window or self._step < self._silent_until:
            return None
        own = numpy.median(self._seconds, axis=0).tolist()
        busy = [rank for rank, value in enumerate(own) if value]  # a rank without texts is no measure for the others
        slowest = max(busy, key=own.__getitem__, default=0)
        others = [own[rank] for rank in busy if rank != slowest]
        if not others:
            return None
        usual = float(numpy.median(others))
        # A busy machine makes a rank slow for a moment; only what lasts is reported.
        is_slow = own[slowest] >= self.factor * usual and own[slowest] - usual >= NOTICEABLE_SECONDS
        self._slow_steps = self._slow_steps + 1 if is_slow else 0
        if self._slow_steps < self.lasting:
            return None
        self._silent_until = self._step + 10 * self.window
        return (
            f"rank {slowest} on {self.hosts[slowest]} works {own[slowest] / usual:.1f} times as long as the others "
            f"({own[slowest]:.3f} s a step against {usual:.3f} s); all ranks wait for it"
        )
