"""Learning curves: the numbers beside the picture against sums by hand, what is refused, and sources that are learnt once."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import tiny_run
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from result_folders import finish, runs_of
from scipy import stats

from bpt_dist.artifacts.curves import Curve, Point, draw_curves
from bpt_dist.commands.main import main

SHOTS = (1, 4)


def rows_over_shots() -> list[dict]:
    bpt = [{"label": f"bpt-{k}", "data": {"shots": k}, "evaluation": {"predict": "ensemble"}} for k in SHOTS]
    return bpt + [
        {"label": f"prompt_tuning-{k}", "method": {"name": "prompt_tuning"}, "data": {"shots": k}, "target": {"lr": 0.3}}
        for k in SHOTS
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = runs_of(tmp_path, *rows_over_shots())
    for run in runs:
        base = 50.0 + 10 * (run.data.shots == SHOTS[1]) + run.seed**2
        finish(run, {"mood": base, "count": base + 2})
        if run.method.name == "bpt":
            finish(run, {"mood": base + 20, "count": base + 20}, "ensemble")
    return runs[0].directory.parent


def numbers(folder: Path) -> list[dict[str, str]]:
    with (folder / "score_over_data.shots.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_line_a_row_with_its_mean_and_interval_over_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(folder), "--over", "data.shots"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [str(folder / f"score_over_data.shots.{kind}") for kind in ("png", "csv")]
    lines = numbers(folder)
    assert [(line["line"], line["setting"]) for line in lines] == [
        (name, str(k)) for name in ("bpt", "bpt (ensemble)", "prompt_tuning") for k in SHOTS
    ]
    # Means over two tasks: 51, 52, 55 at one row a class.
    values = [51.0, 52.0, 55.0]
    interval = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    assert [float(lines[0][key]) for key in ("mean", "low", "high")] == pytest.approx([sum(values) / 3, *interval])
    assert (lines[0]["num_seeds"], lines[0]["seeds"], lines[0]["tasks"]) == ("3", "0 1 2", "mood count")
    assert imread(folder / "score_over_data.shots.png").std() > 0.01


def test_the_tasks_may_be_chosen(folder: Path, tmp_path: Path) -> None:
    assert main(["plot", str(folder), "--over", "data.shots", "--task", "mood", "--out", str(tmp_path / "out")]) == 0
    assert float(numbers(tmp_path / "out")[0]["mean"]) == pytest.approx((50 + 51 + 54) / 3)


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--over", "data.shotz"], "--over data.shotz: run bpt-1-s0 has no such key; did you mean data.shots?"),
     (["--over", "data.root"], "--over data.root: is None in run"),
     (["--over", "target.steps"], "have one value of it only"),
     (["--over", "data.shots", "--task", "moon"], "--task moon: is not in every run; those that are: mood, count"),
     (["--task", "mood"], "--task: has no effect without --over KEY; remove it")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_in_one_line(folder: Path, words: list[str], says: str, capsys) -> None:
    assert main(["plot", str(folder), *words]) in (2, 65)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_one_seed_has_a_line_without_a_band(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, *rows_over_shots()[2:], seeds=(0,))
    for run in runs:
        finish(run, {"mood": 60.0})
    assert main(["plot", str(runs[0].directory.parent), "--over", "data.shots"]) == 0
    assert [(line["low"], line["high"]) for line in numbers(runs[0].directory.parent)] == [("", "")] * 2


def test_a_picture_of_linear_settings_is_drawn_too(tmp_path: Path) -> None:
    points = tuple(Point(x, 50 + x, (49 + x, 52 + x)) for x in (0.0, 1.0, 2.0))
    file = draw_curves([Curve("one", points), Curve("two", points[:1])], tmp_path / "c.png", title="t", setting="x", score="y")
    assert imread(file).shape[2] == 4


def test_no_score_above_the_best_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tops: list[float] = []
    plain = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (tops.append(self.axes[0].get_ylim()[1]), plain(self, *a, **k)))
    for middle in (98.0, 60.0):
        points = tuple(Point(x, middle, (middle - 9, middle + 9)) for x in (1.0, 2.0))
        draw_curves([Curve("one", points)], tmp_path / "c.png", title="t", setting="x", score="y", best=100.0)
    assert tops[0] == 101.0
    assert 69 < tops[1] < 72


def test_sources_are_learnt_once_a_seed(tmp_path: Path) -> None:
    """A curve as shipped: the row with most shots learns the posterior, the others start from it."""
    world = tiny_run.world(tmp_path)
    first = {"label": "bpt-4", "data": {"shots": 4}}
    others = [{"label": f"bpt-{k}", "data": {"shots": k}, "source": {"posterior": str(world / "runs" / "run" / "bpt-4-s{seed}")}}
              for k in (1, 2)]  # fmt: skip
    plain = tiny_run.settings(world, {"name": "bpt"}, rows=[first, *others], seeds=[0, 1], data={"target_tasks": ["mood"]})
    file = world / "curve.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert main(["run-table", str(file), "--workers", "1"]) == 0
    folder = world / "runs" / "run"
    assert sorted(path.parts[-4] for path in folder.glob("*/source/posterior/posterior.json")) == ["bpt-4-s0", "bpt-4-s1"]
    assert main(["plot", str(folder), "--over", "data.shots"]) == 0
    assert [(line["setting"], line["num_seeds"]) for line in numbers(folder)] == [("1", "2"), ("2", "2"), ("4", "2")]
