"""The pictures: what they state is true, every label is readable, and drawing leaves nothing behind."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from matplotlib.figure import FigureBase
from matplotlib.image import imread
from matplotlib.text import Text

from bpt_dist.artifacts import figures
from bpt_dist.commands import example
from bpt_dist.commands.example import run
from bpt_dist.svgd import initial_particles, stein_direction, summarize

TASKS = ("mnli", "qnli", "qqp", "sst2", "squad", "record")


def source_records(num_particles: int, steps: int = 60) -> list[dict[str, Any]]:
    """Records as a source stage writes them: particles drawn to one goal a task, a snapshot every tenth step."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(4, 16, generator=generator)
    particles = initial_particles(prompt, num_particles, 0.1, generator)
    goals = prompt + torch.randn(len(TASKS), 4, 16, generator=generator)
    records = []
    for step in range(steps):
        direction = stein_direction(particles, (goals.mean(0) - particles) * 0.1)
        losses = {f"source/loss/{task}": float((particles - goal).square().mean()) for task, goal in zip(TASKS, goals, strict=True)}
        metrics = {f"svgd/{name}": value for name, value in summarize(direction, particles).items()} | losses
        metrics["source/loss"] = sum(losses.values()) / len(losses)
        if num_particles > 1:
            metrics["svgd/loss_at_mean"] = float((particles.mean(0) - goals).square().mean())
        snapshot = {"projection": particles.flatten(1).tolist(), "kernel": direction.kernel.tolist()}
        records.append({"step": step, "stage": "source", "metrics": metrics} | ({} if step % 10 else {"particles": snapshot}))
        particles = particles + direction.phi
    return records


def target_records() -> list[dict[str, Any]]:
    return [
        {"step": step, "stage": f"target/{task}", "metrics": {"target/loss": scale * math.exp(-step / 20)}}
        for task, scale in (("rte", 1.0), ("cb", 2.0))
        for step in range(50)
    ]


def similarity_records(num_targets: int = 3) -> list[dict[str, Any]]:
    """Records as targets write them that retrieve prompts: each next target mixes one more source task."""
    generator = numpy.random.default_rng(0)
    between = numpy.corrcoef(generator.normal(size=(len(TASKS), 12)) + 0.7).tolist()
    records = []
    for number, target in enumerate(("rte", "multirc", "cola")[:num_targets]):
        similarity, weights = generator.uniform(0.1, 0.9, len(TASKS)), numpy.zeros(len(TASKS))
        best = similarity.argsort()[::-1][: number + 1]
        weights[best] = similarity[best] / similarity[best].sum()
        said = {"tasks": list(TASKS), "between": between, "target": similarity.tolist(), "weights": weights.tolist()}
        records.append({"step": 1, "stage": f"target/{target}", "metrics": {}, "similarity": said})
    return records


def visible_texts(figure: FigureBase) -> list[Text]:
    """Every text on the page; labels of ticks beyond the limits of their axis exist, but are not drawn."""
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]


def projections(records: list[dict[str, Any]]) -> dict[int, Any]:
    return {record["step"]: record["particles"]["projection"] for record in records if "particles" in record}


DRAWINGS: dict[str, Callable[[FigureBase, int], None]] = {
    "paths": lambda figure, m: figures._draw_paths(figure, projections(source_records(m))),
    "kernel": lambda figure, m: figures._draw_kernel(figure, source_records(m)[-10]["particles"]["kernel"], 50),
    "traces": lambda figure, m: figures._draw_traces(figure, source_records(m)),
    "loss at the mean": lambda figure, m: figures._draw_loss_at_mean(figure, source_records(m)),
    "togetherness": lambda figure, m: figures._draw_togetherness(figure, source_records(m)),
    "losses": lambda figure, m: figures._draw_losses(figure, figures._losses(source_records(m) + target_records())),
    "similarities": lambda figure, m: figures._draw_similarities(figure, figures._similarities(similarity_records(m))),
    "product": lambda figure, m: example._draw_product(figure.subplots(), run(num_particles=m, steps=100)),
}


