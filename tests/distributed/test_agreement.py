"""What one rank alone must not decide: which stage is done, which T5 it is, whether to go on with the next run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run

from bpt_dist import backbone as backbones
from bpt_dist import mesh, train
from bpt_dist.config import Config
from bpt_dist.files import read_json
from bpt_dist.train import run_all


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, **sections: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    plain = tiny_run.settings(world, {"name": "prompt_tuning"}, output=str(folder / "runs"), **sections)
    return tiny_run.load(folder, plain)


def test_ranks_that_do_not_share_the_run_directory_are_named_before_anything_is_trained(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(world, tmp_path)

    def main() -> int:
        mesh.SHARED_SECONDS = 0.5
        # As on two hosts that each have a folder of this name.
        host = tmp_path / f"host{os.environ['RANK']}"
        host.mkdir()
        os.chdir(host)
        return run_all(config.model_copy(update={"run_dir": Path("runs/run")}))

    assert ranks.launch(main, 2) == [74, 74]
    assert "does not see it; put the run directory (output=) on a disk that all hosts share" in capfd.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))


def test_another_t5_on_another_rank_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, true_hash = configured(world, tmp_path), backbones._hash_files
    # As on two hosts with other files under the same path.
    monkeypatch.setattr(backbones, "_hash_files", lambda *given: true_hash(*given) + os.environ["RANK"])
    assert ranks.launch(lambda: run_all(config), 2) == [2, 2]
    assert "is another T5 or tokenizer on rank 1 on " in capfd.readouterr().err


def test_a_bad_row_ends_all_ranks_alike(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = tiny_run.write_tasks(tmp_path / "tasks")
    rows = tmp_path / "tasks" / "mood" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"label": 1', '"label": 7', 1))
    config = configured(world, tmp_path, data={"task_files": [str(tasks)], "target_tasks": ["mood"]})
    assert ranks.launch(lambda: run_all(config), 2) == [65, 65]
    said = capfd.readouterr().err
    assert "train.jsonl:2" in said
    assert "does not answer" not in said


def test_a_stop_request_that_came_too_late_for_a_run_keeps_the_next_one_from_starting(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, finish = configured(world, tmp_path, seeds=[0, 1]), train.Session.finish

    def finish_and_ask(session: train.Session) -> None:
        finish(session)
        if session.config.seed == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            while not session.guard.stop_requested:
                signal.sigtimedwait([], 0.01)

    monkeypatch.setattr(train.Session, "finish", finish_and_ask)
    assert ranks.launch(lambda: run_all(config)) == [75]
    states = {path.parent.name: read_json(path)["state"] for path in tmp_path.rglob("status.json")}
    assert list(states.values()) == ["finished"]
    assert ranks.launch(lambda: run_all(config)) == [0]


def test_a_resume_does_not_forget_how_many_steps_were_skipped(world: Path, tmp_path: Path) -> None:
    target = {"steps": 6, "on_non_finite": "skip", "checkpoint_every": 1, "eval_every": None}
    config = configured(world, tmp_path, target=target, data={"target_tasks": ["mood"]})
    poison = ";".join(f"step.after_backward,step={step},nan" for step in (1, 2, 3))
    killed = ranks.launch(lambda: run_all(config), BPT_FAULT=f"{poison};step.before_forward,step=3,kill")
    assert killed == [-signal.SIGKILL]
    assert ranks.launch(lambda: run_all(config), BPT_FAULT=poison) == [77]
    assert ranks.launch(lambda: run_all(config)) == [0]
