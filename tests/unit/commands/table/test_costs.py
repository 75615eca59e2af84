"""The table of costs: against sums by hand over a written log, and against what a trained run was told to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
from result_folders import finish, runs_of

from bpt_dist.commands.main import main
from bpt_dist.commands.table.costs import costs_of
from bpt_dist.config import RunConfig
from bpt_dist.storage import layout


def write_log(run: RunConfig, *records: tuple[str, int, float, float]) -> None:
    lines = []
    for stage, step, seconds, tokens in records:
        part = stage.split("/")[0]
        metrics = {f"{part}/cost/seconds_per_step": seconds, f"{part}/cost/tokens_per_step": tokens, f"{part}/loss": 1.0}
        lines += [{"stage": stage, "step": step, "metrics": metrics}, {"stage": stage, "step": step, "metrics": {"x": 1.0}}]
    (run.directory / layout.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"label": "bpt"}, {"label": "pt", "method": {"name": "prompt_tuning"}, "target": {"lr": 0.3}}]
    for run in runs_of(tmp_path, *rows, seeds=(0, 1)):
        finish(run, {"mood": 50.0, "count": 60.0})
        target = [("target/mood", 1, 1.0, 10.0), ("target/mood", 5, 2.0, 20.0), ("target/count", 5, 4.0, 40.0)]
        source = [("source/teachers", 2, 1.0, 100.0), ("source", 4, 3.0 + run.seed, 1e6)]
        write_log(run, *(source if run.method.name == "bpt" else []), *target)
    return run.directory.parent


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_costs_are_sums_over_steps_and_means_over_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(folder), "--costs"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 4, lines
    found = {cells(line)[0]: cells(line)[1:] for line in lines[2:]}
    # Source: 2 steps of 1 s and 100 tokens, 4 steps of 3 s (or 4 s) and a million; target: 1 + 4 x 2 + 5 x 4 s.
    assert found["bpt"][0] == "2"
    assert found["bpt"][1] == "6"
    assert found["bpt"][3:5] == ["4.00", "16.0"]
    assert found["bpt"][5:] == ["10", "0.00", "29.0"]
    assert found["pt"][1:5] == ["–"] * 4
    assert found["pt"][5:] == ["10", "0.00", "29.0"]


def test_a_trained_run_took_the_steps_it_was_told(tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path / "world", layers=1)
    plain = tiny_run.settings(world, {"name": "bpt", "num_particles": 3, "sigma": 0.5}, output=str(tmp_path))
    config = tiny_run.load(tmp_path, plain)
    found = costs_of(tiny_run.trained(config))
    tasks = len(config.data.source_tasks)
    assert found.particle_texts == 3 * tasks * config.source.batch_size * config.source.steps
    assert found.parts["source"].steps == config.source.steps
    assert found.parts["target"].steps == config.target.steps * len(config.data.target_tasks)
    assert found.parts["source"].seconds > 0
    # A text has at least its end token, a target too, and every prompt its positions.
    shortest = config.method.length + 2
    assert found.parts["source"].tokens >= found.particle_texts * shortest


def test_a_posterior_from_elsewhere_costs_nothing_here(tmp_path: Path) -> None:
    run = runs_of(tmp_path, {"label": "bpt", "source": {"posterior": str(tmp_path / "other")}}, seeds=(0,))[0]
    finish(run, {"mood": 50.0})
    write_log(run, ("target/mood", 1, 1.0, 10.0))
    assert costs_of(run.directory).particle_texts is None


def test_forms_without_costs_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["table", str(folder), "--costs", "--format", "csv"]) == 2
    assert "--costs: has no form csv; use markdown or latex" in capsys.readouterr().err
    assert main(["table", str(folder), "--costs", "--out", str(tmp_path / "costs.tex")]) == 0
    assert "\\toprule" in (tmp_path / "costs.tex").read_text()