@pytest.mark.parametrize(
    ("name", "num_particles"),
    [
        *itertools.product(("paths", "kernel", "traces", "loss at the mean", "togetherness"), (1, 5, 12)),
        ("losses", 5),
        ("similarities", 3),
        ("product", 50),
    ],
)
def test_every_label_is_on_the_page_and_none_covers_another(name, num_particles, tmp_path):
    with figures.canvas((7.6, 5.8), tmp_path / "drawn.png") as figure:
        DRAWINGS[name](figure, num_particles)
    page = figure.bbox
    boxes = {text: text.get_window_extent() for text in visible_texts(figure)}
    for text, box in boxes.items():
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, text.get_text()
    for (first, a), (second, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), (first.get_text(), second.get_text())


def test_explained_variance_is_that_of_a_singular_value_decomposition_of_the_whole_trajectory(tmp_path):
    trajectory = projections(source_records(5))
    points = numpy.concatenate([numpy.array(snapshot) for snapshot in trajectory.values()])
    variances = numpy.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    share = variances[:2] / variances.sum()
    with figures.canvas((6.4, 5.2), tmp_path / "paths.png") as figure:
        figures._draw_paths(figure, trajectory)
    (axes,) = figure.axes
    assert axes.get_title(loc="left").endswith(f"shows {share.sum():.0%} of the variance")
    assert axes.get_xlabel() == f"first component ({share[0]:.0%})"
    assert axes.get_ylabel() == f"second component ({share[1]:.0%})"


def test_the_star_is_the_mean_of_the_particles(tmp_path):
    with figures.canvas((6.4, 5.2), tmp_path / "paths.png") as figure:
        figures._draw_paths(figure, projections(source_records(5)))
    ends = numpy.array([line.get_xydata()[-1] for line in figure.axes[0].lines])
    numpy.testing.assert_allclose(ends[-1], ends[:-1].mean(0))


def test_particles_that_never_moved_are_still_drawn(tmp_path):
    assert figures.particle_paths({0: [[1.0, 2.0]], 5: [[1.0, 2.0]]}, tmp_path / "still.png").stat().st_size > 0


def test_the_kernel_scale_is_always_zero_to_one_with_written_values(tmp_path):
    with figures.canvas((5.4, 4.6), tmp_path / "kernel.png") as figure:
        figures._draw_kernel(figure, [[1.0, 0.4, 0.001], [0.4, 1.0, 0.0], [0.001, 0.0, 1.0]], step=7)
    (image,) = figure.axes[0].images
    assert image.get_clim() == (0, 1)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["1.00", "0.40", "<.01", "0.40", "1.00", "0.00", "<.01", "0.00", "1.00"]
    assert figure.axes[0].get_title(loc="left") == "Kernel at step 7"


def test_the_similarity_matrix_has_sources_above_targets_and_frames_what_is_retrieved(tmp_path):
    records = similarity_records(2)
    with figures.canvas((7.6, 5.8), tmp_path / "similarity.png") as figure:
        figures._draw_similarities(figure, figures._similarities(records))
    axes, said = figure.axes[0], [record["similarity"] for record in records]
    expected = numpy.array([*said[0]["between"], said[0]["target"], said[1]["target"]])
    numpy.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert [text.get_text() for text in axes.get_yticklabels()] == [*TASKS, "rte", "multirc"]
    framed = [(round(patch.get_y() + 0.44), round(patch.get_x() + 0.46)) for patch in axes.patches]
    rows = [(len(TASKS) + row, column) for row, one in enumerate(said) for column, weight in enumerate(one["weights"]) if weight]
    assert sorted(framed) == sorted(rows)
    shares = [text.get_text().partition("(")[2] for text in axes.texts if "(" in text.get_text()]
    assert sorted(shares) == sorted(f"{weight:.0%})" for weight in said[1]["weights"] if weight)


def test_one_particle_says_that_it_has_no_distances(tmp_path):
    with figures.canvas((6.8, 5.6), tmp_path / "svgd.png") as figure:
        figures._draw_traces(figure, source_records(1))
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert labels == ["median distance: 0", "root of bandwidth", "driving term", "repulsive term: 0"]


