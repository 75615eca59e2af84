"""`bpt-dist plot FOLDER --over KEY`: the score of a table's runs over one of their settings, a line a row with a band over seeds.

The rows of a line are labelled `<line>-<value of the setting>`, as in `bpt-8`, `bpt-32`.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import typer

from bpt_dist.artifacts.curves import Curve, Point, draw_curves
from bpt_dist.artifacts.results import Result, collect
from bpt_dist.artifacts.stored_run import stored_config
from bpt_dist.commands.table.statistics import mean_and_deviation, t_interval
from bpt_dist.config import RunConfig
from bpt_dist.config.base import did_you_mean
from bpt_dist.config.keys import leaves
from bpt_dist.config.loading import row_label
from bpt_dist.errors import ConfigError, DataError
from bpt_dist.storage.files import write_atomic

CSV_HEADER = ("line", "setting", "mean", "low", "high", "num_seeds", "seeds", "tasks")
Scores = dict[str, float]  # task -> headline metric in percent


class Place(NamedTuple):
    """Where a run is in the picture."""

    line: str
    setting: float


class Summary(NamedTuple):
    """The runs at one place: the mean of their scores over tasks and seeds in percent, and its 95 % t interval."""

    place: Place
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]


def print_curve(folder: Path, key: str, out: Path | None, tasks: Sequence[str] = ()) -> None:
    """Draw the mean headline score over the target tasks against the setting `key`, and write its numbers beside the picture.

    `tasks` are those that are averaged; by default all that every run has. The band is the 95 % t interval over seeds.

    Raises ConfigError for a key or a task that the runs do not have, DataError where no two values of the setting have results.
    """
    collected = collect([folder])
    runs = _scores(collected.results, key)
    if len({place.setting for place in runs}) == 1:
        raise DataError(f"--over {key}: the finished runs of {folder} have one value of it only; train rows that differ in {key}")
    shared = _shared_tasks([scores for seeds in runs.values() for scores in seeds.values()], tasks)
    summaries = [_summary(place, seeds, shared) for place, seeds in sorted(runs.items())]
    picture = (out or folder) / f"score_over_{key}.png"
    _draw(summaries, shared, key, picture)
    numbers = write_atomic(picture.with_suffix(".csv"), _csv(summaries, shared).encode())
    typer.echo("\n".join([*map(str, (picture, numbers)), *collected.notes]))


def _scores(results: Sequence[Result], key: str) -> dict[Place, dict[int, Scores]]:
    """Return the headline scores of the last reported split of each run, by its place in the picture and its seed."""
    configs = {folder: stored_config(folder) for folder in {result.folder for result in results}}
    found: dict[Place, dict[int, Scores]] = defaultdict(dict)
    for result in results:
        config = configs[result.folder]
        if result.headline and result.split == config.evaluation.splits[-1]:
            place = _place(config, key, result.predict)
            found[place].setdefault(result.seed, {})[result.task] = result.value
    if not found:
        raise DataError("no finished run has a headline score; train some rows first")
    return found


def _summary(place: Place, seeds: Mapping[int, Scores], tasks: Sequence[str]) -> Summary:
    values = [sum(scores[task] for task in tasks) / len(tasks) for scores in seeds.values()]
    return Summary(place, mean_and_deviation(values)[0], t_interval(values), tuple(sorted(seeds)))


def _place(config: RunConfig, key: str, predict: str) -> Place:
    values = leaves(config.model_dump(mode="json"))
    if key not in values:
        raise ConfigError(f"--over {key}: run {config.name} has no such key{did_you_mean(key, values)}")
    value = values[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"--over {key}: is {value!r} in run {config.name}, which is no number; choose a key that every row sets")
    line = row_label(config).removesuffix(f"-{value}")
    return Place(line if predict == "map" else f"{line} ({predict})", float(value))


def _shared_tasks(runs: Sequence[Scores], wanted: Sequence[str]) -> list[str]:
    shared = [task for task in runs[0] if all(task in scores for scores in runs)]
    for task in wanted:
        if task not in shared:
            raise ConfigError(f"--task {task}: is not in every run; those that are: {', '.join(shared) or 'none'}")
    if not shared:
        raise DataError("the runs have no target task in common; name folders of runs with the same targets")
    return list(wanted) or shared


def _draw(summaries: Sequence[Summary], tasks: Sequence[str], key: str, picture: Path) -> None:
    lines: dict[str, list[Point]] = defaultdict(list)
    for place, mean, interval, _ in summaries:
        lines[place.line].append(Point(place.setting, mean, interval))
    numbers = sorted({len(summary.seeds) for summary in summaries})
    seeds = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    title = f"Mean of {', '.join(tasks)}\nband: 95 % interval over {seeds} seed{'s' * (numbers != [1])}"
    curves = [Curve(line, tuple(points)) for line, points in lines.items()]
    draw_curves(curves, picture, title=title, setting=key, score="score (%)", best=100.0)


def _csv(summaries: Sequence[Summary], tasks: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for place, mean, interval, seeds in summaries:
        numbers = [mean, *(interval or ("", "")), len(seeds)]
        writer.writerow([place.line, f"{place.setting:g}", *numbers, " ".join(map(str, seeds)), " ".join(tasks)])
    return stream.getvalue()
