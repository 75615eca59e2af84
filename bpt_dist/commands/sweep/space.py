"""A search space: which keys of a configuration take which values. Pure functions from the YAML mapping to lists of settings.

space:
  method.sigma_relative: [0.1, 1, 10]                        # choices
  target.lr: {log_uniform: [0.01, 1], points: 4}             # a range; `points` makes it a grid
  method.rank: {integer: [1, 8]}
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bpt_dist.config.base import did_you_mean

RANGES = ("uniform", "log_uniform", "integer")
BOUNDS = 2
Value = float | int | str | bool | None
Values = dict[str, Value]


@dataclass(frozen=True)
class Choices:
    """A key that takes one of some values."""

    values: tuple[Value, ...]

    def grid(self) -> tuple[Value, ...]:
        """Return all values."""
        return self.values

    def draw(self, source: random.Random) -> Value:
        """Return one of the values."""
        return source.choice(self.values)


@dataclass(frozen=True)
class Range:
    """A key that takes values between two bounds; `points` of them make a grid."""

    kind: str
    low: float
    high: float
    points: int | None = None

    def grid(self) -> tuple[Value, ...]:
        """Return `points` values from bound to bound, evenly spaced (`log_uniform`: by equal factors)."""
        assert self.points is not None
        steps = [place / (self.points - 1) for place in range(self.points)]
        return tuple(dict.fromkeys(self._at(step) for step in steps))

    def draw(self, source: random.Random) -> Value:
        """Return a value between the bounds, by the density that the range is named after."""
        if self.kind == "integer":
            return source.randint(int(self.low), int(self.high))
        return self._at(source.random())

    def _at(self, share: float) -> Value:
        if self.kind == "log_uniform":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        # Six digits are more than any of these settings can feel, and can be read and typed.
        return round(value) if self.kind == "integer" else float(f"{value:.6g}")


Entry = Choices | Range


def parse(written: Any) -> Entry:
    """Return the entry that a value of `space` describes.

    Raises ValueError whose text is `what is wrong (got VALUE); remedy`.
    """
    if isinstance(written, list):
        return _choices(written)
    if not isinstance(written, dict):
        raise ValueError(f"is one value, which leaves nothing to search (got {written!r}); write a list, or move it to run")
    kinds = [kind for kind in RANGES if kind in written]
    unknown = [key for key in written if key not in (*RANGES, "points")]
    if unknown or len(kinds) != 1:
        near = did_you_mean(unknown[0], (*RANGES, "points")) if unknown else ""
        raise ValueError(f"should name one of {', '.join(RANGES)} (got {', '.join(map(str, written)) or 'nothing'}){near}")
    return _range(kinds[0], written[kinds[0]], written.get("points"))


def _choices(written: list[Any]) -> Choices:
    if not written:
        raise ValueError("is an empty list, so there is no trial; name values")
    odd = next((value for value in written if isinstance(value, list | dict)), None)
    if odd is not None:
        raise ValueError(f"should list plain values (got {odd!r})")
    keyed = [(type(value) is bool, value) for value in written]
    repeated = next((value for place, value in enumerate(written) if keyed[place] in keyed[:place]), None)
    if repeated is not None or written.count(None) > 1:
        raise ValueError(f"lists {repeated!r} twice; name each value once")
    return Choices(tuple(written))


def _range(kind: str, bounds: Any, points: Any) -> Range:
    numbers = isinstance(bounds, list) and len(bounds) == BOUNDS and all(_is_number(bound, kind) for bound in bounds)
    if not numbers:
        raise ValueError(f"{kind} should be two {'whole ' if kind == 'integer' else ''}numbers, [low, high] (got {bounds!r})")
    low, high = bounds
    if low >= high:
        raise ValueError(f"{kind}: the lower bound is not below the upper one (got {bounds!r}); write [low, high]")
    if kind == "log_uniform" and low <= 0:
        raise ValueError(f"log_uniform needs positive bounds (got {bounds!r}); use uniform")
    if points is not None and (not _is_number(points, "integer") or points < BOUNDS):
        raise ValueError(f"points should be a whole number from 2 on (got {points!r})")
    return Range(kind, low, high, points)


def _is_number(value: Any, kind: str) -> bool:
    wanted = int if kind == "integer" else (int, float)
    return isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value)


def grid(space: Mapping[str, Entry]) -> Iterator[Values]:
    """Yield every combination, the last key changing fastest."""
    for combination in itertools.product(*(entry.grid() for entry in space.values())):
        yield dict(zip(space, combination, strict=True))


def sample(space: Mapping[str, Entry], seed: int, number: int) -> Values:
    """Return the `number`-th random setting of a seed: it depends on neither the others nor their number."""
    return {key: entry.draw(random.Random(f"{seed}/{number}/{key}")) for key, entry in space.items()}  # noqa: S311 - a search


def corners(space: Mapping[str, Entry]) -> Iterator[Values]:
    """Yield settings in which every choice and both ends of every range occur: what must be valid for all to be."""
    columns = {key: [entry.low, entry.high] if isinstance(entry, Range) else list(entry.values) for key, entry in space.items()}
    for place in range(max(map(len, columns.values()))):
        yield {key: column[place % len(column)] for key, column in columns.items()}
