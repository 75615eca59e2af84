"""How the runs of a table are handed out and what the command ends with, whoever trains them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run

from bpt_dist import config as configuration
from bpt_dist.config import Config
from bpt_dist.lock import RunLock
from bpt_dist.table_jobs import Jobs, Outcome
from bpt_dist.table_trainers import prepare_environment

PROMPT = {"method": {"name": "prompt_tuning"}, "target": {"lr": 0.3}}


class Silent:
    def started(self, jobs: Jobs, run: Config, trainer: int) -> None: ...

    def ended(self, jobs: Jobs, run: Config, outcome: Outcome, *, again: bool) -> None: ...


class Scripted:
    """Ends every run as the test says: a list of outcomes a name, the last for good."""

    def __init__(self, outcomes: dict[str, list[Outcome]] | None = None) -> None:
        self.outcomes, self.seen, self.stopped = outcomes or {}, [], False

    def train(self, run: Config) -> Outcome:
        self.seen.append(run.name)
        left = self.outcomes.get(run.name, [Outcome(0, None, 1.0)])
        return left.pop(0) if len(left) > 1 else left[0]

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None: ...


@pytest.fixture
def runs(tmp_path: Path) -> list[Config]:
    tiny_run.write_tasks(tmp_path / "tasks")
    plain = tiny_run.settings(
        tmp_path, {"name": "bpt"}, output=str(tmp_path / "runs"), rows=[PROMPT, {"label": "bpt"}], seeds=[3, 1]
    )
    return configuration.expand(tiny_run.load(tmp_path, plain))


DIED = Outcome(70, "worker 0 was ended by SIGKILL", 1.0, died=True)


def test_a_seed_is_complete_before_the_next_begins(runs: list[Config]) -> None:
    trainer = Scripted()
    assert Jobs(runs, Silent()).train([trainer]) == 0
    assert trainer.seen == ["prompt_tuning-s3", "bpt-s3", "prompt_tuning-s1", "bpt-s1"]


def test_what_died_is_tried_once_more_and_only_once(runs: list[Config]) -> None:
    once, twice = Outcome(0, None, 1.0), DIED
    trainer = Scripted({"bpt-s3": [DIED, once], "bpt-s1": [twice]})
    assert Jobs(runs, Silent()).train([trainer]) == 70
    assert trainer.seen.count("bpt-s3") == trainer.seen.count("bpt-s1") == 2


def test_the_exit_code_is_that_of_the_first_failed_row(runs: list[Config]) -> None:
    trainer = Scripted({"bpt-s3": [Outcome(65, "bad row", 1.0)], "prompt_tuning-s1": [Outcome(77, "NaN", 1.0)]})
    jobs = Jobs(runs, Silent())
    assert jobs.train([trainer]) == 77  # prompt tuning is the first row of the table
    assert len(trainer.seen) == 4
    assert jobs.outcomes["bpt-s3"].reason == "bad row"


def test_a_stop_takes_no_further_run(runs: list[Config]) -> None:
    trainer = Scripted({"bpt-s3": [Outcome(75, "stopped", 1.0)]})
    assert Jobs(runs, Silent()).train([trainer]) == 75
    assert trainer.seen == ["prompt_tuning-s3", "bpt-s3"]


def test_several_trainers_share_the_runs(runs: list[Config]) -> None:
    trainers = [Scripted() for _ in range(3)]
    assert Jobs(runs, Silent()).train(trainers) == 0
    assert sorted(name for each in trainers for name in each.seen) == sorted(run.name for run in runs)


def test_a_run_that_somebody_else_trains_is_taken_last(runs: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpt_dist.table_jobs.ORPHAN_SECONDS", 0.6)
    folder = runs[0].directory
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    trainer = Scripted()
    Jobs(runs, Silent()).train([trainer])
    lock.release()
    assert trainer.seen[-1] == runs[0].name


def test_the_time_left_is_what_equal_rows_took(runs: list[Config]) -> None:
    jobs = Jobs(runs, Silent())
    assert jobs.seconds_left() is None
    jobs._trainers, jobs.waiting = [Scripted(), Scripted()], [run for run in runs if run.seed == 1]
    jobs.outcomes = {"prompt_tuning-s3": Outcome(0, None, 10.0), "bpt-s3": Outcome(0, None, 30.0)}
    assert jobs.seconds_left() == (10 + 30) / 2


def test_processes_side_by_side_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpt_dist.table_trainers.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [prepare_environment(n)["OMP_NUM_THREADS"] for n in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert prepare_environment(3)["OMP_NUM_THREADS"] == "5"
