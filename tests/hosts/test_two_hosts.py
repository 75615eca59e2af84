"""A job on two hosts through the real launcher, pdsh and sshd: the same results as on one, also when a host is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from fault_figures import record_figure
from safetensors.torch import load_file
from two_hosts import ROOT, SCRIPT, TwoHosts, wait_until

STEP_TIMEOUT = 6
# The quick start with fewer steps and rows: its three methods, six source and four target tasks, its partitioned T5.
SHORT = (
    "source.steps=6", "target.steps=4", "target.eval_every=2", "source.log_every=2", "target.log_every=2", "seeds=0",
    "max_train_rows=200", "max_eval_rows=40",
)  # fmt: skip


def results(run: Path) -> list[dict]:
    """What a run found, without what depends on when it ran."""
    return json.loads((run / "results.json").read_text())


def trained_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor a run leaves behind: posterior and prompts."""
    return {
        f"{file.relative_to(run)}:{name}": tensor
        for file in sorted([*run.glob("source/posterior/*.safetensors"), *run.glob("target/*/adapter/*.safetensors")])
        for name, tensor in load_file(file).items()
    }


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def nothing_is_left(hosts: TwoHosts, seconds: float = 5) -> None:
    wait_until(lambda: not hosts.jobs(), seconds, f"no process of the job: {hosts.jobs()}")


def test_the_quick_start_on_two_hosts_gives_the_bits_of_one(hosts: TwoHosts):
    config = ROOT / "configs" / "quickstart.yaml"
    two = hosts.run(hosts.train(config, *SHORT, "name=two", "output=runs", "distribution.expect_world_size=2"), seconds=300)
    assert two.returncode == 0, two.output
    one_host = hosts.hostfile("one_host", "node0 slots=2")
    one = hosts.run(hosts.train(config, *SHORT, "name=one", "output=runs", hostfile=one_host.name), seconds=300)
    assert one.returncode == 0, one.output
    names = {run.name for run in (hosts.folder / "runs" / "two").iterdir()}
    assert names == {"bpt-s0", "prompt_tuning-s0", "untrained-s0", "vanilla_transfer-s0"}
    for name in names:
        here, there = hosts.folder / "runs" / "one" / name, hosts.folder / "runs" / "two" / name
        assert status(there)["state"] == "finished"
        assert results(there) == results(here)
        tiny_run.assert_same(trained_tensors(there), trained_tensors(here))
    opening = json.loads((hosts.folder / "runs" / "two" / "bpt-s0" / "run.json").read_text())["openings"][0]
    assert (opening["host"], opening["world_size"]) == ("node0", 2)
    for rank in range(2):
        assert (hosts.folder / "runs" / "two" / "bpt-s0" / "logs" / f"rank-{rank}.log").is_file()
    nothing_is_left(hosts)


