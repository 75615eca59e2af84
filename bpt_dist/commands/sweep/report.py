"""What a sweep ends in: the table of settings, the pictures, and the best setting as a configuration to run."""

from __future__ import annotations

import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import typer

from bpt_dist.artifacts.figures import GREY, INK, PALETTE, canvas
from bpt_dist.commands.output import print_list
from bpt_dist.commands.sweep.record import FILE, Record, TrialStatus
from bpt_dist.commands.sweep.settings import runnable_yaml, show
from bpt_dist.config import RunConfig
from bpt_dist.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST, BEST_SO_FAR = "best.yaml", "best_so_far.yaml"
UNCHANGED = f"{BEST} and the registered champion are left unchanged until all trials have ended"
LONGEST_REASON = 120
DECADES = 5.0  # from this ratio of largest to smallest value on, an axis is logarithmic
MOST_TICKS = 12
Cells = Mapping[tuple[float, float], Sequence[TrialStatus]]
Means = Mapping[tuple[float, float], float]


def finish_report(record: Record) -> RunConfig | None:
    """Print the table, write pictures and best configuration, and return the latter (None before a setting finished).

    A sweep that did not complete leaves `best.yaml` and the pictures of a complete one as they are: its best setting goes to
    `best_so_far.yaml`, its pictures to `figures_so_far/`.
    """
    standings, folder = record.standings(), record.sweep.directory
    rows = table(record, standings)
    header = [key.rpartition(".")[2] for key in record.sweep.keys]
    numbers = tuple(range(len(header), len(header) + 4))
    typer.echo()
    print_list([*header, "seeds", "validation", "±", record_split(record), "trials"], rows, right=numbers)
    typer.echo(f"\nsweep      {folder / FILE}")

    complete = not record.has_work()
    pictures, file_name = ("figures", BEST) if complete else ("figures_so_far", BEST_SO_FAR)
    for file in draw(record.sweep.keys, standings, folder / pictures):
        typer.echo(f"picture    {file}")
    if complete:
        (folder / BEST_SO_FAR).unlink(missing_ok=True)
        shutil.rmtree(folder / "figures_so_far", ignore_errors=True)
    config, best = record.best_config(), record.best()
    if config is None or best is None:
        return None
    command = shlex.join(["python", "launcher/train.py", "--config", str(folder / file_name)])
    scores = ", ".join(f"{score:.2f}" for score in best.scores)
    text = (
        f"# The best of {len(record.means()) if not complete else record.sweep.num_settings} settings of sweep "
        f"{record.sweep.settings.name} by the mean validation score: {best.mean:.2f} (seeds: {scores}).\n"
        f"{'' if complete else '# The sweep is not complete: ' + UNCHANGED + chr(10)}"
        f"# {', '.join(f'{key}: {show(value)}' for key, value in best.values.items())}\n#   {command}\n"
    )
    write_atomic(folder / file_name, (text + runnable_yaml(config)).encode())
    label = "best      " if complete else "best so far"
    typer.echo(f"{label} {folder / file_name}: {' '.join(f'{key}={show(value)}' for key, value in best.values.items())}")
    if not complete:
        typer.echo(f"not complete: {UNCHANGED}")
    typer.echo(f"train it   {command}")
    return config


def record_split(record: Record) -> str:
    """Return the name of the split whose score is shown beside the validation score."""
    return record.trials[0].config.evaluation.splits[-1] if record.trials else "test"


def table(record: Record, standings: list[TrialStatus]) -> list[list[str]]:
    """Return a row for each setting, best first: values, finished seeds, mean, deviation, reported mean, how trials ended."""
    order = {mean.number: place for place, mean in enumerate(record.means())}
    by_number: dict[int, list[TrialStatus]] = {}
    for status in standings:
        by_number.setdefault(status.number, []).append(status)
    rows = []
    for number in sorted(by_number, key=lambda number: (order.get(number, len(order)), number)):
        statuses = by_number[number]
        finished = [status for status in statuses if status.state == "finished" and status.score is not None]
        scores = [status.score for status in finished if status.score is not None]
        shown = [status.reported for status in finished if status.reported is not None]
        rows.append([
            *(show(value) for value in statuses[0].values.values()),
            f"{len(scores)}/{len(statuses)}",
            f"{statistics.fmean(scores):.2f}" if scores else "–",
            f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–",
            f"{statistics.fmean(shown):.2f}" if shown else "–",
            how_ended(statuses),
        ])  # fmt: skip
    return rows


def how_ended(statuses: list[TrialStatus]) -> str:
    """Return how the trials of a setting ended, as in `1 finished, 1 pruned at step 50`; of those that failed also why."""

    def how(status: TrialStatus) -> str:
        if status.state == "failed" and not status.diverged:
            reason = " ".join((status.reason or "").split())
            return f"failed ({reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + '…'})"
        return f"pruned at step {status.step}" if status.state == "pruned" else "diverged" if status.diverged else status.state

    states = Counter(map(how, statuses))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def draw(keys: Sequence[str], standings: Sequence[TrialStatus], folder: Path) -> list[Path]:
    """Draw into `folder` what the trials have data for, and return the files."""
    scored = [status for status in standings if status.state in ("finished", "pruned") and status.score is not None]
    axes = numeric_keys(keys, scored)
    drawn = []
    if len(axes) > 1:
        drawn.append(heat_map(axes[0], axes[1], scored, folder / "heat_map.png"))
    if axes:
        drawn.append(curves(axes[0], axes[1] if len(axes) > 1 else None, scored, folder / "curves.png"))
    return drawn


