"""What a table shows and what it does not, in sentences computed from its rows: paired t-tests over seeds.

The unit is a seed. Its difference is the mean over tasks of what the first row scores above the second, so that tasks are not
counted as repetitions. A difference is seen where its p-value stays below 0.05 after Holm's correction over all comparisons that
are printed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bpt_dist.commands.table.rows import ERRORS, METRIC_NAMES, Column, Row
from bpt_dist.commands.table.statistics import LEVEL, ROUNDING, Difference, holm, paired_difference
from bpt_dist.config.base import did_you_mean
from bpt_dist.errors import ConfigError

MINUS = "\N{MINUS SIGN}"


class Pair(NamedTuple):
    """Two rows that are compared, by the labels of their runs, their methods or as printed; no tasks means all both have."""

    first: str
    second: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The first row against the second, over the tasks and seeds that both have.

    `difference` is None where there is no such seed, for `reason`. `adjusted` is Holm's p-value. `left_out` says which tasks and
    seeds of the rows do not count.
    """

    first: str
    second: str
    columns: tuple[Column, ...] = ()
    seeds: tuple[int, ...] = ()
    difference: Difference | None = None
    adjusted: float | None = None
    reason: str = ""
    left_out: str = ""

    @property
    def is_seen(self) -> bool:
        """Whether the rows differ by more than chance explains."""
        return self.adjusted is not None and self.adjusted < LEVEL

    @property
    def unit(self) -> str:
        """Return what the difference is in."""
        return "nats" if any(column.metric == "nll" for column in self.columns) else "points"

    def number(self, value: float, *, signed: bool = False) -> str:
        """Return a number with the decimals of its metric, and a minus that is not a hyphen."""
        text = f"{value:{'+' if signed else ''}.{max(column.decimals for column in self.columns)}f}"
        nothing = not any(digit in text for digit in "123456789")
        return text.lstrip("+-") if nothing else text.replace("-", MINUS)

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        found = self.difference
        return {
            "first": self.first, "second": self.second,
            "columns": [{"task": column.task, "metric": column.metric} for column in self.columns],
            "seeds": list(self.seeds),
            "difference": found and found.mean,
            "interval": list(found.interval) if found and found.interval else None,
            "p_value": found and found.p_value,
            "holm_p_value": self.adjusted, "seen": self.is_seen, "reason": self.reason,
        }  # fmt: skip


def parse_pairs(texts: Sequence[str], rows: Sequence[Row]) -> list[Pair]:
    """Read `FIRST:SECOND[@TASK,...]`, or `SECOND` alone, which every other row is compared with.

    Raises ConfigError for what names no row, several rows, or a task that no row has.
    """
    tasks = {column.task for row in rows for column in row.cells}
    pairs: list[Pair] = []
    for text in texts:
        names, _, listed = text.partition("@")
        chosen = tuple(task for task in listed.split(",") if task)
        for task in chosen:
            if task not in tasks:
                raise ConfigError(f"--compare {text}: no row has task {task!r}; tasks are {', '.join(sorted(tasks))}")
        first, colon, second = names.rpartition(":")
        found = [_the_row(name, rows, text) for name in ((first, second) if colon else (second,))]
        against = found[-1]
        pairs += [Pair(row.label, against.label, chosen) for row in (found[:1] if colon else rows) if row is not against]
        if colon and found[0] is against:
            raise ConfigError(f"--compare {text}: compares {against.label} with itself; name two rows")
    return list(dict.fromkeys(pairs))


def planned_pairs(texts: Sequence[str]) -> list[Pair]:
    """Read the comparisons of a configuration, which has checked that its rows and tasks exist."""
    pairs = []
    for names, _, tasks in (text.partition("@") for text in texts):
        first, second = names.split(":")
        pairs.append(Pair(first, second, tuple(filter(None, tasks.split(",")))))
    return list(dict.fromkeys(pairs))


