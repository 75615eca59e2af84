"""What the launcher passes through the shells of the hosts: its own command builder, a real bash, a file that must not appear."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bpt_dist.commands.check import hostfile
from bpt_dist.errors import ConfigError

CANARY = "executed"
# Each would run `touch executed` or smuggle in an option in one of the places below, if nobody looked.
CORPUS = (
    "$(touch executed)", "`touch executed`", ";touch executed", "a;touch executed;", "a&&touch executed", "a||touch executed",
    "a|touch executed", "a&touch executed&", "a\ntouch executed\n", "a\rtouch executed", '";touch executed;"', "';touch executed;'",
    '"$(touch executed)"', "'$(touch executed)'", "\\$(touch executed)", "${x:-$(touch executed)}", "$[$(touch executed)]",
    "$((`touch executed`))", "<(touch executed)", ">executed", ">>executed", "a>executed", "2>executed", "a >executed b",
    "<>executed", "$(touch${IFS}executed)", "`touch${IFS}executed`", ";touch${IFS}executed", "{touch,executed};touch$IFS$_",
    "a$(touch\texecuted)", "x=$(touch executed)",
    "~$(touch executed)", "#\n$(touch executed)", "!$(touch executed)",
    "%$(touch executed)h", "-oProxyCommand=touch${IFS}executed",
    "--exec=$(touch executed)", "\u037etouch executed;", "$'\\x24'(touch executed)",
    "((x=1));touch executed",
)  # fmt: skip
HARMLESS = ("plain", "configs/bpt/t5_base_6.yaml", "a=b:c,d@e+f", "10.0.0.1:29500", "eth0,eth1")
BUILDER = """
import json, sys
from types import SimpleNamespace
from deepspeed.launcher.multinode_runner import PDSHRunner
show, cases, commands = sys.argv[1], json.load(sys.stdin), []
sys.executable = show
for arguments, variables in cases:
    given = SimpleNamespace(user_args=arguments, user_script="launcher/train.py", ssh_port=None, launcher_args="", master_addr="a",
                            master_port=1, venv_script=None, no_python=False, module=False, no_local_rank=False, save_pid=False,
                            enable_each_rank_log=None)
    runner = PDSHRunner(given, "e30=")
    for name, value in variables.items():
        runner.add_export(name, value)
    words = runner.get_cmd({}, {"node0": [0], "node1": [0]})[0]
    commands.append(" ".join(words[words.index("-w") + 2:]))
print(json.dumps(commands))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("injection")
    show = found / "show"
    show.write_text(f'#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ.get("MLFLOW_X")]))\n')
    show.chmod(0o755)
    return found


def built(folder: Path, cases: Sequence[tuple[list[str], dict[str, str]]]) -> list[str]:
    """Return what pdsh would give to the shell of each host."""
    command = [sys.executable, "-c", BUILDER, str(folder / "show")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


def side_effect(folder: Path, command: str) -> bool:
    """Run what a host's shell would get and return whether it did what it should not."""
    subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, check=False, timeout=60)
    canary = folder / CANARY
    happened = canary.exists()
    canary.unlink(missing_ok=True)
    return happened


def as_configuration(text: str) -> str:
    return hostfile.command(Path("hostfile"), Path(text), [], 2)


def as_override(text: str) -> str:
    return hostfile.command(Path("hostfile"), Path("c.yaml"), [f"name={text}"], 2)


def as_variable(text: str) -> None:
    if list(hostfile.problems_with_variables({"MLFLOW_X": text})):
        raise ConfigError("refused")


@pytest.mark.parametrize("use", [as_configuration, as_override, as_variable])
def test_every_string_is_refused_before_the_launcher_sees_it(use):
    assert len(set(CORPUS)) == 40
    for text in CORPUS:
        with pytest.raises(ConfigError):
            use(text)


@pytest.mark.parametrize("text", CORPUS)
def test_no_string_is_a_host_or_a_line_of_the_environment_file(tmp_path, text):
    (tmp_path / "hostfile").write_text(f"{text} slots=1\n")
    with pytest.raises(ConfigError):
        hostfile.read_hostfile(tmp_path / "hostfile")
    (tmp_path / ".deepspeed_env").write_text(f"MLFLOW_X={text}\n")
    assert hostfile.read_environment_file(tmp_path / ".deepspeed_env")[1]


def test_without_the_checks_they_are_executed(folder):
    """The corpus is not harmless by itself: through the same builder and shell, many of its strings run."""
    arguments = [side_effect(folder, command) for command in built(folder, [([text], {}) for text in CORPUS])]
    variables = [side_effect(folder, command) for command in built(folder, [([], {"MLFLOW_X": text}) for text in CORPUS])]
    assert sum(arguments) >= 20, "as an argument"
    assert sum(variables) >= 10, "as the value of a variable"


def test_what_the_checks_let_through_arrives_unchanged(folder):
    for text in HARMLESS:
        as_variable(text)
        as_override(text)
    cases = [(["--config", "configs/a.yaml", f"name={text}"], {"MLFLOW_X": text}) for text in HARMLESS]
    for text, command in zip(HARMLESS, built(folder, cases), strict=True):
        words = command.replace("%n", "0")  # what pdsh does
        done = subprocess.run(["bash", "-c", words], cwd=folder, capture_output=True, text=True, check=True)
        arguments, variable = json.loads(done.stdout)
        assert arguments[-3:] == ["--config", "configs/a.yaml", f"name={text}"]
        assert variable == text
        assert not (folder / CANARY).exists()
