"""Pictures of a run: pure functions from the records of `metrics.jsonl` to PNG files.

A record is one parsed line: {"step", "stage", "metrics": {name: number}} and, on some lines of the source stage,
"particles": {"projection": [M][C], "kernel": [M][M]} (`storage.snapshots` reads those kept in files); on target stages that
retrieve prompts of K source tasks, "similarity": {"tasks": [K], "between": [K][K], "target": [K], "weights": [K]}. Colours are
Okabe & Ito's, told apart by colour-blind readers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from bpt_dist.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from torch import Tensor


Record = Mapping[str, Any]

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D00", "#595959")
INK, GREY = "#222222", "#888888"
DPI = 150
SOURCE_LOSS, TARGET_LOSS = "source/loss/", "target/loss"
AT_MEAN, SHARE = "svgd/loss_at_mean", "svgd/driving_by_others"
WRITTEN_OUT = 12  # up to so many particles the kernel's values are written into the picture
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}
MOST_FRAMES = 20


def draw_run(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw into `folder` every picture the records have data for, and return the files."""
    drawn: list[Path] = []
    snapshots = _snapshots(records)
    if _losses(records):
        drawn.append(loss_per_task(records, folder / "loss_per_task.png"))
    if _similarities(records):
        drawn.append(task_similarity(records, folder / "task_similarity.png"))
    if snapshots:
        step, last = max(snapshots.items())
        projections = {number: snapshot["projection"] for number, snapshot in snapshots.items()}
        drawn.append(particle_paths(projections, folder / "particle_paths.png"))
        drawn.append(kernel_heat_map(last["kernel"], folder / "kernel.png", step))
        drawn.append(svgd_traces(records, folder / "svgd.png"))
        drawn.append(panel(records, folder / "panel.png"))
    return drawn


def particle_paths(projections_by_step: Mapping[int, Sequence[Sequence[float]]], path: Path) -> Path:
    """Draw the way of every particle and of their mean in the two main directions of the whole trajectory (PCA)."""
    with canvas((6.4, 5.2), path) as figure:
        _draw_paths(figure, projections_by_step)
    return path


def kernel_heat_map(kernel: Sequence[Sequence[float]], path: Path, step: int) -> Path:
    """Draw the kernel between all pairs of particles; the scale is always 0 to 1, so pictures compare."""
    with canvas((5.4, 4.6), path) as figure:
        _draw_kernel(figure, kernel, step)
    return path


def svgd_traces(records: Sequence[Record], path: Path) -> Path:
    """Draw distances with the root of the bandwidth, and the two terms of the direction, on log axes over steps."""
    with canvas((6.8, 5.6), path) as figure:
        _draw_traces(figure, records)
    return path


def loss_per_task(records: Sequence[Record], path: Path) -> Path:
    """Draw the loss of every task over steps, source and target tasks apart: thin as recorded, thick smoothed."""
    groups = _losses(records)
    with canvas((6.8, 3.6 * len(groups)), path) as figure:
        _draw_losses(figure, groups)
    return path


def task_similarity(records: Sequence[Record], path: Path) -> Path:
    """Draw how similar source tasks are to each other and to every target, and which of them each target starts from."""
    similarities = _similarities(records)
    names = next(iter(similarities.values()))["tasks"]
    with canvas((max(5.4, 2.6 + 0.8 * len(names)), 2.4 + 0.42 * (len(names) + len(similarities))), path) as figure:
        _draw_similarities(figure, similarities)
    return path


def panel(records: Sequence[Record], path: Path) -> Path:
    """Draw the source stage on one page: particle paths, kernel, traces and losses, and whether the particles belong together."""
    snapshots = _snapshots(records)
    step, last = max(snapshots.items())
    has_shares = any(SHARE in record["metrics"] for record in records)  # runs of earlier versions lack them
    with canvas((13.0, 14.0 if has_shares else 10.0), path) as figure:
        parts: Any = figure.subfigures(3 if has_shares else 2, 2, wspace=0.03, hspace=0.03)
        _draw_paths(parts[0, 0], {number: snapshot["projection"] for number, snapshot in snapshots.items()})
        _draw_kernel(parts[0, 1], last["kernel"], step)
        _draw_traces(parts[1, 0], records)
        _draw_losses(parts[1, 1], dict(list(_losses(records).items())[:1]))
        if has_shares:
            _draw_loss_at_mean(parts[2, 0], records)
            _draw_togetherness(parts[2, 1], records)
    return path