def _the_row(name: str, rows: Sequence[Row], text: str) -> Row:
    found = find_rows(name, rows)
    if len(found) == 1:
        return found[0]
    known = sorted({known for row in rows for known in row.names or {row.label}})
    if found:
        raise ConfigError(
            f"--compare {text}: {name!r} is {len(found)} rows, {', '.join(row.label for row in found)}; name one of {known}"
        )
    raise ConfigError(f"--compare {text}: no row is called {name!r}; rows are {', '.join(known)}{did_you_mean(name, known)}")


def find_rows(name: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a name: as printed, or else as their runs are labelled, or else by their method."""
    by_label = [row for row in rows if row.label == name]
    by_run = [row for row in rows if name in row.names]
    return by_label or by_run or [row for row in rows if name in row.methods]


def compare(pairs: Sequence[Pair], rows: Sequence[Row], columns: Sequence[Column]) -> tuple[Comparison, ...]:
    """Return the comparisons with the p-values that are left after Holm's correction over those that could be tested."""
    compared = [_compare(pair, rows, columns) for pair in pairs]
    tested = [place for place, one in enumerate(compared) if one.difference is not None and one.difference.p_value is not None]
    p_values = [compared[place].difference.p_value for place in tested]  # type: ignore[union-attr]
    for place, adjusted in zip(tested, holm([value for value in p_values if value is not None]), strict=True):
        compared[place] = replace(compared[place], adjusted=adjusted)
    return tuple(compared)


def _compare(pair: Pair, rows: Sequence[Row], columns: Sequence[Column]) -> Comparison:
    sides = [find_rows(name, rows) for name in (pair.first, pair.second)]
    labels = [found[0].label if found else name for name, found in zip((pair.first, pair.second), sides, strict=True)]
    for label, found in zip(labels, sides, strict=True):
        if len(found) != 1:
            return Comparison(labels[0], labels[1], reason=f"{'several rows' if found else 'no results'} of {label}")
    (first,), (second,) = sides
    wanted = _one_a_task(columns, pair.tasks, first, second)
    common = tuple(column for column in wanted if column in first.cells and column in second.cells)
    values = [[_seeds_of(row, column) for column in common] for row in (first, second)]
    seeds = sorted(set.intersection(*(set(cell) for side in values for cell in side))) if common else []
    left_out = _left_out(wanted, common, values, seeds)
    plain = Comparison(first.label, second.label, common, tuple(seeds), left_out=left_out)
    if not seeds:
        return replace(plain, reason="no seed has all their tasks" if common else "no task in common")
    differences = [sum(a[s] - b[s] for a, b in zip(*values, strict=True)) / len(common) for s in seeds]
    return replace(plain, difference=paired_difference(differences))


def _one_a_task(columns: Sequence[Column], tasks: Sequence[str], first: Row, second: Row) -> list[Column]:
    """Return the columns of either row that count: one a task, as in averages; errors only where there is nothing else."""
    filled = [c for c in columns if (c in first.cells or c in second.cells) and (not tasks or c.task in tasks)]
    scores = [column for column in filled if column.metric not in ERRORS]
    kept = scores or [column for column in filled if column.metric == filled[0].metric]
    # A column that both have comes before another metric of its task.
    kept.sort(key=lambda column: not (column in first.cells and column in second.cells))
    by_task: dict[str, Column] = {}
    for column in kept:
        by_task.setdefault(column.task, column)
    chosen = set(by_task.values())
    return [column for column in columns if column in chosen]


def _seeds_of(row: Row, column: Column) -> Mapping[int, float]:
    return row.cells[column].values


def _left_out(
    wanted: Sequence[Column], common: Sequence[Column], values: Sequence[Sequence[Mapping[int, float]]], seeds: Sequence[int]
) -> str:
    tasks = [column.task for column in wanted if column not in common]
    others = sorted({seed for side in values for cell in side for seed in cell} - set(seeds))
    parts = [f"{', '.join(tasks)} (not in both rows)"] if tasks else []
    parts += [f"seed{'s' * (len(others) > 1)} {', '.join(map(str, others))} (not in every cell)"] if others else []
    return " and ".join(parts)


# --- sentences ------------------------------------------------------------------------------------------------------------


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """Return one sentence for what is seen, one for what is not, one for what could not be tested, and how it was tested."""
    if not comparisons:
        return []
    alike = len({(one.columns, one.seeds) for one in comparisons if one.difference is not None}) <= 1
    tested = [one for one in comparisons if one.adjusted is not None]
    seen = [_seen(one, alike=alike) for one in tested if one.is_seen]
    unseen = [_unseen(one, alike=alike) for one in tested if not one.is_seen]
    untested = [_untested(one, alike=alike) for one in comparisons if one.adjusted is None]
    lines = [f"Seen: {'; '.join(seen) or 'no difference'}."] if tested else []
    lines += [f"Not seen: {'; '.join(unseen)}."] if unseen else []
    lines += [f"Not tested: {'; '.join(untested)}."] if untested else []
    return [*lines, *_rule(comparisons, len(tested), alike=alike)]


def _seen(one: Comparison, *, alike: bool) -> str:
    assert one.difference is not None
    assert one.difference.interval is not None
    is_above = one.difference.mean > 0
    # The interval is that of the size: of what the sentence says is above or below.
    low, size, high = (one.number(value) for value in sorted(map(abs, (one.difference.mean, *one.difference.interval))))
    relation = f"is {'above' if is_above else 'below'} {one.second}"
    return f"{one.first} {relation} by {size} {one.unit} (95 % interval {low} to {high}{_basis(one, alike=alike)})"


def _unseen(one: Comparison, *, alike: bool) -> str:
    assert one.difference is not None
    assert one.difference.interval is not None
    low, high = one.difference.interval
    corrected = "" if low <= 0 <= high else f"; one of several comparisons, corrected p = {one.adjusted:.2g}"
    difference = f"{one.number(one.difference.mean, signed=True)} {one.unit}"
    interval = f"{one.number(low)} to {one.number(high)}"
    return f"{one.first} against {one.second}, {difference} ({interval}{corrected}{_basis(one, alike=alike)})"


def _untested(one: Comparison, *, alike: bool) -> str:
    if one.difference is None:
        return f"{one.first} against {one.second}, {one.reason}"
    mean, basis = one.difference.mean, _basis(one, alike=alike)
    if len(one.seeds) == 1:
        why = "one seed: no interval"
    elif abs(mean) <= ROUNDING:
        why = f"equal at each of {len(one.seeds)} seeds"
    else:
        why = f"the same at each of {len(one.seeds)} seeds: no spread, no interval"
    return f"{one.first} against {one.second}, {one.number(mean, signed=True)} {one.unit} ({why}{basis})"


def _basis(one: Comparison, *, alike: bool) -> str:
    """Return the seeds and tasks of a comparison, unless all are over the same."""
    return "" if alike else f", {_seeds_and_tasks(one)}"


def _seeds_and_tasks(one: Comparison) -> str:
    seeds = f"{len(one.seeds)} seed{'s' * (len(one.seeds) > 1)}"
    titles = ", ".join(column.task for column in one.columns)
    return f"{seeds}, mean of {titles}" if len(one.columns) > 1 else f"{seeds}, {titles}"


def _rule(comparisons: Sequence[Comparison], num_tested: int, *, alike: bool) -> Iterator[str]:
    compared = [one for one in comparisons if one.difference is not None]
    if num_tested:
        corrected = f" after Holm's correction over {num_tested} comparisons" if num_tested > 1 else ""
        test = "paired t over seeds of the mean difference over tasks, each with its 95 % interval"
        yield f"Test: {test}; seen is p < {LEVEL}{corrected}."
    if alike and compared:
        metrics = dict.fromkeys(METRIC_NAMES.get(column.metric, column.metric) for column in compared[0].columns)
        lower = ", the lower the better" if compared[0].columns[0].metric in ERRORS else ""
        yield f"Compared: {_seeds_and_tasks(compared[0])} ({', '.join(metrics)}{lower})."
    yield from (f"Left out of {one.first} against {one.second}: {one.left_out}." for one in compared if one.left_out)
