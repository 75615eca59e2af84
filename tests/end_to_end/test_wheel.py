"""The wheel alone: installed into an environment of its own, it trains from another folder, by command and by module."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import ranks
from installed_wheel import make

FEW = ["source.steps=2", "target.steps=2", "target.eval_every=2", "data.max_train_rows=16", "data.max_eval_rows=8", "figures=false"]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("wheel"))


def ended(command: list[str], folder: Path, code: int = 0) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_trains_from_another_folder(installed: Path, tmp_path: Path) -> None:
    program = str(installed / "bpt-dist")
    where = ended([str(installed / "python"), "-c", "import bpt_dist; print(bpt_dist.__path__[0])"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    ended([program, "configs", "bpt/mini", "--to", "."], tmp_path)
    ended([program, "train", "-c", "bpt/mini.yaml", "name=one", *FEW], tmp_path)
    run = tmp_path / "runs" / "one"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert json.loads((run / "run.json").read_text())["openings"][0]["command"].startswith(
        "bpt-dist train -c bpt/mini.yaml name=one"
    )
    assert "bpt" in ended([program, "table", "runs/one"], tmp_path).lower()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_start_it_by_module(launcher: str, installed: Path, tmp_path: Path) -> None:
    ended([str(installed / "bpt-dist"), "configs", "bpt/mini", "--to", "."], tmp_path)
    python = str(installed / "python")
    commands = {
        "torchrun": [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
        "deepspeed": [str(installed / "deepspeed"), "--num_gpus", "2", "--master_port", str(ranks.free_port()), "--module"],
    }
    ended([*commands[launcher], "bpt_dist.commands.train", "--config", "bpt/mini.yaml", "name=two", *FEW], tmp_path)
    (opening,) = json.loads((tmp_path / "runs" / "two" / "run.json").read_text())["openings"]
    assert opening["world_size"] == 2
    assert opening["command"].startswith("python -m bpt_dist.commands.train --config bpt/mini.yaml")


def test_a_table_with_sharded_rows_trains_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    program = str(installed / "bpt-dist")
    ended([program, "configs", "bpt/mini", "--to", "."], tmp_path)
    ended([program, "run-table", "bpt/mini.yaml", "--processes", "2", "seeds=[0]", "name=table", *FEW], tmp_path)
    assert (tmp_path / "runs" / "table" / "table.md").is_file()
