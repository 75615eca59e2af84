"""Pictures of a sweep: the score over sigma and learning rate, and over sigma with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from bpt_dist.figures import GREY, INK, PALETTE, canvas
from bpt_dist.sweep_record import Standing
from bpt_dist.sweep_settings import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 5.0  # from this ratio of largest to smallest value on, an axis is logarithmic
MOST_TICKS = 12


def draw(keys: Sequence[str], standings: Sequence[Standing], folder: Path) -> list[Path]:
    """Draw into `folder` what the trials have data for, and return the files."""
    scored = [one for one in standings if one.state in ("finished", "pruned") and one.score is not None]
    axes = numeric_keys(keys, scored)
    drawn = []
    if len(axes) > 1:
        drawn.append(heat_map(axes[0], axes[1], scored, folder / "heat_map.png"))
    if axes:
        drawn.append(curves(axes[0], axes[1] if len(axes) > 1 else None, scored, folder / "curves.png"))
    return drawn


def numeric_keys(keys: Sequence[str], standings: Sequence[Standing]) -> list[str]:
    """Return the searched keys with several numeric values: sigma first, then learning rates, then the others."""

    def rank(key: str) -> int:
        last = key.rpartition(".")[2]
        return 0 if last.startswith("sigma") else 1 if last.startswith("lr") else 2

    found = [key for key in keys if len({x for one in standings if (x := number(one, key)) is not None}) > 1]
    return sorted(found, key=rank)


def number(one: Standing, key: str) -> float | None:
    """Return the value of a key if it is a number."""
    value = one.values.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def heat_map(across: str, up: str, standings: Sequence[Standing], path: Path) -> Path:
    """Draw the mean validation score of the finished trials at every pair of values; pairs without one are open.

    Few values lie side by side as in a table, with the numbers written in; many lie on axes of numbers.
    """
    cells: dict[tuple[float, float], list[Standing]] = {}
    for one in standings:
        x, y = number(one, across), number(one, up)
        if x is not None and y is not None:
            cells.setdefault((x, y), []).append(one)
    whole = {
        place: [one.score for one in ones if one.state == "finished" and one.score is not None] for place, ones in cells.items()
    }
    means = {place: statistics.fmean(scores) for place, scores in whole.items() if scores}
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


Cells = Mapping[tuple[float, float], Sequence[Standing]]
Means = Mapping[tuple[float, float], float]


def _tiles(axes: Axes, cells: Cells, means: Means, columns: Sequence[float], rows: Sequence[float]) -> None:
    values = numpy.full((len(rows), len(columns)), numpy.nan)
    for (x, y), score in means.items():
        values[rows.index(y), columns.index(x)] = score
    image = axes.imshow(values, cmap="cividis", aspect="auto", origin="lower")
    axes.figure.colorbar(image, ax=axes, label="score (percent)")
    middle = (min(means.values()) + max(means.values())) / 2 if means else 0.0
    for (x, y), ones in cells.items():
        mean = means.get((x, y))
        scores = [one.score for one in ones if one.score is not None]
        finished = sum(one.state == "finished" for one in ones)
        text = f"{statistics.fmean(scores) if mean is None else mean:.1f}"
        text += f"\nat step {max(one.step for one in ones)}" if mean is None else f"\n{finished} of {len(ones)}"
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


def curves(across: str, by: str | None, standings: Sequence[Standing], path: Path) -> Path:
    """Draw mean and standard deviation over seeds along one key, a line for each value of another; hollow marks were pruned."""
    groups = sorted({number(one, by) for one in standings} - {None}) if by is not None else [None]  # type: ignore[type-var]
    with canvas((7.4, 4.6), path) as figure:
        axes = figure.subplots()
        xs = sorted({x for one in standings if (x := number(one, across)) is not None})
        spread = 1.0
        if xs[0] > 0 and xs[-1] / xs[0] > DECADES:
            axes.set_xscale("log")
            spread = 1.03  # so that bars at one value do not hide each other
        if len(xs) <= MOST_TICKS:
            axes.set_xticks(xs, [show(x) for x in xs])
            axes.set_xticks([], minor=True)
        for place, group in enumerate(groups):
            own = [one for one in standings if by is None or number(one, by) == group]
            colour = PALETTE[place % len(PALETTE)]
            label = None if by is None else f"{_short(by)} {show(group)}"
            shift = spread ** (place - (len(groups) - 1) / 2)
            _curve(axes, across, [one for one in own if one.state == "finished"], colour, label, shift)
            for one in own:
                x, y = number(one, across), one.score
                if one.state == "pruned" and x is not None and y is not None:
                    axes.scatter(x * shift, y, facecolor="none", edgecolor=colour, s=30, zorder=3)
        axes.set_title(
            "Validation score: mean ± deviation of finished trials;\nopen circles: the score at which asha ended a trial"
        )
        axes.set_xlabel(across)
        axes.set_ylabel("score (percent)")
        if by is not None:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return path


def _curve(axes: Axes, across: str, finished: Sequence[Standing], colour: str, label: str | None, shift: float) -> None:
    points: dict[float, list[float]] = {}
    for one in finished:
        x = number(one, across)
        if x is not None and one.score is not None:
            points.setdefault(x, []).append(one.score)
    xs = sorted(points)
    means = [statistics.fmean(points[x]) for x in xs]
    spreads = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
    shifted = [x * shift for x in xs]
    axes.errorbar(shifted, means, yerr=spreads, color=colour, label=label, marker="o", markersize=4, capsize=3)
    for x in xs:
        axes.scatter([x * shift] * len(points[x]), points[x], color=colour, s=10, alpha=0.5)


def _short(key: str) -> str:
    return key.rpartition(".")[2]
