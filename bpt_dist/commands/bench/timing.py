"""Clocks, and rounds of variants that alternate in one process so that they can be compared round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one run; `seconds` is the one that ratios are made of."""

    seconds: float
    cpu: float
    wall: float


class Spread(NamedTuple):
    """Median, least and greatest of several values."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write a ratio with its range."""
        return f"{self.median:.2f} [{self.low:.2f}..{self.high:.2f}]"

    def to_json(self) -> dict[str, float]:
        """Return the three under their names."""
        return {name: round(value, 5) for name, value in self._asdict().items()}


def spread(values: Sequence[float]) -> Spread:
    """Return median and range."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Clock:
    """The measure of time: GPU events, CPU time of this process, or wall time with several (actively waiting) threads."""

    device: torch.device
    num_threads: int = 1

    @property
    def kind(self) -> str:
        """Describe what `Timing.seconds` counts."""
        if self.device.type == "cuda":
            return "time between CUDA events"
        return "CPU time of the process" if self.num_threads == 1 else f"wall time of {self.num_threads} threads"

    def use_threads(self) -> None:
        """Let torch compute with all threads from now on. Fork before this call."""
        torch.set_num_threads(self.num_threads)

    def time(self, run: Callable[[], Any]) -> Timing:
        """Run once and return how long it took."""
        if self.device.type == "cuda":
            return _cuda_time(run)
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Timing(cpu if self.num_threads == 1 else wall, cpu, wall)


def _cuda_time(run: Callable[[], Any]) -> Timing:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Timing(start.elapsed_time(end) / 1000, cpu, wall)


def alternate(
    variants: Mapping[str, Callable[[], Any]],
    clock: Clock,
    repeats: int,
    *,
    limit_seconds: float | None = None,
    at_least: int = 2,
    tell: Callable[[str], None] = lambda _text: None,
) -> dict[str, list[Timing]]:
    """Run every variant once a round, in alternating order (A B, B A, ...), and return the times of each by round.

    No round begins after `limit_seconds` of wall time once there are `at_least` rounds. The caller warms up: it runs each
    variant beforehand to check its result.
    """
    times: dict[str, list[Timing]] = {name: [] for name in variants}
    started, longest = time.perf_counter(), 0.0
    for number in range(repeats):
        elapsed = time.perf_counter() - started
        if limit_seconds is not None and number >= at_least and elapsed + longest > limit_seconds:
            break
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            tell(f"round {number + 1} of {repeats}: {name}")
            times[name].append(clock.time(variants[name]))
        longest = max(longest, time.perf_counter() - started - elapsed)
    return times


def speedup(opponent: Sequence[Timing], ours: Sequence[Timing]) -> Spread:
    """Return the opponent's time over ours, paired by rounds: above 1 ours is faster."""
    return spread([theirs.seconds / mine.seconds for theirs, mine in zip(opponent, ours, strict=True)])
