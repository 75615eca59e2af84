"""`bpt-dist table` shows runs: the trials of a sweep are tries, and enter only where their sweep is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpt_dist.artifacts.results import collect
from bpt_dist.commands import main

FACTS = {
    "method": "bpt", "backbone": "mini", "task": "rte", "split": "test", "n": 100, "metric": "accuracy", "value": 80.0, "seed": 0,
    "steps": 50, "trainable_parameters": 640, "joint": False, "stage": "target/rte", "run": "bpt-s0", "predict": "map",
    "decode": "rank", "protocol": "fixed", "headline": True, "majority": 50.0,
}  # fmt: skip


def write(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps([FACTS | {"run": folder.name} | changes]))
    (folder / "status.json").write_text('{"state": "finished"}')


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(tmp_path / "runs" / "table" / "bpt-s0")
    for number, value in ((0, 70.0), (1, 90.0)):
        write(tmp_path / "runs" / "sigma" / f"trial-{number:03d}-s0", value=value)
    (tmp_path / "runs" / "sigma" / "sweep.json").write_text("{}")
    return tmp_path / "runs"


def test_trials_are_left_out_with_a_note(runs: Path) -> None:
    found = collect([runs])
    assert [result.value for result in found.results] == [80.0]
    assert found.notes == [f"Left out: 2 trials of sweep sigma; name {runs / 'sigma'} to see them."]


@pytest.mark.parametrize("named", ["sigma", "sigma/trial-001-s0"])
def test_a_named_sweep_or_trial_is_read(runs: Path, named: str) -> None:
    place = runs / named
    assert sorted(result.value for result in collect([place]).results) == ([70.0, 90.0] if named == "sigma" else [90.0])
    assert not collect([place]).notes
    assert len(collect([runs, runs / "sigma"]).results) == 3


def test_the_command_shows_the_runs_and_says_where_the_trials_are(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    assert main.main(["table", "runs"]) == 0
    screen = capsys.readouterr().out
    assert "80.0" in screen
    assert "90.0" not in screen
    assert "2 trials of sweep sigma" in screen
    assert main.main(["table", "runs/sigma"]) == 0
    assert "90.0" in capsys.readouterr().out