def test_smoothing_keeps_constants_and_straight_lines():
    line = numpy.linspace(3, 5, 101)
    smooth = figures._smoothed(line)
    numpy.testing.assert_allclose(smooth[5:-5], line[5:-5])
    numpy.testing.assert_allclose(figures._smoothed(numpy.full(7, 2.5)), 2.5)
    assert figures._smoothed(numpy.array([4.0])).tolist() == [4.0]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], []),
        (target_records(), ["loss_per_task.png"]),
        (target_records() + similarity_records(), ["loss_per_task.png", "task_similarity.png"]),
        (
            source_records(5) + target_records(),
            ["loss_per_task.png", "particle_paths.png", "kernel.png", "svgd.png", "panel.png"],
        ),
    ],
    ids=["no records", "a method without particles", "a method that retrieves", "BPT"],
)
def test_a_run_gets_the_pictures_it_has_records_for(records, expected, tmp_path):
    drawn = figures.draw_run(records, tmp_path / "figures")
    assert [path.name for path in drawn] == expected
    for path in drawn:
        pixels = imread(path)[..., :3]
        assert 0.005 < (pixels.min(axis=-1) < 0.9).mean() < 0.9, f"{path.name} is blank or black"


def test_the_same_records_give_the_same_bytes(tmp_path):
    one, two = (figures.panel(source_records(3), tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two


def test_the_gaussian_product_picture_names_both_distances(tmp_path):
    result = run(num_particles=20, steps=100)
    with figures.canvas((7.6, 5.8), tmp_path / "product.png") as figure:
        example._draw_product(figure.subplots(), result)
    title = figure.axes[0].get_title(loc="left")
    assert f"{result.svgd_error:.1g} away" in title
    assert f"optima {result.average_error:.2g}" in title
    assert example.gaussian_product(result, tmp_path / "again.png").read_bytes() == (tmp_path / "product.png").read_bytes()


def test_matplotlib_is_imported_only_to_draw_and_never_pyplot(tmp_path):
    """A run without figures must not pay for matplotlib; pyplot would need a display and keep figures alive."""
    script = (
        "import sys; from pathlib import Path; from bpt_dist.artifacts import figures\n"
        "assert not any(name.startswith(('matplotlib', 'sklearn', 'scipy')) for name in sys.modules)\n"
        "figures.kernel_heat_map([[1.0]], Path(sys.argv[1]), 0)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(figures.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "k.png")], check=True, cwd=root, timeout=60)
    assert (tmp_path / "k.png").stat().st_size > 0


def frames_of(records: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Draw frames and return, for each file of the particles, the last places drawn in it."""
    drawn: dict[str, Any] = {}
    plain = figures._particles

    def noted(way: Any, whole: Any, explained: float, step: int, path: Path) -> Path:
        drawn[path.name] = (step, way[-1])
        return plain(way, whole, explained, step, path)

    monkeypatch.setattr(figures, "_particles", noted)
    figures.draw_steps(records, folder)
    return drawn


def test_the_first_frame_of_the_slider_is_the_start(tmp_path, monkeypatch):
    """It was the last picture, put at step 0 because the slider opens there."""
    records = [{**record, "step": max(1, record["step"])} for record in source_records(3) if "particles" in record]
    assert [record["step"] for record in records] == [1, 10, 20, 30, 40, 50]
    drawn = frames_of(records, tmp_path, monkeypatch)
    assert sorted(path.name for path in (tmp_path / "particles").iterdir()) == [f"step-{n:08d}.png" for n in range(0, 60, 10)]
    assert [drawn[name][0] for name in sorted(drawn)] == [0, 10, 20, 30, 40, 50]
    plane, _ = figures._plane([record["particles"] for record in records])
    for number, name in enumerate(sorted(drawn)):
        numpy.testing.assert_array_equal(drawn[name][1], plane[number])


def test_a_run_without_a_record_of_the_start_opens_the_slider_with_its_first_picture(tmp_path, monkeypatch):
    records = [record for record in source_records(3) if record["step"] >= 10]
    frames_of(records, tmp_path, monkeypatch)
    for kind in ("particles", "kernel"):
        first, second, *_, last = sorted((tmp_path / kind).iterdir())
        assert (first.name, second.name) == ("step-00000000.png", "step-00000010.png")
        assert first.read_bytes() == second.read_bytes() != last.read_bytes()


def test_a_panel_of_an_earlier_version_has_the_four_parts_it_has_records_for(tmp_path):
    old = source_records(5)
    for record in old:
        for name in ("svgd/driving_by_others", "svgd/distance_relative", "svgd/loss_at_mean"):
            record["metrics"].pop(name)
    heights = [imread(figures.panel(records, tmp_path / "panel.png")).shape[0] for records in (old, source_records(5))]
    assert heights == [10 * figures.DPI, 14 * figures.DPI]