def numeric_keys(keys: Sequence[str], standings: Sequence[TrialStatus]) -> list[str]:
    """Return the searched keys with several numeric values: sigma first, then learning rates, then the others."""

    def rank(key: str) -> int:
        last = key.rpartition(".")[2]
        return 0 if last.startswith("sigma") else 1 if last.startswith("lr") else 2

    numeric = [key for key in keys if len({x for status in standings if (x := number(status, key)) is not None}) > 1]
    return sorted(numeric, key=rank)


def number(status: TrialStatus, key: str) -> float | None:
    """Return the value of a key if it is a number."""
    value = status.values.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def heat_map(across: str, up: str, standings: Sequence[TrialStatus], path: Path) -> Path:
    """Draw the mean validation score of the finished trials at every pair of values; pairs without one are open.

    Few values are drawn as the cells of a table with their numbers; many are drawn as points on numeric axes.
    """
    cells: dict[tuple[float, float], list[TrialStatus]] = {}
    for status in standings:
        x, y = number(status, across), number(status, up)
        if x is not None and y is not None:
            cells.setdefault((x, y), []).append(status)
    finished = {
        place: [status.score for status in statuses if status.state == "finished" and status.score is not None]
        for place, statuses in cells.items()
    }
    means = {place: statistics.fmean(scores) for place, scores in finished.items() if scores}
    columns, rows = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    with canvas((7.4, 5.2), path) as figure:
        axes = figure.subplots()
        if max(len(columns), len(rows)) <= MOST_TICKS:
            _tiles(axes, cells, means, columns, rows)
        else:
            _dots(axes, cells, means, columns, rows)
        axes.set_title(
            f"Validation score, mean of finished trials over {_short(across)} and {_short(up)};\nopen: all ended by asha"
        )
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(visible=False)
    return path


def _tiles(axes: Axes, cells: Cells, means: Means, columns: Sequence[float], rows: Sequence[float]) -> None:
    values = numpy.full((len(rows), len(columns)), numpy.nan)
    for (x, y), score in means.items():
        values[rows.index(y), columns.index(x)] = score
    image = axes.imshow(values, cmap="cividis", aspect="auto", origin="lower")
    axes.figure.colorbar(image, ax=axes, label="score (percent)")
    middle = (min(means.values()) + max(means.values())) / 2 if means else 0.0
    for (x, y), statuses in cells.items():
        mean = means.get((x, y))
        scores = [status.score for status in statuses if status.score is not None]
        finished = sum(status.state == "finished" for status in statuses)
        text = f"{statistics.fmean(scores) if mean is None else mean:.1f}"
        text += f"\nat step {max(status.step for status in statuses)}" if mean is None else f"\n{finished} of {len(statuses)}"
        colour = INK if mean is None or mean > middle else "white"
        axes.text(columns.index(x), rows.index(y), text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(columns)), [show(value) for value in columns])
    axes.set_yticks(range(len(rows)), [show(value) for value in rows])


def _dots(axes: Axes, cells: Cells, means: Means, columns: Sequence[float], rows: Sequence[float]) -> None:
    for place in cells:
        axes.scatter(*place, facecolor="none", edgecolor=GREY, s=60)
    drawn = axes.scatter([x for x, _ in means], [y for _, y in means], c=list(means.values()), cmap="cividis", s=60)
    axes.figure.colorbar(drawn, ax=axes, label="score (percent)")
    for values, scale in ((columns, axes.set_xscale), (rows, axes.set_yscale)):
        scale("log" if values[0] > 0 and values[-1] / values[0] > DECADES else "linear")


def curves(across: str, by: str | None, standings: Sequence[TrialStatus], path: Path) -> Path:
    """Draw mean and standard deviation over seeds along one key, a line for each value of another; hollow marks were pruned."""
    groups = sorted({number(status, by) for status in standings} - {None}) if by is not None else [None]  # type: ignore[type-var]
    with canvas((7.4, 4.6), path) as figure:
        axes = figure.subplots()
        xs = sorted({x for status in standings if (x := number(status, across)) is not None})
        spread = 1.0
        if xs[0] > 0 and xs[-1] / xs[0] > DECADES:
            axes.set_xscale("log")
            spread = 1.03  # so that bars at one value do not hide each other
        if len(xs) <= MOST_TICKS:
            axes.set_xticks(xs, [show(x) for x in xs])
            axes.set_xticks([], minor=True)
        for place, group in enumerate(groups):
            members = [status for status in standings if by is None or number(status, by) == group]
            colour = PALETTE[place % len(PALETTE)]
            label = None if by is None else f"{_short(by)} {show(group)}"
            shift = spread ** (place - (len(groups) - 1) / 2)
            _curve(axes, across, [status for status in members if status.state == "finished"], colour, label, shift)
            for status in members:
                x, y = number(status, across), status.score
                if status.state == "pruned" and x is not None and y is not None:
                    axes.scatter(x * shift, y, facecolor="none", edgecolor=colour, s=30, zorder=3)
        axes.set_title(
            "Validation score: mean ± deviation of finished trials;\nopen circles: the score at which asha ended a trial"
        )
        axes.set_xlabel(across)
        axes.set_ylabel("score (percent)")
        if by is not None:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return path


def _curve(axes: Axes, across: str, finished: Sequence[TrialStatus], colour: str, label: str | None, shift: float) -> None:
    points: dict[float, list[float]] = {}
    for status in finished:
        x = number(status, across)
        if x is not None and status.score is not None:
            points.setdefault(x, []).append(status.score)
    xs = sorted(points)
    means = [statistics.fmean(points[x]) for x in xs]
    spreads = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
    shifted = [x * shift for x in xs]
    axes.errorbar(shifted, means, yerr=spreads, color=colour, label=label, marker="o", markersize=4, capsize=3)
    for x in xs:
        axes.scatter([x * shift] * len(points[x]), points[x], color=colour, s=10, alpha=0.5)


def _short(key: str) -> str:
    return key.rpartition(".")[2]