@contextmanager
def canvas(size: tuple[float, float], path: Path) -> Iterator[Figure]:
    """Yield a figure and write it to `path` atomically; no pyplot: no state outlives it and no display is needed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        FigureCanvasAgg(figure)
        yield figure
        image = io.BytesIO()
        figure.savefig(image, format=path.suffix.removeprefix("."))
        write_atomic(path, image.getvalue())


def _snapshots(records: Sequence[Record]) -> dict[int, Mapping[str, Any]]:
    """Return the particle snapshots by step."""
    return {record["step"]: record["particles"] for record in records if record.get("particles")}


def _similarities(records: Sequence[Record]) -> dict[str, Mapping[str, Any]]:
    """Return what each target stage knows of its similarity to the source tasks, by the target's name."""
    return {record["stage"].removeprefix("target/"): record["similarity"] for record in records if record.get("similarity")}


def _series(records: Sequence[Record], name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return steps and values of one metric."""
    pairs = [(record["step"], record["metrics"][name]) for record in records if name in record["metrics"]]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return numpy.array(steps, dtype=float), numpy.array(values, dtype=float)


def _losses(records: Sequence[Record]) -> dict[str, dict[str, tuple[numpy.ndarray, numpy.ndarray]]]:
    """Return the losses by group (source tasks, target tasks) and task; groups without a loss are left out."""
    names = dict.fromkeys(name for record in records for name in record["metrics"] if name.startswith(SOURCE_LOSS))
    source = {name.removeprefix(SOURCE_LOSS): _series(records, name) for name in names}
    stages = dict.fromkeys(record["stage"] for record in records if TARGET_LOSS in record["metrics"])
    target = {stage.removeprefix("target/"): _series([r for r in records if r["stage"] == stage], TARGET_LOSS) for stage in stages}
    return {group: tasks for group, tasks in (("source", source), ("target", target)) if tasks}


def _draw_paths(figure: FigureBase, projections_by_step: Mapping[int, Sequence[Sequence[float]]]) -> None:
    from sklearn.decomposition import PCA

    steps = sorted(projections_by_step)
    trajectory = numpy.array([projections_by_step[step] for step in steps], dtype=float)  # [S, M, C]
    points = trajectory.reshape(-1, trajectory.shape[-1])
    with numpy.errstate(invalid="ignore"):  # a cloud that never moved has no variance to share out
        components = PCA(n_components=min(2, *points.shape)).fit(points)
    plane = numpy.zeros((len(points), 2))
    plane[:, : components.n_components_] = components.transform(points)
    plane, explained = plane.reshape(*trajectory.shape[:2], 2), numpy.zeros(2)
    explained[: components.n_components_] = numpy.nan_to_num(components.explained_variance_ratio_)
    axes, num_particles = figure.subplots(), trajectory.shape[1]
    for m in range(num_particles):
        colour = PALETTE[m % len(PALETTE)]
        label = f"particle {m}" if num_particles <= len(PALETTE) else f"{num_particles} particles" if m == 0 else None
        axes.plot(*plane[:, m].T, color=colour, alpha=0.75, linewidth=1.3, label=label)
        _mark(axes, plane[0, m], facecolor="white", edgecolor=colour, s=34, zorder=3)
        _mark(axes, plane[-1, m], color=colour, s=34, zorder=3)
    mean = plane.mean(1)
    axes.plot(*mean.T, color=INK, linewidth=1.3, linestyle=(0, (4, 2)), zorder=4)
    _mark(axes, mean[0], marker="*", facecolor="white", edgecolor=INK, s=170, zorder=5)
    _mark(axes, mean[-1], marker="*", color=INK, s=170, zorder=5, label="their mean\n(hollow: start)")
    axes.set_title(f"Particles, steps {steps[0]} to {steps[-1]}; the plane shows {explained.sum():.0%} of the variance")
    axes.set_xlabel(f"first component ({explained[0]:.0%})")
    axes.set_ylabel(f"second component ({explained[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _mark(axes: Axes, point: numpy.ndarray | Tensor, **style: Any) -> None:
    """Draw one marker."""
    axes.scatter(float(point[0]), float(point[1]), **style)


def _draw_kernel(figure: FigureBase, kernel: Sequence[Sequence[float]], step: int) -> None:
    values, axes = numpy.array(kernel, dtype=float), figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis")
    figure.colorbar(image, ax=axes, label="kernel value", shrink=0.9)
    num_particles = len(values)
    if num_particles <= WRITTEN_OUT:
        for (i, j), value in numpy.ndenumerate(values):
            text = f"{value:.2f}" if value >= 0.005 or value == 0 else "<.01"  # noqa: PLR2004 - rounds to 0.00
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="black" if value > 0.5 else "white")  # noqa: PLR2004
        axes.set_xticks(range(num_particles))
        axes.set_yticks(range(num_particles))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("particle")
    axes.set_ylabel("particle")
    axes.set_title(f"Kernel at step {step}")


def _draw_similarities(figure: FigureBase, similarities: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw rows of source tasks above rows of targets over columns of source tasks; a frame marks what a target starts from."""
    from matplotlib.patches import Rectangle

    first = next(iter(similarities.values()))
    sources, num_sources = first["tasks"], len(first["tasks"])
    values = numpy.array([*first["between"], *(each["target"] for each in similarities.values())], dtype=float)
    weights = numpy.array([*numpy.zeros((num_sources, num_sources)), *(each["weights"] for each in similarities.values())])
    axes = figure.subplots()
    # Cosines of trained prompts are close together, so the colours span what there is; the numbers compare between pictures.
    image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=values.min(), vmax=max(values.max(), values.min() + 1e-6))
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.9)
    middle, span = (values.min() + values.max()) / 2, numpy.ptp(values)
    digits = max(2, 1 - math.floor(math.log10(span))) if span else 2  # so that neighbours differ in print
    for (row, column), value in numpy.ndenumerate(values):
        share = f"\n({weights[row, column]:.0%})" if 0 < weights[row, column] < 1 else ""
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.{digits}f}{share}", ha="center", va="center", fontsize=8, color=colour, linespacing=0.95)
        if weights[row, column]:
            axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=PALETTE[3], linewidth=2))
    axes.axhline(num_sources - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(num_sources), sources, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(values)), [*sources, *similarities])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("source task")
    axes.set_title("Similarity of task embeddings;\nframed: what a target starts from")


