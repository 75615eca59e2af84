"""`bpt-dist check --hostfile` on two real hosts: content with a good pair, and naming host, value and remedy of each mistake."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run
import yaml
from two_hosts import JOB_ENVIRONMENT, NODES, TwoHosts


@pytest.fixture(scope="module")
def config(hosts: TwoHosts, tiny_world: Path) -> Path:
    plain = tiny_run.settings(tiny_world, {"name": "bpt"}) | {"output": str(hosts.folder / "checked")}
    file = hosts.folder / "checked.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def check(hosts: TwoHosts, *words: object, **variables: str) -> tuple[int, str]:
    ended = hosts.run(["bpt-dist", "check", *words], seconds=60, **variables)
    return ended.returncode, ended.output


def failures(output: str) -> list[str]:
    return re.findall(r"^FAIL  (.*)$", output, re.MULTILINE)


@contextmanager
def job_environment(hosts: TwoHosts, text: str) -> Iterator[None]:
    file = hosts.folder / ".deepspeed_env"
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(JOB_ENVIRONMENT)


def test_a_good_pair_and_the_command_to_start_with(hosts: TwoHosts, config: Path):
    code, output = check(hosts, "--hostfile", "hostfile", "-c", config)
    assert code == 0, output
    assert failures(output) == []
    for part in ("connections: 2 of 2", "sources: ", "python: ", "packages: ", "backbone: ", "node1: node1,"):
        assert part in output
    (command,) = re.findall(r"^  (PDSH_SSH_ARGS_APPEND=.*)$", output, re.MULTILINE)
    assert command.endswith(f"deepspeed --hostfile hostfile launcher/train.py --config {config} distribution.expect_world_size=2")
    assert list((hosts.folder / "checked").iterdir()) == [], "its marker is gone"
    assert hosts.jobs() == []


def test_own_name_on_loopback(hosts: TwoHosts):
    without_interface = JOB_ENVIRONMENT.replace("GLOO_SOCKET_IFNAME=eth0\n", "")
    with job_environment(hosts, without_interface):
        assert failures(check(hosts, "--hostfile", "hostfile")[1]) == []
        hosts.name_hosts(1, own_address="127.0.1.1")
        try:
            code, output = check(hosts, "--hostfile", "hostfile")
            with job_environment(hosts, JOB_ENVIRONMENT):
                fixed = check(hosts, "--hostfile", "hostfile")
        finally:
            hosts.name_hosts(1)
    assert code == 2
    assert failures(output)[0].startswith("node1: its own name node1 resolves to 127.0.1.1")
    assert "GLOO_SOCKET_IFNAME" in failures(output)[0]
    assert any(line.startswith("node0: cannot reach node1 at 127.0.1.1") for line in failures(output))
    assert fixed[0] == 0, fixed[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (JOB_ENVIRONMENT.replace("eth0", "ib0"), r"node0: GLOO_SOCKET_IFNAME names 'ib0', there are .*eth0.*; correct it"),
        (JOB_ENVIRONMENT + "NCCL_SOCKET_IFNAME=mlx5\n", r"node1: NCCL_SOCKET_IFNAME names 'mlx5'"),
        (JOB_ENVIRONMENT + "# fast network\n", r"\.deepspeed_env:4: is a comment, at which the launcher stops; remove the line"),
        (JOB_ENVIRONMENT + "\n", r"\.deepspeed_env:4: is a blank line"),
        (JOB_ENVIRONMENT + "DEBUG\n", r"\.deepspeed_env:4: is no KEY=VALUE"),
        (JOB_ENVIRONMENT + "A=$(touch executed)\n", r"\.deepspeed_env:4: A: contains '\$'.*; unset A"),
        (JOB_ENVIRONMENT + "HF_TOKEN=hf_canary\n", r"\.deepspeed_env:4: HF_TOKEN: holds a secret"),
    ],
    ids=["interface", "interface prefix", "comment", "blank line", "no value", "shell", "secret"],
)
def test_a_mistake_in_the_environment_file(hosts: TwoHosts, text: str, expected: str):
    with job_environment(hosts, text):
        code, output = check(hosts, "--hostfile", "hostfile")
    assert code == 2
    assert any(re.search(expected, line) for line in failures(output)), output
    assert "canary" not in output
    assert not (hosts.folder / "executed").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "canary"}, r"environment: MLFLOW_TRACKING_PASSWORD: holds a secret.*; unset"),
        ({"MLFLOW_TRACKING_URI": "https://me:canary@host/"}, r"environment: MLFLOW_TRACKING_URI: holds a secret"),
        ({"MLFLOW_RUN_NAME": "a;touch executed;canary"}, r"environment: MLFLOW_RUN_NAME: contains ';'"),
        ({"NCCL_SOCKET_IFNAME": "eth0`touch executed`canary"}, r"environment: NCCL_SOCKET_IFNAME: contains '`'"),
        ({"PDSH_SSH_ARGS_APPEND": ""}, r"ssh: a host that is cut off would be waited for.*ServerAliveInterval=5"),
    ],
    ids=["password", "address", "shell", "unquoted shell", "keep alive"],
)
def test_a_mistake_in_the_environment(hosts: TwoHosts, variables: dict[str, str], expected: str):
    code, output = check(hosts, "--hostfile", "hostfile", **variables)
    assert code == 2
    assert any(re.search(expected, line) for line in failures(output)), output
    assert "canary" not in output
    assert not (hosts.folder / "executed").exists()


def test_an_interface_that_is_set_here_only(hosts: TwoHosts):
    with job_environment(hosts, "OMP_NUM_THREADS=1\n"):
        _, output = check(hosts, "--hostfile", "hostfile", GLOO_SOCKET_IFNAME="eth0")
    assert failures(output) == [
        "environment: GLOO_SOCKET_IFNAME: is set here and would not reach the other hosts; "
        "add the line GLOO_SOCKET_IFNAME=... to .deepspeed_env"
    ]


def test_more_slots_than_cores(hosts: TwoHosts):
    hosts.hostfile("many", "node0 slots=1", "node1 slots=1000")
    code, output = check(hosts, "--hostfile", "many")
    assert code == 2
    assert re.fullmatch(r"node1: slots=1000, but it has \d+ core\(s\); write slots=\d+ in the hostfile", failures(output)[0])


def test_one_host_under_two_names(hosts: TwoHosts):
    hosts.hostfile("twice", "node0 slots=1", "10.77.0.1 slots=1")
    code, output = check(hosts, "--hostfile", "twice")
    assert code == 2
    assert "10.77.0.1: calls itself node0, as another line of the hostfile does" in output


def test_world_size_and_overrides(hosts: TwoHosts, config: Path):
    code, output = check(hosts, "--hostfile", "hostfile", "-c", config, "distribution.expect_world_size=4")
    assert code == 2
    assert failures(output) == ["world size: distribution.expect_world_size is 4, the hostfile has 2 slots; change one of them"]
    code, output = check(hosts, "--hostfile", "hostfile", "-c", config, "name=a;touch${IFS}executed")
    assert code == 2
    assert "start with" not in output
    assert not (hosts.folder / "executed").exists()


def test_another_program_in_the_place_of_the_project(hosts: TwoHosts):
    """A host that runs another version: its shell puts a changed copy of the package in front."""
    copy = hosts.folder / "changed"
    shutil.copytree(
        Path(tiny_run.__file__).parents[2] / "bpt_dist", copy / "bpt_dist", ignore=shutil.ignore_patterns("__pycache__", "mini")
    )
    with (copy / "bpt_dist" / "svgd.py").open("a") as source:
        source.write("# changed\n")
    wrapper = hosts.folder / "bin" / "ssh"
    real = wrapper.read_text()
    # As if the login of node1 set PYTHONPATH: only there, in front of the command, which is the last word.
    elsewhere = (
        f'for last; do :; done\ncase "$*" in *" {NODES[1]} cd "*) set -- {NODES[1]} "export PYTHONPATH={copy}; $last";; esac\n'
    )
    wrapper.write_text(real.replace("exec", elsewhere + "exec"))
    try:
        code, output = check(hosts, "--hostfile", "hostfile")
    finally:
        wrapper.write_text(real)
    assert code == 2
    (line,) = failures(output)
    assert re.fullmatch(r"node1: sources \w{12} \(on node0 \w{12}\); copy the same version of the project to all hosts", line)


def test_ports_that_a_firewall_drops(hosts: TwoHosts):
    if shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin") is None:
        pytest.skip("needs nft (Debian: nftables)")
    rules = "add table inet wall; add chain inet wall input { type filter hook input priority 0; policy accept; }; " \
            "add rule inet wall input iif lo accept; add rule inet wall input ct state established accept; " \
            "add rule inet wall input tcp dport != 22 drop"  # fmt: skip
    enter = ["/usr/sbin/nft"]
    assert hosts.run([*enter, rules], index=1).returncode == 0
    try:
        code, output = check(hosts, "--hostfile", "hostfile")
    finally:
        hosts.run([*enter, "delete table inet wall"], index=1)
    assert code == 2
    (line,) = failures(output)
    assert line.startswith("node0: cannot reach node1 at 10.77.0.2 on a free port (timed out); open all ports between the hosts")
