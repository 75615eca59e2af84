"""A sweep handed to a Ray on this machine as a job: a token is asked for, and the trials are those of a sweep without a cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import tiny_run
import tiny_sweep
from safetensors.torch import load_file
from sweep_process import MARK, ROOT, environment, lines, processes_of, wait_for

from bpt_dist import config as configuration
from bpt_dist.commands.sweep.cluster import LOOPBACK
from bpt_dist.storage.files import read_json

BIN = Path(sys.executable).parent
PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
    "metrics-export-port", "ray-client-server-port",
)  # fmt: skip


@dataclass
class Head:
    """A Ray that asks for a token: its address for jobs, the variables that let a process talk to it, its own folder."""

    address: str
    secret: str
    variables: dict[str, str]
    log: Path


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """`ray start --head` on the loopback address; all of its processes are ended one by one, by their numbers."""
    folder = Path(tempfile.mkdtemp(prefix="bpt-head-"))  # short: Ray puts sockets there
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    own = environment(tmp_path) | variables | LOOPBACK | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    command += ["--num-cpus", "2", "--num-gpus", "0", "--object-store-memory", str(80 << 20), "--temp-dir", folder / "ray"]
    command += [word for name, port in ports.items() for word in (f"--{name}", str(port))]
    log = tmp_path / "head.log"
    with log.open("wb") as screen:
        process = subprocess.Popen(list(map(str, command)), env=own, stdout=screen, stderr=screen, start_new_session=True)
    try:
        wait_for(lambda: answers(ports["dashboard-port"]) or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", token.read_text(), variables, log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for each in processes_of(tmp_path):
            each.kill()
        assert not psutil.wait_procs(processes_of(tmp_path), timeout=60)[1]
        shutil.rmtree(folder)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def submit(checkout: Path, head: Head, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/sweep.py", "--config", "configs/sweep/tiny.yaml", "--submit", head.address, *words]
    own = environment(checkout.parent) | {"PYTHONPATH": str(checkout)} | variables
    return subprocess.run(command, cwd=checkout, env=own, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.timeout(400)
def test_a_submitted_sweep_gives_the_results_of_a_local_one(tmp_path: Path, head: Head) -> None:
    folder = tiny_sweep.world(tmp_path)
    checkout = folder / "checkout"
    for part in ("bpt_dist", "launcher", "configs"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    tiny_sweep.write(checkout / "configs" / "sweep", tiny_sweep.plain(folder, seeds=[0]))

    refused = submit(checkout, head)  # RAY_AUTH_MODE is not set in this shell
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f"--submit: {head.address} asks for its token" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (folder / "runs" / "tiny").exists()

    done = submit(checkout, head, "--follow", **head.variables)
    assert done.returncode == 0, done.stdout + done.stderr + head.log.read_text()
    assert done.stdout.count(f"ray job status --address {head.address} tiny-") == 1
    assert "[2/2]" in done.stdout
    record = read_json(folder / "runs" / "tiny" / "sweep.json")
    assert [(one["name"], one["state"]) for one in record["trials"]] == [("trial-000-s0", "finished"), ("trial-001-s0", "finished")]
    for one in record["trials"]:
        # As it is the case for a sweep without a cluster, see test_sweep.
        config = configuration.load(folder / "runs" / "tiny" / "configs" / f"{one['name']}.yaml")
        alone = config.model_copy(update={"run_dir": folder / "runs" / "alone" / config.name})
        tiny_run.trained(alone)
        prompts = [run.directory / "target" / "mood" / "adapter" / "adapter_model.safetensors" for run in (config, alone)]
        tiny_run.assert_same(load_file(prompts[0]), load_file(prompts[1]))
        scores = [line["metrics"]["sweep/score"] for line in lines(config.directory) if line["stage"] == "sweep"]
        assert scores[-1] == one["score"]
        assert one["reported"] == lines(alone.directory)[-1]["metrics"]["best/score"]

    jobs = subprocess.run(
        [BIN / "ray", "job", "list", "--address", head.address],
        env=environment(tmp_path) | head.variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "SUCCEEDED" in jobs.stdout
    assert MARK not in jobs.stdout
    everything = done.stdout + done.stderr + jobs.stdout + head.log.read_text()
    assert head.secret not in everything
