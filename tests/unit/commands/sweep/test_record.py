"""The result of a complete sweep is never replaced by that of one that was stopped, failed or has settings left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import tiny_sweep

from bpt_dist.commands.sweep import tracking
from bpt_dist.commands.sweep.record import Record
from bpt_dist.commands.sweep.report import BEST, BEST_SO_FAR, finish_report
from bpt_dist.commands.sweep.run import _ending
from bpt_dist.commands.sweep.settings import load
from bpt_dist.errors import INTERNAL_ERROR, Stopped
from bpt_dist.storage import metrics_log
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.tracking import sender

SIGMAS = [0.1, 1.0, 10.0]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tiny_run.write_tasks(tmp_path / "tasks")
    return tmp_path


def opened(world: Path, *, resume: bool = False, **keys: Any) -> Record:
    """Open a sweep of three sigmas and one seed; `keys` win."""
    space = {"method.sigma_relative": SIGMAS, "method.lr_full": [0.1]}
    sweep = load(tiny_sweep.write(world, tiny_sweep.plain(world, **{"space": space, "seeds": [0], **keys})))
    sweep.directory.mkdir(parents=True, exist_ok=True)
    return Record.open(sweep, resume=resume)


def end(record: Record, number: int, state: str, score: float) -> None:
    """Leave what trial `number` leaves on disk when it ends in `state`."""
    folder = record.named(f"trial-{number:03d}-s0").config.directory
    folder.mkdir(parents=True, exist_ok=True)
    line = {
        "step": 12,
        "stage": "target/joint",
        "time": "2026-01-01T00:00:00+00:00",
        "metrics": {"target/validation/accuracy": score},
    }
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_json_atomic(folder / "status.json", {"state": state, "reason": None, "updated": "x"})
    write_json_atomic(folder / "tracking.json", {"uri": "sqlite:////nowhere/mlflow.db"})


class Registry:
    """Stands for the store: which trial has the champion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.champion: str | None = None
        monkeypatch.setattr(tracking, "register", lambda config: setattr(self, "champion", config.name))
        monkeypatch.setattr(tracking, "_install", lambda record, sent: None)
        monkeypatch.setattr(sender, "sync", lambda folder: SimpleNamespace(uri="", experiment_id="1"))


def report(record: Record) -> tuple[dict[str, Any], str | None, str | None]:
    """End a start of the sweep; return sweep.json and the sigma lines of best.yaml and best_so_far.yaml."""
    record.save()
    tracking.complete_tracking(record)
    finish_report(record)
    folder = record.sweep.directory
    texts = [(folder / name).read_text().splitlines() if (folder / name).is_file() else None for name in (BEST, BEST_SO_FAR)]
    sigmas = [text and next(line for line in text if "method.sigma_relative" in line) for text in texts]
    return read_json(folder / "sweep.json"), *(
        sigma and sigma.partition("sigma_relative: ")[2].partition(",")[0] for sigma in sigmas
    )


