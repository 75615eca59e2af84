"""Which columns, rows, averages and bold cells the results table has: grouping only, no printing."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bpt_dist.artifacts.results import Result
from bpt_dist.commands.table.published import GLUE, METHOD_NAMES, SUPER_GLUE
from bpt_dist.commands.table.statistics import is_better, mean_and_deviation
from bpt_dist.errors import DataError

METRIC_NAMES = {
    "f1": "F1", "macro_f1": "macro F1", "multirc_f1a": "F1", "multirc_em": "EM", "squad_f1": "F1", "squad_em": "EM",
    "record_f1": "F1", "record_em": "EM", "pearson": "Pearson", "spearman": "Spearman", "matthews": "Matthews",
    "nll": "NLL, nats", "calibration_error": "calibration error",
    "prediction_agreement": "agreement of predictions",
}  # fmt: skip
ERRORS = frozenset({"nll", "calibration_error"})  # the lower, the better
SAME_VALUE = 1e-6  # a stored value and one recounted from its predictions
SHARE_OF_RIGHT_ANSWERS = frozenset({"accuracy", "squad_em", "record_em"})


@dataclass(frozen=True)
class Column:
    """One task in one metric."""

    task: str
    metric: str

    @property
    def title(self) -> str:
        """Return the header: the task and, always, the metric."""
        return f"{self.task} ({METRIC_NAMES.get(self.metric, self.metric)})"

    @property
    def decimals(self) -> int:
        """Return how many decimals are shown: scores are percent, the negative log-likelihood is not."""
        return 3 if self.metric == "nll" else 1


@dataclass(frozen=True)
class Cell:
    """The values of one row in one column: seed -> percent, and where each seed keeps its predictions."""

    values: Mapping[int, float]
    predictions: Mapping[int, Path] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return mean_and_deviation(list(self.values.values()))[0]


@dataclass(frozen=True)
class Row:
    """One method: its cells, the columns it is best in, (min, max) of the parameters trained for a task.

    `names` are the labels of its runs and `methods` their methods, with `/ensemble` where predictions are averaged.
    """

    label: str
    joint: bool
    cells: Mapping[Column, Cell]
    parameters: tuple[int, int]
    best: frozenset[Column] = frozenset()
    names: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()

    @property
    def num_seeds(self) -> int:
        """Return the largest number of seeds in any cell; a cell with fewer shows its own number."""
        return max(len(cell.values) for cell in self.cells.values())


@dataclass(frozen=True)
class AverageColumn:
    """A mean over columns that every row has in the same metric."""

    group: str
    columns: tuple[Column, ...]
    kind: str = ""  # of an error: its name

    @property
    def title(self) -> str:
        """Return the header, with the number of tasks averaged."""
        what = f"{self.kind}, {len(self.columns)}" if self.kind else str(len(self.columns))
        return f"{self.group} average ({what})" if self.group else f"Average ({what})"

    @property
    def decimals(self) -> int:
        """Return how many decimals are shown."""
        return max(column.decimals for column in self.columns)

    @property
    def note(self) -> str:
        """Return the footnote naming the columns."""
        titles = ", ".join(column.title for column in self.columns)
        spread = "; ± over seeds, each with its own average, where all these columns have the same seeds"
        return f"{self.title}: mean over {titles}: the columns every trained row has in the same metric{spread}."

    def of(self, cells: Mapping[Column, Cell]) -> float:
        """Return the average of the means of `cells`, which must hold all columns."""
        return sum(cells[c].mean for c in self.columns) / len(self.columns)

    def deviation(self, cells: Mapping[Column, Cell]) -> float | None:
        """Return the sample standard deviation of the seeds' averages; None with one seed or when columns differ in their seeds."""
        values = [cells[c].values for c in self.columns]
        if any(cell.keys() != values[0].keys() for cell in values):
            return None
        return mean_and_deviation([sum(cell[seed] for cell in values) / len(values) for seed in values[0]])[1]


