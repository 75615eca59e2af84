"""What one rank alone must not decide: which stage is done, which T5 it is, whether to go on with the next run."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import own_method
import pytest
import ranks
import tiny_run

from bpt_dist import train
from bpt_dist.backbones.checkpoint import Weights
from bpt_dist.config import RunConfig
from bpt_dist.distributed import mesh
from bpt_dist.storage.checkpoint import read_tensors, write_tensors_atomic
from bpt_dist.storage.files import read_json
from bpt_dist.train import run_all
from bpt_dist.training import stage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, **sections: Any) -> RunConfig:
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


def test_ranks_that_read_other_posteriors_are_refused_before_anything_is_trained(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on two hosts with local disks: gradients of two prompts would add up to one result."""
    short = {"name": "bpt"}
    made = tiny_run.trained(tiny_run.load(tmp_path, tiny_run.settings(world, short, output=str(tmp_path / "made"))))
    for rank in range(2):
        (tmp_path / f"host{rank}").mkdir()
        shutil.copytree(made / "source" / "posterior", tmp_path / f"host{rank}" / "posterior")
    file = tmp_path / "host1" / "posterior" / "posterior.safetensors"
    write_tensors_atomic(file, {name: tensor + 1 for name, tensor in read_tensors(file)[0].items()})
    plain = tiny_run.settings(world, short, output=str(tmp_path / "runs"))
    plain["source"] = {"posterior": "posterior"}
    config = tiny_run.load(tmp_path, plain)

    def main() -> int:
        os.chdir(tmp_path / f"host{os.environ['RANK']}")
        return run_all(config)

    assert ranks.launch(main, 2) == [2, 2]
    text = capfd.readouterr().err
    assert "source.posterior: differs between rank 0 on " in text
    assert "copy the same files to all hosts" in text
    assert not list(config.directory.rglob("checkpoints"))


def test_another_t5_on_another_rank_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(world, tmp_path)
    # As on two hosts with other files under the same path: ranks that see the same files would share one hash.
    monkeypatch.setattr(Weights, "file_facts", lambda _: [os.environ["RANK"]])
    monkeypatch.setattr(Weights, "identity", property(lambda _: os.environ["RANK"] * 64))
    assert ranks.launch(lambda: run_all(config), 2) == [2, 2]
    assert "differ between rank 0 and rank 1 on " in capfd.readouterr().err


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
    config, finish = configured(world, tmp_path, seeds=[0, 1]), train.TrainingRun.finish

    def finish_and_ask(run: train.TrainingRun) -> None:
        finish(run)
        if run.config.seed == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            while not run.watchdog.stop_requested:
                signal.sigtimedwait([], 0.01)

    monkeypatch.setattr(train.TrainingRun, "finish", finish_and_ask)
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


def test_rank_0_chooses_the_checkpoint_that_all_resume_from(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may show another rank an old directory for a while after a quick restart."""
    config = configured(
        world, tmp_path, target={"steps": 6, "checkpoint_every": 1, "eval_every": None}, data={"target_tasks": ["mood"]}
    )
    assert ranks.launch(lambda: run_all(config), 2, BPT_FAULT="step.before_forward,step=4,rank=1,kill")[1] == -signal.SIGKILL
    newest = stage.checkpoint.latest

    def stale(*arguments: Any, **named: Any) -> Any:
        assert os.environ["RANK"] == "0", "only rank 0 looks"
        return newest(*arguments, **named)

    monkeypatch.setattr(stage.checkpoint, "latest", stale)
    assert ranks.launch(lambda: run_all(config), 2) == [0, 0]
    log = (config.directory / "logs" / "rank-1.log").read_text()
    assert "target/mood | resuming at step 4" in log


def test_what_rank_0_cannot_resume_from_ends_all_ranks_alike(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(
        world, tmp_path, target={"steps": 6, "checkpoint_every": 1, "eval_every": None}, data={"target_tasks": ["mood"]}
    )
    ranks.launch(lambda: run_all(config), 2, BPT_FAULT="step.before_forward,step=4,rank=1,kill")
    for manifest in config.directory.rglob("MANIFEST.json"):
        manifest.write_text("{}")
    assert ranks.launch(lambda: run_all(config), 2) == [74, 74]
    assert "checkpoints is intact" in capfd.readouterr().err


def own_configuration(world: Path, folder: Path) -> RunConfig:
    """The run of a method outside the package, whose file each rank reads in its own working directory."""
    plain = tiny_run.settings(world, {"name": "prompt_tuning"}, output=str(folder / "runs"))
    return tiny_run.load(Path(), {**plain, "method": {"path": f"{own_method.NAME}.py", "length": 3, "bottleneck": 4}})


@pytest.mark.parametrize("change", [None, ("torch.relu", "torch.tanh"), ("Field(0.003", "Field(0.004")])
def test_ranks_that_read_other_files_of_a_method_are_refused_before_anything_is_trained(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: tuple[str, str] | None
) -> None:
    """As on two hosts of which one has an older file: another code, or another default of an option."""
    for rank in range(2):
        file = own_method.write(tmp_path / f"host{rank}")
        if change is not None and rank == 1:
            file.write_text(file.read_text().replace(*change))

    def main() -> int:
        os.chdir(tmp_path / f"host{os.environ['RANK']}")
        return run_all(own_configuration(world, tmp_path))

    assert ranks.launch(main, 2) == ([0, 0] if change is None else [2, 2])
    said = capfd.readouterr().err
    if change is None:
        inputs = read_json(tmp_path / "runs" / "run" / "inputs.json")
        assert list(inputs) == ["data.task_files: count", "data.task_files: mood", "method.path"]
        return
    assert not list(tmp_path.rglob("checkpoints"))
    assert "method.path: differs between rank 0 on " in said
    assert "copy the same files to all hosts" in said
