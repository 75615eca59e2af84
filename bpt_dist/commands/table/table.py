"""The results table: rows methods, columns tasks, mean and spread over seeds, bold only where it is earned.

`collect` reads, `Table.build` groups, the `to_*` methods print. Scores are percent everywhere.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group

from bpt_dist.artifacts.results import Result
from bpt_dist.commands.table.layout import MISSING, Block, Sheet, Text, html, latex, markdown, terminal
from bpt_dist.commands.table.narrow import PAGE, aligned, latex_page, narrow
from bpt_dist.commands.table.published import published_sheet
from bpt_dist.commands.table.rows import (
    ERRORS,
    AverageColumn,
    Cell,
    Column,
    Row,
    average_columns,
    build_rows,
    find_columns,
    majority_cells,
    parameters_text,
)
from bpt_dist.commands.table.sentences import Comparison, compare, parse_pairs, planned_pairs, sentences
from bpt_dist.commands.table.statistics import RULE, mean_and_deviation
from bpt_dist.errors import DataError

SINGLE, JOINT = "One target task a run", "Several target tasks in one run (*)"
CSV_HEADER = (
    "block", "method", "task", "metric", "split", "mean", "standard_deviation", "num_seeds", "seeds",
    "best", "majority", "trainable_parameters_min", "trainable_parameters_max",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The results table; build it with `Table.build`, then print it with one of the `to_*` methods."""

    split: str
    columns: tuple[Column, ...]
    averages: tuple[AverageColumn, ...]
    rows: tuple[Row, ...]
    majority: dict[Column, Cell]
    notes: tuple[str, ...]
    published: bool = False
    comparisons: tuple[Comparison, ...] = ()

    @classmethod
    def build(
        cls,
        results: Sequence[Result],
        *,
        split: str = "test",
        published: bool = False,
        notes: Sequence[str] = (),
        by_label: bool = False,
        metrics: Sequence[str] = (),
        compared: Sequence[str] = (),
        planned: bool = False,
    ) -> Table:
        """Group target-stage `results` of one split into rows and columns and decide averages and bold type.

        `by_label`: the runs are named `<label>-s<seed>`, and every label is a row of its own. `metrics` replace the headline
        metrics. `compared` names rows for the closing sentences, as `--compare` does; `planned`: some may have no results yet.

        Raises DataError when nothing is left for `split` or when one row would hold the same seed twice, ConfigError for a
        comparison of what is not there.
        """
        targets = [r for r in results if r.stage.partition("/")[0] == "target"]
        chosen = [r for r in targets if r.split == split]
        if not chosen:
            splits = ", ".join(sorted({r.split for r in targets})) or "no split"
            raise DataError(f"split '{split}': no finished target result has it (found {splits}); choose one of those")
        known = {result.metric for result in chosen}
        for metric in metrics:
            if metric not in known:
                choice = ", ".join(sorted(known))
                raise DataError(f"metric '{metric}': no result on the {split} split has it; choose one of {choice}")
        columns = find_columns(chosen, targets, metrics)
        rows, row_notes = build_rows(chosen, columns, by_label=by_label)
        majority, majority_notes = majority_cells(chosen, columns)
        averages = average_columns(rows, columns)
        pairs = planned_pairs(compared) if planned else parse_pairs(compared, rows)
        notes = (*notes, *row_notes, *majority_notes)
        return cls(split, columns, averages, rows, majority, notes, published, compare(pairs, rows, columns))

    def sheets(self) -> list[Sheet]:
        """Return the printed sheets: ours, then the published numbers if asked for."""
        return [self._sheet(), *([published_sheet()] if self.published else [])]

    def to_markdown(self) -> str:
        """Return GitHub Markdown."""
        return "\n".join(markdown(sheet) for sheet in self.sheets())

    def to_latex(self) -> str:
        """Return LaTeX tables for the booktabs package."""
        return "\n".join(latex(sheet) for sheet in self.sheets())

    def to_page(self) -> str:
        """Return a whole LaTeX document, tasks as rows, which fits a page of paper."""
        return latex_page([part for sheet in self.sheets() for part in narrow(sheet, PAGE)])

    def to_narrow(self, width: int) -> str:
        """Return Markdown with tasks as rows, whose lines have at most `width` characters: as many tables as that takes."""
        return "\n".join(aligned(part, width) for sheet in self.sheets() for part in narrow(sheet, width))

    def to_rich(self) -> Group:
        """Return a renderable for a terminal."""
        return Group(*(terminal(sheet) for sheet in self.sheets()))

    def to_html(self) -> str:
        """Return HTML tables with the same notes and sentences."""
        return "\n".join(html(sheet) for sheet in self.sheets())

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_csv(self) -> str:
        """Return one line per row and column of our table: full precision, no published numbers."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(CSV_HEADER)
        for row in self.rows:
            for column in self.columns:
                if column in row.cells:
                    writer.writerow(self._csv_line(row, column))
        return stream.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Return our table as plain data: for each cell, mean, standard deviation and the value of every seed."""
        return {
            "split": self.split,
            "rows": [self._json_row(row) for row in self.rows],
            "majority": [{"task": c.task, "metric": c.metric, "mean": cell.mean} for c, cell in self.majority.items()],
            "notes": list(self.notes),
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "sentences": sentences(self.comparisons),
        }

    def _json_row(self, row: Row) -> dict[str, Any]:
        cells = []
        for column in (column for column in self.columns if column in row.cells):
            values = row.cells[column].values
            mean, deviation = mean_and_deviation(list(values.values()))
            cells.append({
                "task": column.task, "metric": column.metric, "mean": mean, "standard_deviation": deviation,
                "num_seeds": len(values), "values": {str(seed): values[seed] for seed in sorted(values)},
                "best": column in row.best,
            })  # fmt: skip
        return {
            "method": row.label,
            "joint": row.joint,
            "num_seeds": row.num_seeds,
            "trainable_parameters": list(row.parameters),
            "cells": cells,
            "averages": {
                average.title: {"mean": average.of(row.cells), "standard_deviation": average.deviation(row.cells)}
                for average in self.averages
            },
        }

    def _csv_line(self, row: Row, column: Column) -> list[Any]:
        cell = row.cells[column]
        mean, deviation = mean_and_deviation(list(cell.values.values()))
        majority = self.majority.get(column)
        return [
            "joint" if row.joint else "single", row.label, column.task, column.metric, self.split, mean,
            "" if deviation is None else deviation, len(cell.values), " ".join(map(str, sorted(cell.values))),
            int(column in row.best), "" if majority is None else majority.mean, *row.parameters,
        ]  # fmt: skip

    def _sheet(self) -> Sheet:
        header = (
            "Method",
            "Parameters a task",
            "Seeds",
            *(c.title for c in self.columns),
            *(a.title for a in self.averages),
        )
        blocks = [Block("Without training", (self._majority_texts(),))] if self.majority else []
        for caption, joint in ((SINGLE, False), (JOINT, True)):
            rows = tuple(self._texts(row) for row in self.rows if row.joint == joint)
            blocks += [Block(caption, rows)] if rows else []
        unit = "in percent; NLL in nats" if any(column.metric == "nll" for column in self.columns) else "in percent"
        return Sheet(
            f"Results on the {self.split} split, {unit}",
            header,
            tuple(blocks),
            tuple(self._footnotes()),
            tuple(sentences(self.comparisons)),
        )

    def _texts(self, row: Row) -> tuple[Text, ...]:
        cells = [
            Text(_cell_text(row.cells[c], row.num_seeds, c.decimals), c in row.best) if c in row.cells else Text(MISSING)
            for c in self.columns
        ]
        averages = [Text(_spread_text(a.of(row.cells), a.deviation(row.cells), a.decimals)) for a in self.averages]
        return (
            Text(row.label),
            Text(parameters_text(row.parameters)),
            Text(str(row.num_seeds)),
            *cells,
            *averages,
        )

    def _majority_texts(self) -> tuple[Text, ...]:
        cells = [Text(f"{self.majority[c].mean:.1f}" if c in self.majority else MISSING) for c in self.columns]
        complete = [all(c in self.majority for c in average.columns) for average in self.averages]
        averages = [Text(f"{a.of(self.majority):.1f}" if ok else MISSING) for a, ok in zip(self.averages, complete, strict=True)]
        return (Text("Majority class"), Text("0"), Text(MISSING), *cells, *averages)

    def _footnotes(self) -> list[str]:
        footnotes = [
            "Scores: mean ± sample standard deviation over seeds; one seed has no ±. '–' means not measured.",
            *(["NLL and calibration error: the lower, the better."] if any(c.metric in ERRORS for c in self.columns) else []),
            RULE,
            *(average.note for average in self.averages),
        ]
        if not self.averages:
            footnotes.append("No average: fewer than two columns of a group are filled, in the same metric, in every row.")
        if any(row.joint for row in self.rows):
            footnotes.append("* one run serves all its target tasks; parameters are counted per task.")
        return footnotes + list(self.notes)


def _cell_text(cell: Cell, row_seeds: int, decimals: int) -> str:
    mean, deviation = mean_and_deviation(list(cell.values.values()))
    text = _spread_text(mean, deviation, decimals)
    return text if len(cell.values) == row_seeds else f"{text} (n={len(cell.values)})"


def _spread_text(mean: float, deviation: float | None, decimals: int) -> str:
    return f"{mean:.{decimals}f}" if deviation is None else f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"
