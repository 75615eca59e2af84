"""Pictures by step: particles on their way and their kernel, frames of equal size and scale for a slider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from bpt_dist.figures import INK, PALETTE, Record, canvas, kernel_heat_map
from bpt_dist.files import write_atomic

MOST_FRAMES = 20


def draw_steps(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw `particles/step-N.png` and `kernel/step-N.png` below `folder` for up to 20 evenly spread steps; return the files."""
    snapshots = {record["step"]: record["particles"] for record in records if record.get("particles")}
    if not snapshots:
        return []
    places = numpy.linspace(0, len(snapshots) - 1, min(MOST_FRAMES, len(snapshots))).round().astype(int)
    steps = sorted(snapshots)
    plane, explained = _plane([snapshots[step] for step in steps])
    drawn = []
    for place in dict.fromkeys(places.tolist()):
        name = f"step-{steps[place]:08d}.png"
        drawn.append(_particles(plane[: place + 1], plane, explained, steps[place], folder / "particles" / name))
        drawn.append(kernel_heat_map(snapshots[steps[place]]["kernel"], folder / "kernel" / name, steps[place]))
    if steps[0] > 0:
        # MLflow's slider opens at step 0 and would show nothing there: the last picture, whose title says its step.
        drawn += [write_atomic(file.with_name("step-00000000.png"), file.read_bytes()) for file in drawn[-2:]]
    return drawn


def _plane(snapshots: Sequence[Mapping[str, Any]]) -> tuple[numpy.ndarray, float]:
    """Return all particles of all steps in the two main directions of the whole way [S, M, 2], and the variance these show."""
    points = numpy.array([snapshot["projection"] for snapshot in snapshots], dtype=float)  # [S, M, C]
    flat = points.reshape(-1, points.shape[-1]) - points.mean((0, 1))
    _, values, directions = numpy.linalg.svd(flat, full_matrices=False)
    plane = numpy.zeros((len(flat), 2))
    plane[:, : len(directions[:2])] = flat @ directions[:2].T
    total = float((values**2).sum())
    return plane.reshape(*points.shape[:2], 2), float((values[:2] ** 2).sum()) / total if total else 0.0


def _particles(way: numpy.ndarray, whole: numpy.ndarray, explained: float, step: int, path: Path) -> Path:
    """Draw the way so far on the axes of the whole way."""
    with canvas((5.4, 4.6), path) as figure:
        axes = figure.subplots()
        for m in range(way.shape[1]):
            colour = PALETTE[m % len(PALETTE)]
            axes.plot(*way[:, m].T, color=colour, alpha=0.6, linewidth=1.2)
            axes.scatter(float(way[-1, m, 0]), float(way[-1, m, 1]), color=colour, s=40, zorder=3)
        mean = way.mean(1)
        axes.plot(*mean.T, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.scatter(float(mean[-1, 0]), float(mean[-1, 1]), marker="*", color=INK, s=150, zorder=4)
        low, high = whole.min((0, 1)), whole.max((0, 1))
        margin = 0.06 * numpy.maximum(high - low, 1e-9)
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axes.set_title(f"Particles at step {step}; the plane shows {explained:.0%} of the variance")
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")
    return path