def _draw_traces(figure: FigureBase, records: Sequence[Record]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps, low = _series(records, "svgd/distance_min")
    high, bandwidth = (_series(records, f"svgd/{name}")[1] for name in ("distance_max", "bandwidth"))
    if (low > 0).any():
        upper.fill_between(steps, low, high, color=PALETTE[0], alpha=0.18, linewidth=0, label="smallest to largest")
    _log_line(upper, *_series(records, "svgd/distance_median"), PALETTE[0], "median distance")
    _log_line(upper, steps, numpy.sqrt(bandwidth), PALETTE[3], "root of bandwidth", linestyle=(0, (4, 2)))
    _log_line(lower, *_series(records, "svgd/driving_norm"), PALETTE[2], "driving term")
    _log_line(lower, *_series(records, "svgd/repulsive_norm"), PALETTE[4], "repulsive term", linestyle=(0, (4, 2)))
    for axes, title in ((upper, "Distances between particles"), (lower, "Mean norm of the Stein direction's terms")):
        axes.set_title(title)
        _plain_log_ticks(axes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    lower.set_xlabel("step")


def _draw_loss_at_mean(figure: FigureBase, records: Sequence[Record]) -> None:
    """Draw the mean loss of the particles and the loss at their mean: where the second is higher, the mean is between modes."""
    axes = figure.subplots()
    series = (("source/loss", PALETTE[0], "mean of the\nparticles' losses", "-"), (AT_MEAN, INK, "at their mean", (0, (4, 2))))
    for name, colour, label, dashes in series:
        steps, values = _series(records, name)
        axes.plot(steps, values, color=colour, alpha=0.15, linewidth=0.7)
        axes.plot(steps, _smoothed(values), color=colour, linestyle=dashes, label=label if len(values) else f"{label}:\nno record")
    axes.set_title("Loss of the particles and at their mean")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean over tasks")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_togetherness(figure: FigureBase, records: Sequence[Record]) -> None:
    """Draw how far apart the particles are in their own units, and how much they still drive each other."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(*_series(records, "svgd/distance_relative"), color=PALETTE[0])
    upper.set_title("Median distance in units of the prompts' RMS")
    lower.plot(*_series(records, SHARE), color=PALETTE[2])
    lower.set_title("Share of the driving force that is another particle's")
    upper.set_ylim(bottom=0)
    lower.set_ylim(0, 1)
    lower.set_xlabel("step")


def _log_line(axes: Axes, steps: numpy.ndarray, values: numpy.ndarray, colour: str, label: str, **style: Any) -> None:
    """Draw a line on a log axis; a series that is nowhere positive (one particle has no pairs) is said, not drawn."""
    if not (values > 0).any():
        axes.plot([], [], color=colour, label=f"{label}: 0", **style)
        return
    axes.set_yscale("log")
    axes.plot(steps, numpy.where(values > 0, values, numpy.nan), color=colour, label=label, **style)


def _plain_log_ticks(axes: Axes) -> None:
    """Write 0.02 and not 2 x 10^-2, and show at least a factor of ten, so that noise does not look like a trend."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if axes.get_yscale() != "log":
        return
    low, high = axes.get_ylim()
    stretch = max(1.0, (10 * low / high) ** 0.5)
    axes.set_ylim(low / stretch, high * stretch)
    subdivisions = (1, 2, 5) if high / low < 10**3 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subdivisions))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_losses(figure: FigureBase, groups: Mapping[str, Mapping[str, tuple[numpy.ndarray, numpy.ndarray]]]) -> None:
    rows = figure.subplots(max(1, len(groups)), 1, squeeze=False)[:, 0]
    for axes, (group, tasks) in zip(rows, groups.items(), strict=False):
        for number, (task, (steps, values)) in enumerate(tasks.items()):
            colour, dashes = PALETTE[number % len(PALETTE)], ("-", (0, (4, 2)), (0, (1, 1.5)))[number // len(PALETTE) % 3]
            axes.plot(steps, values, color=colour, alpha=0.15, linewidth=0.7)
            axes.plot(steps, _smoothed(values), color=colour, linestyle=dashes, label=task)
        axes.set_title(f"Loss of each {group} task")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _smoothed(values: numpy.ndarray) -> numpy.ndarray:
    """Return the mean over a window of about a tenth of the run, shorter at both ends."""
    half = len(values) // 20
    if not len(values):
        return values
    total = numpy.concatenate([[0.0], numpy.cumsum(values)])
    start = numpy.maximum(numpy.arange(len(values)) - half, 0)
    stop = numpy.minimum(numpy.arange(len(values)) + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def draw_steps(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw `particles/step-N.png` and `kernel/step-N.png` below `folder` for up to 20 evenly spread steps; return the files.

    A record shows the particles before the update of its step. The first step's are those that nothing has moved yet: step 0.
    """
    snapshots = _snapshots(records)
    if not snapshots:
        return []
    places = numpy.linspace(0, len(snapshots) - 1, min(MOST_FRAMES, len(snapshots))).round().astype(int)
    steps = sorted(snapshots)
    plane, explained = _plane([snapshots[step] for step in steps])
    drawn = []
    for place in dict.fromkeys(places.tolist()):
        shown = 0 if steps[place] == 1 else steps[place]
        name = f"step-{shown:08d}.png"
        drawn.append(_particles(plane[: place + 1], plane, explained, shown, folder / "particles" / name))
        drawn.append(kernel_heat_map(snapshots[steps[place]]["kernel"], folder / "kernel" / name, shown))
    if steps[0] > 1:
        # A run of an earlier version has no record of the start. MLflow's slider opens at step 0 and would show nothing there: the
        # first picture there is, whose title says its step.
        drawn += [write_atomic(file.with_name("step-00000000.png"), file.read_bytes()) for file in drawn[:2]]
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