def find_columns(chosen: Sequence[Result], everything: Sequence[Result], wanted: Sequence[str] = ()) -> tuple[Column, ...]:
    """Return one column per task and headline metric, or per `wanted` metric, in the published order of tasks, then as met.

    A task measured by a Matthews correlation also gets its accuracy column: the two are confused in print
    (CoLA). The headline metric of a task may be marked on another split than the chosen one, hence `everything`.
    """
    metrics: dict[str, dict[str, None]] = defaultdict(dict)
    for result in chosen:
        metrics[result.task][result.metric] = None
    headline = {(r.task, r.metric) for r in everything if r.headline}
    columns = []
    for task in sorted(metrics, key=_task_rank):
        if wanted:
            columns += [Column(task, metric) for metric in wanted if metric in metrics[task]]
            continue
        shown = [m for m in metrics[task] if (task, m) in headline] or list(metrics[task])[:1]
        if any(m == "matthews" for m in metrics[task]):
            both = [m for m in metrics[task] if m in {"matthews", "accuracy"}]
            shown += sorted((m for m in both if m not in shown), reverse=True)
        columns += [Column(task, metric) for metric in shown]
    return tuple(columns)


def build_rows(chosen: Sequence[Result], columns: Sequence[Column], *, by_label: bool = False) -> tuple[tuple[Row, ...], list[str]]:
    """Group results into rows, single-target first, in the published order; return them with notes.

    `by_label`: the runs are named `<label>-s<seed>`, and different labels are different rows.
    """
    groups: dict[tuple[bool, str], list[Result]] = defaultdict(list)
    labels = _labels(chosen, by_label)
    for result in chosen:
        groups[result.joint, labels[_setting(result)]].append(result)
    ordered = sorted(groups, key=lambda key: (key[0], _method_rank(groups[key][0].method), key[1]))
    rows = [_row(label + "*" * joint, joint, groups[joint, label], columns) for joint, label in ordered]
    rows = [row for row in rows if row.cells]
    notes = _comparability(chosen, columns, groups)
    return tuple(_with_best(row, rows) for row in rows), notes


def majority_cells(chosen: Sequence[Result], columns: Sequence[Column]) -> tuple[dict[Column, Cell], list[str]]:
    """Return the score of the majority class for every column that records it, with notes on disagreement."""
    cells, notes = {}, []
    for column in columns:
        values = {r.majority for r in chosen if (r.task, r.metric) == (column.task, column.metric) and r.majority is not None}
        if values:
            cells[column] = Cell({0: min(values)})
        if len(values) > 1:
            notes.append(f"Majority class of {column.title}: the runs record different values; the lowest is shown.")
    return cells, notes