def long_config(hosts: TwoHosts, tiny_world: Path, name: str, steps: int, **sections) -> Path:
    """A run whose source stage takes its time; two particles, so that two ranks hold one each."""
    plain = tiny_run.settings(
        tiny_world,
        {"name": "bpt"},
        source={"steps": steps, "batch_size": 2, "lr": 0.05, "checkpoint_every": 50, "log_every": 50},
        distribution={"step_timeout": STEP_TIMEOUT, "startup_timeout": 60},
        **sections,
    )
    plain |= {"name": name, "output": str(hosts.folder / "runs")}
    file = hosts.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_without_it(hosts: TwoHosts, tiny_world: Path):
    steps = 800
    config = long_config(hosts, tiny_world, "cut", steps)
    run = hosts.folder / "runs" / "cut"
    with hosts.started(hosts.train(config)) as job:
        wait_until(lambda: any(run.glob("source/checkpoints/step-*00100")) or job.process.poll() is not None, 90, "step 100")
        hosts.cut(1)
        try:
            rank_ends = wait_until(
                lambda: not any("train.py --local_rank" in line for line in hosts.jobs()), STEP_TIMEOUT + 10, job.output
            )
            ended = job.ended(30)
            nothing_is_left(hosts)
        finally:
            hosts.repair(1)
    assert rank_ends > STEP_TIMEOUT / 2, "the ranks left before they could know"
    assert ended.returncode not in (0, None), ended.output
    assert "69" in re.findall(r"exits with return code = (\d+)", ended.output), ended.output
    assert "rank 1" in ended.output
    assert "node1" in ended.output
    assert status(run)["state"] == "failed"
    assert "rank 1" in status(run)["reason"]
    stopped_at = max(int(folder.name[-8:]) for folder in run.glob("source/checkpoints/step-*"))
    assert 100 <= stopped_at < steps

    alone = hosts.hostfile("alone", "node0 slots=1")
    resumed = hosts.run(hosts.train(config, hostfile=alone.name), seconds=120)
    assert resumed.returncode == 0, resumed.output
    assert f"resuming at step {stopped_at}" in resumed.output
    never_cut = hosts.run(hosts.train(config, "name=never_cut", hostfile=alone.name), seconds=120)
    assert never_cut.returncode == 0, never_cut.output
    expected, found = trained_tensors(hosts.folder / "runs" / "never_cut"), trained_tensors(run)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    steps_logged = [json.loads(line).get("step") for line in (run / "metrics.jsonl").read_text().splitlines()]
    never_logged = [json.loads(line).get("step") for line in (run.parent / "never_cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps_logged == never_logged
    record_figure("F6", f"two hosts, cable cut, time-out {STEP_TIMEOUT} s", worst_seconds=round(rank_ends, 1))


def test_a_host_that_does_not_answer_leaves_no_rank_behind(hosts: TwoHosts, tiny_world: Path):
    hosts.hostfile("dead", "node0 slots=1", "10.77.0.99 slots=1")
    checked = hosts.run(["bpt-dist", "check", "--hostfile", "dead"], seconds=30)
    figures = {"worst_seconds": round(checked.seconds, 1)}
    assert checked.returncode == 2
    assert re.search(r"^FAIL  10\.77\.0\.99: does not answer", checked.output, re.MULTILINE), checked.output
    config = long_config(hosts, tiny_world, "dead", 4)
    started = hosts.run(hosts.train(config, "distribution.startup_timeout=8", hostfile="dead"), seconds=120)
    assert started.returncode != 0
    assert "10.77.0.99" in started.output
    assert not (hosts.folder / "runs" / "dead").exists()
    nothing_is_left(hosts)
    record_figure("F7", "real pdsh, check and launch", **figures)


def test_a_hostfile_that_is_not_there_does_not_become_a_small_job(hosts: TwoHosts, tiny_world: Path):
    config = long_config(hosts, tiny_world, "small", 4)
    ended = hosts.run(hosts.train(config, "distribution.expect_world_size=2", hostfile="nosuch"), seconds=120)
    assert ended.returncode == 2, ended.output
    assert ended.output.count("distribution.expect_world_size is 2, but 1 process(es) were started") == 1
    assert "check that the hostfile is found" in ended.output
    assert ended.seconds <= 100, "10 s on an idle machine, most of them the launcher's own imports"
    assert not (hosts.folder / "runs" / "small").exists()
    nothing_is_left(hosts)
    record_figure("F8", "two hosts, no such hostfile", worst_seconds=round(ended.seconds, 1))


def test_a_port_in_use_is_said_and_nobody_waits_for_its_owner(hosts: TwoHosts, tiny_world: Path):
    config = long_config(hosts, tiny_world, "port", 4)
    listener = ["python", "-c", "import socket, time; s = socket.create_server(('', 29517)); time.sleep(600)"]
    with hosts.started(listener):
        command = hosts.train(config, "distribution.startup_timeout=10", options=["--master_port", "29517"])
        ended = hosts.run(command, seconds=90)
        checked = hosts.run(["bpt-dist", "check", "--hostfile", "hostfile", "--master-port", "29517"])
    assert ended.returncode == 2, ended.output
    assert "node0: port 29517 of node0 is in use; choose another port" in ended.output
    assert "node1: 10.77.0.1:29517: something other than rank 0 of this job answers there" in ended.output
    assert checked.returncode == 2
    assert "FAIL  node0: port 29517 is in use" in checked.output
    assert not (hosts.folder / "runs" / "port").exists()
    nothing_is_left(hosts)
    record_figure("F21", "port in use, two hosts", worst_seconds=round(ended.seconds, 1))


@pytest.mark.parametrize("form", ["torchrun with a rendezvous", "torchrun as Kubeflow Trainer calls it"])
def test_torchrun_on_two_hosts(hosts: TwoHosts, tiny_world: Path, form: str):
    name = "c10d" if "rendezvous" in form else "kubeflow"
    config = long_config(hosts, tiny_world, name, 4)
    script = [SCRIPT, "--config", config, "distribution.expect_world_size=2"]
    commands = [
        ["torchrun", "--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29601", "--rdzv-id", "run1", *script]
    ] * 2
    variables = [{"GLOO_SOCKET_IFNAME": "eth0"}] * 2
    if name == "kubeflow":
        commands = [["torchrun", *script]] * 2
        pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "node0", "PET_MASTER_PORT": "29500"}
        variables = [{**pod, "PET_NODE_RANK": str(index)} for index in range(2)]
    with hosts.started(commands[0], 0, **variables[0]) as first, hosts.started(commands[1], 1, **variables[1]) as second:
        codes = [job.ended(120).returncode for job in (first, second)]
        output = first.output + second.output
    assert codes == [0, 0], output
    assert status(hosts.folder / "runs" / name)["state"] == "finished"
    nothing_is_left(hosts)