def test_a_complete_sweep_leaves_its_best(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    registry, record = Registry(monkeypatch), opened(world)
    for number, score in enumerate([40.0, 60.0, 50.0]):
        end(record, number, "finished", score)
    state, best, so_far = report(record)
    assert (best, so_far, registry.champion) == ("1", None, "trial-001-s0")
    assert (state["complete"], state["best"]["number"], state["best_so_far"]) == (True, 1, None)
    assert _ending(record, record.best_config()) == 0
    assert "so far" not in capsys.readouterr().out


@pytest.mark.parametrize("state", ["stopped", "failed", "running", "created"])
def test_an_incomplete_sweep_replaces_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    registry, record = Registry(monkeypatch), opened(world)
    registry.champion = "of another sweep"
    folder = record.sweep.directory
    (folder / BEST).write_text("# method.sigma_relative: 7, kept\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "curves.png").write_text("kept")
    end(record, 0, "finished", 40.0)
    end(record, 1, "finished", 45.0)
    end(record, 2, state, 90.0)
    found, best, so_far = report(record)
    assert (best, so_far, registry.champion) == ("7", "1", "of another sweep")
    assert (found["complete"], found["best"], found["best_so_far"]["number"]) == (False, None, 1)
    assert (folder / "figures" / "curves.png").read_text() == "kept"
    text = capsys.readouterr().out
    assert f"best so far {folder / BEST_SO_FAR}" in text
    assert "best.yaml and the registered champion are left unchanged" in text
    assert _ending(record, record.best_config()) == (
        INTERNAL_ERROR if state in ("failed", "running", "created") else Stopped.exit_code
    )


def test_settings_that_were_never_suggested_leave_a_sweep_incomplete(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch)
    record = opened(world, search="random", num_settings=3, space={"method.sigma_relative": {"log_uniform": [0.1, 1.0]}})
    record.trials = record.trials[:2]  # as when Optuna was stopped before it suggested the third
    for number in (0, 1):
        end(record, number, "finished", 40.0 + number)
    found, best, so_far = report(record)
    assert (best is None, so_far is not None, registry.champion, found["complete"]) == (True, True, None, False)
    assert _ending(record, record.best_config()) == Stopped.exit_code


def test_the_best_moves_when_the_sweep_is_complete_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, record = Registry(monkeypatch), opened(world)
    for number, score in enumerate([40.0, 60.0, 50.0]):
        end(record, number, "finished", score)
    report(record)
    again = opened(world, resume=True)
    end(again, 2, "stopped", 99.0)
    end(again, 0, "finished", 70.0)
    found, best, so_far = report(again)
    assert (found["best"]["number"], found["best_so_far"]["number"]) == (1, 0)
    assert (best, so_far, registry.champion) == ("1", "0.1", "trial-001-s0")
    end(again, 2, "finished", 99.0)
    found, best, so_far = report(opened(world, resume=True))
    assert (best, so_far, registry.champion, found["best_so_far"]) == ("10", None, "trial-002-s0", None)
    marks = {trial.name: read_json(trial.config.directory / "tags.json").get("bpt.best") for trial in again.trials
             if (trial.config.directory / "tags.json").is_file()}  # fmt: skip
    assert marks == {"trial-001-s0": "false", "trial-002-s0": "true"}


def test_the_best_of_an_interrupted_sweep_of_an_earlier_version_is_no_result(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Registry(monkeypatch)
    record = opened(world)
    end(record, 0, "finished", 40.0)
    end(record, 1, "stopped", 45.0)
    file = record.save()
    earlier = {key: value for key, value in read_json(file).items() if key not in ("complete", "best_so_far")}
    write_json_atomic(file, earlier | {"best": {"number": 0}})
    assert read_json(opened(world, resume=True).save())["best"] is None
    write_json_atomic(
        file, earlier | {"best": {"number": 0}, "trials": [{**one, "state": "finished"} for one in earlier["trials"]]}
    )
    assert read_json(opened(world, resume=True).save())["best"] == {"number": 0}


def test_an_event_reads_the_trial_that_changed_and_no_other(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all metrics of all trials at every event made a sweep quadratic in its trials."""
    record = opened(world, space={"method.sigma_relative": [0.1 + number / 100 for number in range(40)]})
    for number in range(40):
        end(record, number, "finished", 50.0)
    assert {status.score for status in record.standings()} == {50.0}
    read: list[Path] = []
    whole = metrics_log.read_records
    monkeypatch.setattr(metrics_log, "read_records", lambda path, *args: [read.append(path), whole(path, *args)][1])
    end(record, 7, "finished", 60.0)
    record.save()
    assert {path.parent.name for path in read} == {"trial-007-s0"}
    assert record.best().mean == 60.0
    assert [trial["score"] for trial in read_json(record.sweep.directory / "sweep.json")["trials"]].count(60.0) == 1


def test_a_running_trial_is_read_from_where_the_last_look_ended(world: Path) -> None:
    record = opened(world)
    end(record, 0, "running", 40.0)
    metrics = record.trials[0].config.directory / "metrics.jsonl"
    first = metrics.read_text()
    second, third = (first.replace("40.0", value).replace(":00+", f":0{value[0]}+") for value in ("70.0", "60.0"))
    for content, score in ((first, 40.0), (first + second, 70.0), (first + third, 60.0), (first, 40.0), (third + second, 70.0)):
        metrics.write_text(content)
        assert record.standings()[0].score == score
