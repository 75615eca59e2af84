"""Trials of several processes and table workers join the job of their own configuration and no other one."""

from __future__ import annotations

import datetime
import os
import threading
import time
from pathlib import Path

import pytest
import ranks
import tiny_run

from bpt_dist import config as configuration
from bpt_dist.commands.sweep.trial import train_trial
from bpt_dist.commands.table.trainers import WorkerTrainer
from bpt_dist.commands.table.worker import train_here
from bpt_dist.config import RunConfig
from bpt_dist.distributed import rendezvous
from bpt_dist.errors import UserError


def config_named(folder: Path, name: str, lr: float = 0.3) -> RunConfig:
    tiny_run.write_tasks(folder / "tasks")
    return tiny_run.load(folder, tiny_run.settings(folder, {"name": "prompt_tuning"}, name=name, target={"lr": lr}))


def wait_as_rank_0(job: str) -> int:
    """Be rank 0 of a job of two that waits for its rank 1."""
    try:
        rendezvous.join("gloo", job, 0, 2, datetime.timedelta(seconds=8))
    except UserError as error:
        return error.exit_code
    return 0


def join_as_trial(config: RunConfig) -> int:
    try:
        train_trial(config, config.directory.parent, {}, lambda run: None)
    except UserError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


def join_as_worker(config: RunConfig) -> int:
    code, reason = train_here(config)
    print(reason, flush=True)
    return code


@pytest.mark.parametrize("join", [join_as_trial, join_as_worker])
@pytest.mark.parametrize("foreign", ["run_dir", "config"])
def test_a_foreign_job_at_the_same_address_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], join, foreign: str
) -> None:
    mine = config_named(tmp_path, "mine")
    other = config_named(tmp_path, "other") if foreign == "run_dir" else config_named(tmp_path, "mine", lr=0.1)
    port, codes = ranks.free_port(), {}
    address = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def start(rank: int, main) -> None:
        (codes[rank],) = ranks.launch(main, 1, RANK=str(rank), LOCAL_RANK=str(rank), **address)

    job = f"{configuration.fingerprint(other)} {other.directory}"
    waiting = threading.Thread(target=start, args=(0, lambda: wait_as_rank_0(job)))
    waiting.start()
    time.sleep(1.5)
    start(1, lambda: join(mine))
    waiting.join()
    assert codes == {0: 69, 1: 2}, "the foreign job waits for its own rank as if nobody had come"
    assert "belongs to another job" in capfd.readouterr().out
    assert not mine.directory.exists()


def test_a_worker_of_a_table_belongs_to_no_job_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    inherited = WorkerTrainer(0, 2, tmp_path).environment
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(inherited)
    assert os.environ["RANK"] == "1"
