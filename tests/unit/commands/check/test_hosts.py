"""What is read strictly before the launcher reads it loosely: hostfile, variables, command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny_t5

from bpt_dist.backbones.loading import load
from bpt_dist.commands.check import hostfile, probe
from bpt_dist.commands.check.compare import compared, connections, of_one_host, world_size
from bpt_dist.commands.check.hostfile import Host
from bpt_dist.config import DistributionConfig
from bpt_dist.errors import ConfigError


def read(tmp_path: Path, text: str) -> list[Host]:
    file = tmp_path / "hostfile"
    file.write_text(text)
    return hostfile.read_hostfile(file)


def test_a_hostfile_is_names_and_slots_in_order(tmp_path):
    text = "# two nodes\nnode0 slots=4\n\n  10.0.0.2\tslots=2  \nGPU-7.example.org slots=1\n"
    assert read(tmp_path, text) == [("node0", 4), ("10.0.0.2", 2), ("GPU-7.example.org", 1)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("node0", "is no host"),
        ("node0 slots=2junk", "is no host"),
        ("node0 slots=2 # two", "is no host"),
        ("node0 slots=-1", "is no host"),
        ("node0 slots=0", "slots must be 1 to 1024"),
        ("node0 slots=4096", "slots must be 1 to 1024"),
        ("-oProxyCommand=x slots=1", "is no DNS name"),
        ("$(touch${IFS}x) slots=2", "is no DNS name"),
        ("user@node0 slots=1", "is no DNS name"),
        ("node_0 slots=1", "is no DNS name"),
        (f"{'a' * 64} slots=1", "is no DNS name"),
        ("nöde slots=1", "is no DNS name"),
        ("10.0.0.256 slots=1", "is no address"),
        ("10.0.1 slots=1", "is no address"),
        ("fe80::1 slots=1", "no IPv6 address"),
    ],
)
def test_a_line_that_is_no_host_is_named(tmp_path, line, what):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"good slots=1\n{line}\n")
    assert str(caught.value).startswith(f"{tmp_path}/hostfile:2: ")
    assert what in str(caught.value)
    assert repr(line)[:60] in str(caught.value)


def test_all_problems_of_a_hostfile_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "a slots=1\nb\na slots=2\n")
    assert [line.split(": ")[0][-2:] for line in str(caught.value).splitlines()] == [":2", ":3"]
    for text, what in (("", "lists no host"), ("# nothing\n", "lists no host")):
        with pytest.raises(ConfigError, match=what):
            read(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        hostfile.read_hostfile(tmp_path / "nosuch")


def test_the_environment_file_has_one_assignment_a_line(tmp_path):
    file = tmp_path / ".deepspeed_env"
    file.write_text("GLOO_SOCKET_IFNAME=eth0\nTOKENIZERS_PARALLELISM=false\nA=b=c d\n")
    assert hostfile.read_environment_file(file) == (
        {"GLOO_SOCKET_IFNAME": "eth0", "TOKENIZERS_PARALLELISM": "false", "A": "b=c d"},
        [],
    )
    file.write_text("\n# note\nexport A=1\nMY_API_TOKEN=abc\nB=`id`\n")
    _, problems = hostfile.read_environment_file(file)
    assert [problem.place for problem in problems] == [f"{file}:{n}" for n in (1, 2, 3)] + [
        f"{file}:4: MY_API_TOKEN",
        f"{file}:5: B",
    ]
    assert not any("abc" in part or "id`" in part for problem in problems for part in problem)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "x", True), ("MLFLOW_TRACKING_TOKEN", "x", True), ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("MLFLOW_TRACKING_URI", "https://u:p@host/", True), ("MLFLOW_TRACKING_URI", "https://host/a", False),
        ("TOKENIZERS_PARALLELISM", "false", False), ("MLFLOW_EXPERIMENT_NAME", "a b", False),
    ],
)  # fmt: skip
def test_secrets_do_not_travel(name, value, secret):
    assert bool(list(hostfile.problems_with_variables({name: value}))) == secret


def test_only_the_prefixes_of_the_launcher_are_passed_on():
    given = {"MLFLOW_X": "1", "PYTHONPATH": "2", "UCX_TLS": "3", "NCCL_DEBUG": "4", "GLOO_SOCKET_IFNAME": "5", "HF_TOKEN": "6"}
    assert list(hostfile.exported(given)) == ["MLFLOW_X", "PYTHONPATH", "UCX_TLS", "NCCL_DEBUG"]


def test_the_command_says_how_many_processes_it_expects():
    found = hostfile.command(Path("hostfile"), Path("configs/a.yaml"), ["seed=1"], 6, 29501)
    assert found == (
        'PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=3" '
        "deepspeed --hostfile hostfile --master_port 29501 "
        "launcher/train.py --config configs/a.yaml seed=1 distribution.expect_world_size=6"
    )
    assert hostfile.command(Path("h"), Path("c"), ["expect_world_size=6"], 6).endswith("--config c expect_world_size=6")


@pytest.mark.parametrize("override", ["seeds=[0,1]", "name=a b", "--fresh", "-x", "=1", "name=a'b", "name=%h", "name=~"])
def test_an_override_that_a_shell_would_change_is_refused(override):
    with pytest.raises(ConfigError, match=r"put it into a YAML file"):
        hostfile.command(Path("hostfile"), Path("c.yaml"), [override], 2)


# --- what the hosts answer -------------------------------------------------------------------------------------


def facts(**changes):
    good = {
        "name": "node0", "own_addresses": ["10.0.0.1"], "interfaces": ["eth0", "lo"], "cores": 4, "gpus": 0, "marker": True,
        "port_in_use": False, "variables": {}, "gloo": "10.0.0.1", "port": 4000, "sources": "a" * 64, "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
    }  # fmt: skip
    return good | changes


def problems(findings) -> list[str]:
    return [f"{finding.name}: {finding.text}; {finding.remedy}" for finding in findings if finding.remedy is not None]


@pytest.mark.parametrize(
    ("changes", "slots", "message"),
    [
        ({}, 5, "slots=5, but it has 4 core(s); write slots=4"),
        ({"gpus": 2}, 4, "slots=4, but it has 2 GPU(s); write slots=2"),
        ({"own_addresses": []}, 1, "its own name node0 does not resolve there"),
        ({"own_addresses": ["::1"]}, 1, "resolves to ::1, where no other host"),
        ({"marker": False}, 1, "does not see the folder of the runs; choose an output="),
        ({"port_in_use": True}, 1, "port 29500 is in use; choose another"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth1"}, "gloo": None}, 1, "names 'eth1', there are eth0, lo"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth0"}, "gloo": None}, 1, "names 'eth0', which has no address"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, 1, "names 'eth', there are eth0, lo"),
    ],
    ids=str,
)
def test_what_is_wrong_with_one_host_is_one_line(changes, slots, message):
    (line,) = problems(of_one_host(Host("h", slots), facts(**changes), 29500))
    assert line.startswith("h: ")
    assert message in line


@pytest.mark.parametrize("value", ["eth", "=eth0", "^docker", "^=docker0", "eth0,lo"])
def test_interfaces_as_nccl_names_them(value):
    assert problems(of_one_host(Host("h", 1), facts(variables={"NCCL_SOCKET_IFNAME": value}), 29500)) == []


def test_hosts_are_compared_with_the_first():
    found = {"a": facts(), "b": facts(name="node1", python="3.12.1", packages={"torch": "2.12.0"}), "c": facts(name="node2")}
    assert problems(compared(found)) == [
        "b: python 3.12.1 (on a 3.11.7); use the same Python on all hosts",
        "b: torch 2.12.0 (on a 2.13.0); pip install --constraint constraints.txt --editable . on all hosts",
    ]
    assert problems(compared({"a": {"backbone": "x" * 64}, "b": {"backbone": None}}, ("backbone",)))[0].startswith(
        "b: has no backbone"
    )


def test_a_connection_that_fails_is_named_in_its_direction():
    found = {"a": facts(), "b": facts(gloo="10.0.0.2")}
    (line,) = problems(connections({"a": {"b": "timed out"}, "b": {"a": None}}, found))
    assert line.startswith("a: cannot reach b at 10.0.0.2 on a free port (timed out); open all ports")
    assert problems(connections({"a": {"b": None}, "b": {"a": None}}, found)) == []
    assert len(problems(connections({"a": {"b": None}, "b": None}, found))) == 1, "a host that stopped answering"


def test_slots_are_compared_with_what_is_expected():
    assert world_size(DistributionConfig(expect_world_size=4), 4).remedy is None
    assert world_size(DistributionConfig(), 4).remedy is None
    assert world_size(DistributionConfig(expect_world_size=4), 2).remedy is not None
    assert world_size(DistributionConfig.model_validate({"mesh": {"particle": 2, "data": 2}}), 2).remedy is not None


def test_the_backbone_has_the_hash_that_runs_record(tmp_path):
    tiny_t5.make(tmp_path / "t5")
    assert probe.hash_of_files(str(tmp_path / "t5"), None) == load(str(tmp_path / "t5")).identity
    assert probe.hash_of_files("nobody/such-model", None) is None


def test_sharded_weights_are_hashed_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert probe.hash_of_files(str(tmp_path), None) == hashlib.sha256(b"ab").hexdigest()
