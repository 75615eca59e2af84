"""A trial of two processes through Ray Train samples the particles that two processes of deepspeed sample."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import tiny_sweep
from safetensors.torch import load_file
from sweep_process import ROOT, assert_nothing_left, environment

from bpt_dist.storage.files import read_json


@pytest.mark.timeout(900)
def test_two_ranks_under_ray_train_give_the_particles_of_deepspeed(tmp_path: Path) -> None:
    tiny_run.world(tmp_path)
    plain = tiny_sweep.of_source(tmp_path, 4, tracking={"mlflow": False})
    file = tiny_sweep.write(tmp_path, plain)
    own = environment(tmp_path)
    command = [sys.executable, str(ROOT / "launcher" / "sweep.py"), "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "tiny"
    (trial,) = read_json(folder / "sweep.json")["trials"]
    assert trial["state"] == "finished"
    assert read_json(folder / trial["name"] / "run.json")["openings"][0]["world_size"] == 2
    alone = [
        "launcher/train.py",
        "--config",
        str(folder / "configs" / f"{trial['name']}.yaml"),
        f"run_dir={tmp_path / 'runs' / 'alone'}",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    subprocess.run([*launcher, *alone], cwd=ROOT, env=own, capture_output=True, timeout=300, check=True)
    posteriors = [
        run / "source" / "posterior" / "posterior.safetensors" for run in (folder / trial["name"], tmp_path / "runs" / "alone")
    ]
    tiny_run.assert_same(load_file(posteriors[0]), load_file(posteriors[1]))
    assert_nothing_left(tmp_path)
