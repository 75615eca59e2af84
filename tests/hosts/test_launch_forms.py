"""The other ways to start one program on several hosts, without root: --no_ssh, bare ranks, SLURM with a stand-in for its srun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tiny_run
import yaml
from two_hosts import BIN, ROOT, SCRIPT, wait_until

# Starts what follows as the tasks of a step, with the variables that Slurm documents for them; options of srun are skipped.
STAND_IN_FOR_SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
num_tasks = int(os.environ["SLURM_NTASKS"])
while words[0].startswith("-"):
    option = words.pop(0)
    if option == "--ntasks":
        num_tasks = int(words[0])
    if "=" not in option and option != "--label":
        words.pop(0)
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(num_tasks), "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        "SLURM_NTASKS": str(num_tasks), "SLURM_STEP_TASKS_PER_NODE": str(num_tasks), "SLURM_NODEID": "0"}}
tasks = [subprocess.Popen(words, env={{**os.environ, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}})
         for task in range(num_tasks)]
with open(os.path.join(os.path.dirname(sys.argv[0]), "pids"), "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
STAND_IN_FOR_SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo "$3"; else echo "$@" >> "$(dirname "$0")/scontrol.log"; fi
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_config(folder: Path, world: Path, name: str, steps: int = 4) -> Path:
    plain = tiny_run.settings(world, {"name": "bpt"}, source={"steps": steps, "batch_size": 2, "lr": 0.3, "checkpoint_every": 2})
    plain |= {"name": name, "output": str(folder / "runs"), "distribution": {"startup_timeout": 60, "step_timeout": 20}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **variables}


@contextmanager
def started(command: Sequence[object], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(word) for word in command], cwd=folder, env=environment(**variables), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    output = process.communicate(timeout=seconds)[0]
    return process.returncode, output


def state(folder: Path, name: str) -> dict[str, object]:
    status = json.loads((folder / "runs" / name / "status.json").read_text())
    opening = json.loads((folder / "runs" / name / "run.json").read_text())["openings"][-1]
    return {"state": status["state"], "world_size": opening["world_size"]}


def test_deepspeed_without_ssh_once_a_host(tmp_path: Path, tiny_world: Path):
    """Two invented hosts of different size on one loopback: rank 1 has local rank 1 here, rank 2 local rank 0."""
    config = write_config(tmp_path, tiny_world, "no_ssh")
    (tmp_path / "hostfile").write_text("alpha slots=1\nbeta slots=2\n")
    port = free_port()

    def part(index: int) -> list[object]:
        options = ["--hostfile", "hostfile", "--no_ssh", "--node_rank", index, "--master_addr", "127.0.0.1", "--master_port", port]
        return [BIN / "deepspeed", *options, SCRIPT, "--config", config, "method.num_particles=3", "expect_world_size=3"]

    with started(part(0), tmp_path) as alpha, started(part(1), tmp_path) as beta:
        codes = [ended(process) for process in (alpha, beta)]
    assert [code for code, _ in codes] == [0, 0], codes
    assert state(tmp_path, "no_ssh") == {"state": "finished", "world_size": 3}


def rank(config: Path, number: int, size: int, port: int, *overrides: str) -> tuple[list[object], dict[str, str]]:
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [sys.executable, SCRIPT, "--config", config, *overrides], {name: str(value) for name, value in variables.items()}


def test_two_jobs_with_the_same_port_do_not_mix(tmp_path: Path, tiny_world: Path):
    """The first waits on its port for a rank that comes late; the second must neither take its place nor disturb it."""
    config, port = write_config(tmp_path, tiny_world, "first"), free_port()
    first = [rank(config, number, 2, port) for number in range(2)]
    second = [rank(config, number, 2, port, "name=second") for number in range(2)]
    with started(first[0][0], tmp_path, **first[0][1]) as zero:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 60, "rank 0 listens")
        with started(second[0][0], tmp_path, **second[0][1]) as a, started(second[1][0], tmp_path, **second[1][1]) as b:
            refused = [ended(process) for process in (a, b)]
        with started(first[1][0], tmp_path, **first[1][1]) as one:
            finished = [ended(process) for process in (zero, one)]
    assert [code for code, _ in refused] == [2, 2], refused
    assert f"port {port} of {socket.gethostname()} is in use" in refused[0][1]
    assert f"127.0.0.1:{port}: belongs to another job" in refused[1][1]
    assert [code for code, _ in finished] == [0, 0], finished
    assert state(tmp_path, "first") == {"state": "finished", "world_size": 2}
    assert not (tmp_path / "runs" / "second").exists()


def test_a_mistake_is_said_once_and_not_once_a_rank(tmp_path: Path, tiny_world: Path):
    config, port = write_config(tmp_path, tiny_world, "wrong"), free_port()
    for overrides in (["sigmma=1"], ["expect_world_size=4"], ["--fresj"]):
        ranks = [rank(config, number, 2, port, *overrides) for number in range(2)]
        with started(ranks[0][0], tmp_path, **ranks[0][1]) as zero, started(ranks[1][0], tmp_path, **ranks[1][1]) as one:
            (code, said), (other_code, other_said) = ended(zero, 30), ended(one, 30)
        assert (code, other_code) == (2, 2)
        assert said
        assert other_said == ""
    # A file that only this host lacks is said by this host, whatever its rank.
    command, variables = rank(tmp_path / "nosuch.yaml", 1, 2, port)
    with started(command, tmp_path, **variables | {"LOCAL_RANK": "0"}) as only:
        assert "nosuch.yaml" in ended(only, 30)[1]


@contextmanager
def started_batch(folder: Path, config: Path, launch: str, *overrides: str, job: int) -> Iterator[subprocess.Popen[str]]:
    """Start the batch script as Slurm would on the first node of a job of two tasks."""
    slurm = {
        "SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "LAUNCH": launch,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    with started(["bash", ROOT / "launcher/slurm/train.sbatch", config, *overrides], folder, **slurm) as process:
        yield process


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    programs: Mapping[str, str] = {"srun": STAND_IN_FOR_SRUN.format(python=sys.executable), "scontrol": STAND_IN_FOR_SCONTROL}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("launch", ["srun", "torchrun"])
def test_the_batch_script_starts_two_ranks(slurm: Path, tiny_world: Path, launch: str):
    config = write_config(slurm, tiny_world, launch)
    with started_batch(slurm, config, launch, job=os.getpid() % 12_000) as process:
        code, output = ended(process)
    assert code == 0, output
    assert state(slurm, launch) == {"state": "finished", "world_size": 2}
    assert not (slurm / "bin" / "scontrol.log").exists()


def test_the_batch_script_puts_a_stopped_run_back_into_the_queue(slurm: Path, tiny_world: Path):
    config = write_config(slurm, tiny_world, "stopped", steps=100_000)
    run, job = slurm / "runs" / "stopped", os.getpid() % 12_000 + 1
    with started_batch(slurm, config, "srun", "source.checkpoint_every=50", job=job) as process:
        wait_until(lambda: list(run.glob("source/checkpoints/step-*")) or process.poll() is not None, 100, "a checkpoint")
        for pid in (slurm / "bin" / "pids").read_text().split():
            os.kill(int(pid), signal.SIGTERM)  # as `--signal=TERM@120` does
        code, output = ended(process)
    assert code == 75, output
    assert (slurm / "bin" / "scontrol.log").read_text() == f"requeue {job}\n"
    assert state(slurm, "stopped")["state"] == "stopped"
