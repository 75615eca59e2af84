"""Pictures of scores over a setting: a line a method with a band, pure functions from numbers to a PNG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bpt_dist.artifacts.figures import PALETTE, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"
LOGARITHMIC_FROM = 8.0  # the largest setting in units of the smallest


class Point(NamedTuple):
    """A mean at one value of the setting, with the interval that is its band; None where there is none."""

    setting: float
    mean: float
    interval: tuple[float, float] | None


class Curve(NamedTuple):
    """A line of the picture, its points in the order of their setting."""

    label: str
    points: tuple[Point, ...]


def draw_curves(curves: Sequence[Curve], path: Path, *, title: str, setting: str, score: str, best: float = math.inf) -> Path:
    """Draw every curve with its band into `path`; the axis of the setting is logarithmic where its values span a factor of 8.

    `setting` and `score` are the words at the axes. The axis of scores ends just above `best`, the highest there can be: a t
    interval goes beyond it.
    """
    with canvas((7.4, 4.8), path) as figure:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            _draw_curve(axes, curve, PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)])
        settings = sorted({point.setting for curve in curves for point in curve.points})
        if settings[0] > 0 and settings[-1] >= LOGARITHMIC_FROM * settings[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(settings, [f"{value:g}" for value in settings])
        axes.minorticks_off()
        axes.set_title(title)
        axes.set_xlabel(setting)
        axes.set_ylabel(score)
        axes.set_ylim(top=min(axes.get_ylim()[1], best + 0.01 * abs(best)))
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return path


def _draw_curve(axes: Axes, curve: Curve, colour: str, marker: str) -> None:
    axes.plot(
        [point.setting for point in curve.points], [point.mean for point in curve.points],
        color=colour, marker=marker, markersize=5, label=curve.label,
    )  # fmt: skip
    banded = [(point.setting, *point.interval) for point in curve.points if point.interval is not None]
    if len(banded) > 1:
        places, low, high = zip(*banded, strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
