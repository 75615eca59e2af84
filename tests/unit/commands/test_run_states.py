"""What every command makes of a run that was killed, stopped, finished or never begun: one reader, one answer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from bpt_dist import config as configuration
from bpt_dist.artifacts.results import collect
from bpt_dist.artifacts.stored_run import is_finished
from bpt_dist.commands.eval import print_evaluation
from bpt_dist.commands.export import export_run
from bpt_dist.commands.sweep.record import state_of
from bpt_dist.commands.table.command import missing_runs
from bpt_dist.commands.table.jobs import Jobs
from bpt_dist.commands.table.trainers import DeepSpeedTrainer
from bpt_dist.config import RunConfig
from bpt_dist.errors import UserError
from bpt_dist.storage.files import write_json_atomic
from bpt_dist.storage.lock import RunLock
from bpt_dist.storage.run_directory import read_status
from bpt_dist.tracking.sender import Sender

DIED = "the process died while the run was running"
LEAVES = """
import os, sys
from pathlib import Path
from bpt_dist.storage.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
os._exit(9)
"""
REASONS = {"killed": DIED, "stopped": "received SIGTERM", "failed": "DataError: row 7", "finished": None, "alive": None}
STATES = {"killed": "running", "alive": "running"}  # what the file says


@pytest.fixture(params=["killed", "stopped", "failed", "finished", "alive", "none"])
def situation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(tmp_path: Path, situation: str) -> RunConfig:
    """A run directory in one of the situations, without training."""
    tiny_run.write_tasks(tmp_path / "tasks")
    config = tiny_run.load(tmp_path, tiny_run.settings(tmp_path, {"name": "prompt_tuning"}))
    folder = config.directory
    if situation == "none":
        return config
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configuration.resolved_yaml(config))
    write_json_atomic(
        folder / "run.json", {"id": "r", "fingerprint": configuration.fingerprint(config), "openings": [{"command": "c"}]}
    )
    reason = None if situation == "killed" else REASONS[situation]
    write_json_atomic(folder / "status.json", {"state": STATES.get(situation, situation), "reason": reason, "next": "c"})
    entry = {"method": "prompt_tuning", "backbone": "t5", "task": "mood", "split": "test", "n": 6, "metric": "accuracy",
             "value": 50.0, "seed": 0, "steps": 3, "trainable_parameters": 9, "joint": False, "stage": "target/mood",
                 "run": "run", "predict": "map", "decode": "rank", "protocol": "fixed", "headline": True}  # fmt: skip
    (folder / "results.json").write_text(json.dumps([entry]))
    write_json_atomic(folder / "tracking.json", {"uri": "sqlite:////nowhere/mlflow.db"})
    if situation == "killed":
        assert subprocess.run([sys.executable, "-c", LEAVES, str(folder)], env=os.environ, check=False).returncode == 9
        assert (folder / "run.lock").is_file()
    return config


@pytest.fixture(autouse=True)
def holder(situation: str, run: RunConfig):
    with contextlib.ExitStack() as stack:
        if situation == "alive":
            lock = RunLock(run.directory)
            lock.acquire()
            stack.callback(lock.release)
        yield


def message(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def test_the_reader(run: RunConfig, situation: str) -> None:
    status = read_status(run.directory)
    if situation == "none":
        assert status is None
        return
    assert status is not None
    assert status.state == {"killed": "failed", "alive": "running"}.get(situation, situation)
    assert (status.reason, status.killed) == (REASONS[situation], situation == "killed")


def test_run_table_and_the_quick_start_train_what_is_not_finished(run: RunConfig, situation: str) -> None:
    finished = situation == "finished"
    assert is_finished(run) is finished  # the quick start
    jobs = Jobs([run], display=None)  # type: ignore[arg-type]
    assert jobs.num_waiting == (not finished)
    assert [entry["run"] for entry in missing_runs([run], jobs)] == ([] if finished else [run.name])


def test_the_reason_that_run_table_shows(run: RunConfig, situation: str, tmp_path: Path) -> None:
    shown = DeepSpeedTrainer(1, tmp_path)._reason(run)
    reason = REASONS.get(situation)
    assert shown == (reason or f"see {tmp_path / 'launcher.log'}")


def test_the_table_has_finished_runs_only(run: RunConfig, situation: str) -> None:
    if situation == "none":
        assert "no results.json" in message(lambda: collect([run.directory]))
        return
    collected = collect([run.directory])
    assert len(collected.results) == (situation == "finished")
    if situation != "finished":
        (note,) = collected.notes
        assert {"killed": "failed", "alive": "running"}.get(situation, situation) in note


@pytest.mark.parametrize("command", ["export", "eval"])
def test_export_and_eval_refuse_what_is_not_finished(run: RunConfig, situation: str, command: str) -> None:
    def work() -> None:
        if command == "export":
            export_run(run.directory, None, None, particles=False)
        else:
            print_evaluation(run.directory, (), "mood", "test", None, None)

    text = message(work)  # a finished one is read: what is missing here is its adapter
    if situation == "none":
        assert "is not a run" in text or "no such run" in text
    elif situation == "finished":
        assert "not finished" not in text
    else:
        state, reason = {"killed": "failed", "alive": "running"}.get(situation, situation), REASONS[situation]
        assert f"the run is {state}" + (f" ({reason})" if reason else "") + ", not finished; rerun `c`" in text


def test_a_sweep_and_the_sender(run: RunConfig, situation: str) -> None:
    expected = {"killed": ("failed", DIED), "alive": ("running", None), "none": ("waiting", None)}
    assert state_of(run) == expected.get(situation, (situation, REASONS.get(situation)))
    if situation == "none":
        return
    sender = Sender(run.directory)
    try:
        assert sender.has_ended() is (situation != "alive")
        assert sender._true_state() == (None if situation == "alive" else situation)
    finally:
        sender.close()


@pytest.mark.parametrize("situation", ["finished"], indirect=True)
def test_a_status_that_names_no_state_is_refused_everywhere(run: RunConfig) -> None:
    (run.directory / "status.json").write_text('{"state": "done"}')
    for work in (
        lambda: is_finished(run),
        lambda: state_of(run),
        lambda: collect([run.directory]),
        lambda: export_run(run.directory, None, None, particles=False),
        lambda: print_evaluation(run.directory, (), "mood", "test", None, None),
    ):
        assert "status.json: names no state of a run" in message(work)
