"""Who is gone: when a collective fails, the ranks that still answer find out which one does not.

A failed collective names nothing, or the neighbour that left because somebody else did. So the first rank to fail calls a roll in
the job's key-value store; a thread of every other rank answers, also while its main thread waits in a collective. Who does not
answer was killed, stopped or cut off. If all answer, the one that made the fewest collective calls is the one the others wait for.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

POLL_SECONDS = 0.25
ANSWER_SECONDS = 0.9
STORE_SECONDS = 0.5
NOTICEABLE_SECONDS = 0.02  # steps of a few milliseconds vary that much by themselves
CALLED, VERDICT = "roll/called", "roll/verdict"


class Verdict(NamedTuple):
    """Who is missing, as half a sentence, and the rank that says so to the user (None: each host for itself)."""

    text: str
    spokesman: int | None


class RollCall:
    """Answers for this rank until `close`; `progress` returns (collective calls made, where the main thread is)."""

    def __init__(self, store: Any, rank: int, hosts: Sequence[str], progress: Callable[[], tuple[int, str]]) -> None:
        # A client of its own: a blocking request of the main thread would hold up the answer.
        self._store, self.rank, self.hosts, self.progress = store.clone(), rank, tuple(hosts), progress
        self._closed, self._answered = threading.Event(), threading.Lock()
        self._heard: Verdict | None = None
        self._thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._closed.set()
        self._thread.join(timeout=2 * POLL_SECONDS)

    def say_last(self, words: str) -> None:
        """Leave word of why this rank ends by itself; at most a second, whatever is broken."""
        thread = threading.Thread(target=self._leave_word, args=(words,), daemon=True)
        thread.start()
        thread.join(1.0)

    def verdict(self) -> Verdict:
        """Call the roll and return who is missing, the same on every rank that asks; a few seconds, whatever is broken."""
        found: list[Verdict] = []
        # In a thread: a request to a store behind a cut cable waits for the system's own limit, which is minutes.
        thread = threading.Thread(target=lambda: found.append(self._ask()), daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS + STORE_SECONDS)
        return found[0] if found else self._heard or self._without_store()

    def _ask(self) -> Verdict:
        try:
            self._store.set(CALLED, b"1")
            self._answer()
            deadline = time.monotonic() + ANSWER_SECONDS
            ranks = range(len(self.hosts))
            while time.monotonic() < deadline and not self._store.check([VERDICT]) and not all(map(self._heard_of, ranks)):
                time.sleep(POLL_SECONDS / 5)
            words = {rank: self._store.get(f"last/{rank}").decode() for rank in ranks if self._store.check([f"last/{rank}"])}
            present = {rank: json.loads(self._store.get(f"roll/{rank}")) for rank in ranks if self._store.check([f"roll/{rank}"])}
            own = Verdict(self._judge(present, words), min(set(present) - set(words), default=self.rank))
            return Verdict(*json.loads(self._store.compare_set(VERDICT, "", json.dumps(own))))
        except RuntimeError:
            return self._heard or self._without_store()

    def _heard_of(self, rank: int) -> bool:
        return self._store.check([f"roll/{rank}"]) or self._store.check([f"last/{rank}"])

    def _judge(self, present: dict[int, tuple[int, str]], words: dict[int, str]) -> str:
        if words:
            return "; ".join(f"{self._name(rank)} ended: {text}" for rank, text in words.items())
        absent = [self._name(rank) for rank in range(len(self.hosts)) if rank not in present]
        if absent:
            return f"{', '.join(absent)} {'does' if len(absent) == 1 else 'do'} not answer"
        slowest = min(present, key=lambda rank: present[rank][0])
        return f"{self._name(slowest)} is furthest behind, at {present[slowest][1]!r}"

    def _without_store(self) -> Verdict:
        return Verdict(f"{self._name(0)}, which keeps the job's store, does not answer", None)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _answer(self) -> None:
        if self._answered.acquire(blocking=False):
            self._store.set(f"roll/{self.rank}", json.dumps(self.progress()).encode())

    def _leave_word(self, words: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"last/{self.rank}", words[:1000].encode())

    def _watch(self) -> None:
        try:
            while not self._closed.wait(POLL_SECONDS):
                if self._heard is None and self._store.check(["last/0"]):  # rank 0 takes the store with it
                    self._heard = Verdict(self._judge({}, {0: self._store.get("last/0").decode()}), 0)
                if self._store.check([CALLED]):
                    self._answer()
                    if self._store.check([VERDICT]):
                        self._heard = Verdict(*json.loads(self._store.get(VERDICT)))
                        return
        except RuntimeError:
            return  # the store is gone with its rank; the main thread finds out in its next collective


class StragglerAlarm:
    """Notices a rank whose own work takes `factor` times as long as the others' over `window` steps, `lasting` steps in a row."""

    def __init__(self, hosts: Sequence[str], window: int = 15, factor: float = 2.0, lasting: int = 8) -> None:
        self.hosts, self.window, self.factor, self.lasting = tuple(hosts), window, factor, lasting
        self._slow_steps = 0
        self._seconds: list[Sequence[float]] = []
        self._silent_until = 0
        self._step = 0

    def observe(self, seconds: Sequence[float]) -> str | None:
        """Take the seconds each rank worked in a step; return the alarm when a window ends with a slow rank.

        Medians, so that single pauses (a checkpoint, a page fault) do not count. Said once every ten windows.
        """
        self._step += 1
        self._seconds = [*self._seconds[-self.window + 1 :], seconds]
        if len(seconds) == 1 or len(self._seconds) < self.window or self._step < self._silent_until:
            return None
        own = [_median([step[rank] for step in self._seconds]) for rank in range(len(seconds))]
        slowest = max(range(len(own)), key=own.__getitem__)
        others = _median([value for rank, value in enumerate(own) if rank != slowest])
        # A busy machine makes a rank slow for a moment; what lasts is worth a word.
        is_slow = own[slowest] >= self.factor * others and own[slowest] - others >= NOTICEABLE_SECONDS
        self._slow_steps = self._slow_steps + 1 if is_slow else 0
        if self._slow_steps < self.lasting:
            return None
        self._silent_until = self._step + 10 * self.window
        return (
            f"rank {slowest} on {self.hosts[slowest]} works {own[slowest] / max(others, 1e-9):.1f} times as long as the others "
            f"({own[slowest]:.3f} s a step against {others:.3f} s); all ranks wait for it"
        )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