def average_columns(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[AverageColumn, ...]:
    """Return one average per group of tasks (GLUE, SuperGLUE, other) over the columns that all rows fill.

    A task counts once, in its first metric; errors have averages of their own. A group with fewer than two such columns gets none.
    """
    shared: dict[tuple[str, str], dict[str, Column]] = defaultdict(dict)
    for column in columns:
        if all(column in row.cells for row in rows):
            kind = METRIC_NAMES[column.metric] if column.metric in ERRORS else ""
            shared[_group(column.task), kind].setdefault(column.task, column)
    return tuple(AverageColumn(group, tuple(tasks.values()), kind) for (group, kind), tasks in shared.items() if len(tasks) > 1)


def parameters_text(parameters: tuple[int, int]) -> str:
    """Return a count with thousands separators, or the range over tasks."""
    low, high = parameters
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _experiment(result: Result) -> str:
    return re.sub(rf"-s{result.seed}$", "", result.run)


def _with_mode(name: str, result: Result) -> str:
    return name if result.predict == "map" else f"{name}/{result.predict}"


def _setting(result: Result) -> tuple[str, ...]:
    return (result.method, result.predict, result.backbone, result.protocol, _experiment(result), str(result.folder.parent))


def _labels(chosen: Sequence[Result], by_label: bool) -> dict[tuple[str, ...], str]:
    """Name each setting by its method and what distinguishes it: prediction, backbone, protocol, at last the run.

    Runs of one method that differ in name only (seeds run one by one) share a row unless a seed would occur
    twice in it; with `by_label` they never do, and a label that says more than the method is shown.
    """
    settings = sorted({_setting(r) for r in chosen})
    varying = [len({s[i] for s in settings}) > 1 for i in range(4)]
    averaged = {(setting[0], *setting[2:]) for setting in settings if setting[1] != "map"}
    names = {}
    for setting in settings:
        # One prompt needs no name where its run predicts in no other way.
        extras = [setting[1]] if setting[1] != "map" else ["MAP"] * ((setting[0], *setting[2:]) in averaged)
        extras += [setting[i] for i in (2, 3) if varying[i]]
        name = METHOD_NAMES.get(setting[0], setting[0])
        names[setting] = f"{name} ({', '.join(extras)})" if extras else name
    if not by_label:
        names = _with_folders(names)
    clashing = set() if by_label else _clashing(chosen, names)
    shown = _telling(chosen, names) if by_label else set()
    return {s: f"{name} [{s[4]}]" if name in clashing or s[4] in shown else name for s, name in names.items()}


def _with_folders(names: Mapping[tuple[str, ...], str]) -> dict[tuple[str, ...], str]:
    """Add the experiment, the folder of its runs, to names that several experiments have: their runs are different rows."""
    folders: dict[str, set[Path]] = defaultdict(set)
    for setting, name in names.items():
        folders[name].add(Path(setting[5]))
    shown = {}
    for setting, name in names.items():
        others = folders[name] - {Path(setting[5])}
        shown[setting] = f"{name} [{_distinct(Path(setting[5]), others)}]" if others else name
    return shown


def _distinct(folder: Path, others: set[Path]) -> str:
    """Return the shortest end of a path that no other path has."""
    ends = (Path(*folder.parts[-length:]) for length in range(1, len(folder.parts) + 1))
    return str(next((end for end in ends if not any(other.parts[-len(end.parts) :] == end.parts for other in others)), folder))


def _telling(chosen: Sequence[Result], names: Mapping[tuple[str, ...], str]) -> set[str]:
    """Return the labels that are not just the method's name (with `-joint`, which the star says), and those that would share it."""
    owners: dict[tuple[bool, str], set[str]] = defaultdict(set)
    telling = set()
    for result in chosen:
        label = _experiment(result)
        owners[result.joint, names[_setting(result)]].add(label)
        if label not in (result.method, f"{result.method}-joint" if result.joint else result.method):
            telling.add(label)
    return telling.union(*(labels for labels in owners.values() if len(labels) > 1))


def _clashing(chosen: Sequence[Result], names: Mapping[tuple[str, ...], str]) -> set[str]:
    """Return the names of runs of one method, told apart by their labels only, of which a reader could not say which is which."""
    seen: dict[tuple[Any, ...], Result] = {}
    clashing = set()
    for result in chosen:
        # Whether a run averages as well is in the name of its single prompt, and does not tell its settings.
        key = (*_setting(result)[:4], result.folder.parent, result.joint, result.task, result.metric, result.seed)
        other = seen.setdefault(key, result)
        if _experiment(other) != _experiment(result):
            experiments = {(one.method, _experiment(one)) for one in (other, result)}
            clashing |= {name for setting, name in names.items() if (setting[0], setting[4]) in experiments}
    return clashing


def _comparability(
    chosen: Sequence[Result], columns: Sequence[Column], groups: Mapping[tuple[bool, str], list[Result]]
) -> list[str]:
    notes = []
    for column in columns:
        mine = [r for r in chosen if (r.task, r.metric) == (column.task, column.metric)]
        if len({r.n for r in mine}) > 1:
            notes.append(f"Not comparable in full: rows of {column.title} were measured on different numbers of examples.")
        if len({r.decode for r in mine}) > 1:
            notes.append(f"Not comparable in full: rows of {column.title} were decoded in different ways.")
    for (_, label), results in groups.items():
        names = sorted({_experiment(r) for r in results})
        if len(names) > 1:
            notes.append(f"{label}: its seeds come from several runs ({', '.join(names)}), assumed to share one configuration.")
    return notes


def _row(label: str, joint: bool, results: Sequence[Result], columns: Sequence[Column]) -> Row:
    cells = {}
    for column in columns:
        mine = [r for r in results if (r.task, r.metric) == (column.task, column.metric)]
        by_seed: dict[int, Result] = {}
        for result in mine:
            twin = by_seed.setdefault(result.seed, result)
            if twin is not result:
                raise DataError(
                    f"{result.folder}: {label}, {column.title}, seed {result.seed} is also in {twin.folder}; "
                    "give only one of the two folders"
                )
        if mine:
            cells[column] = Cell({s: r.value for s, r in by_seed.items()}, {s: r.predictions for s, r in by_seed.items()})
    counts = [r.trainable_parameters for r in results]
    names = frozenset(_with_mode(_experiment(r), r) for r in results)
    methods = frozenset(_with_mode(r.method, r) for r in results)
    return Row(label, joint, cells, (min(counts), max(counts)), names=names, methods=methods)


def _with_best(row: Row, rows: Sequence[Row]) -> Row:
    rivals = [other for other in rows if other.joint == row.joint and other is not row]
    best = {column for column, cell in row.cells.items() if _is_best(cell, column, rivals)}
    return replace(row, best=frozenset(best))


def _is_best(cell: Cell, column: Column, rivals: Sequence[Row]) -> bool:
    others = [rival.cells[column] for rival in rivals if column in rival.cells]
    sign = -1 if column.metric in ERRORS else 1
    # The cheap comparison first: predictions of only one row a column are ever read against the others.
    if not others or any(sign * other.mean >= sign * cell.mean for other in others):
        return False
    right, values = _right_answers(cell, column), _times(sign, cell)
    return all(is_better(values, _times(sign, other), right, _right_answers(other, column)) for other in others)


def _times(sign: int, cell: Cell) -> dict[int, float]:
    return {seed: sign * value for seed, value in cell.values.items()}


def _right_answers(cell: Cell, column: Column) -> dict[int, dict[str, float]] | None:
    """Return seed -> row id -> 1.0 or 0.0, or None unless the files exist and reproduce the reported values.

    The check keeps out predictions of another split, metric or prediction mode stored under the same name.
    """
    if column.metric not in SHARE_OF_RIGHT_ANSWERS:
        return None
    answers = {seed: _read_right(path) for seed, path in cell.predictions.items()}
    for seed, rows in answers.items():
        if not rows or abs(100 * sum(rows.values()) / len(rows) - cell.values[seed]) > SAME_VALUE:
            return None
    return answers


def _read_right(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = {str(row["row_id"]): float(row["correct"]) for row in rows}
    return right if len(right) == len(rows) else {}


def _task_key(task: str) -> str:
    key = re.sub(r"[^a-z0-9]", "", task.lower().rpartition("/")[2])
    return {"wscfixed": "wsc"}.get(key, key)


def _task_rank(task: str) -> int:
    order = GLUE + SUPER_GLUE
    return order.index(_task_key(task)) if _task_key(task) in order else len(order)


def _group(task: str) -> str:
    key = _task_key(task)
    return "GLUE" if key in GLUE else "SuperGLUE" if key in SUPER_GLUE else ""


def _method_rank(method: str) -> int:
    names = list(METHOD_NAMES)
    return names.index(method) if method in names else len(names)
