"""The command line of `launcher/train.py`: its paths and words are free where no shell has read them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
JOB = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture
def program() -> Callable[[Sequence[str]], int]:
    specification = importlib.util.spec_from_file_location("train_program", ROOT / "launcher" / "train.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


def written(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    file = folder / name / "config.yaml"
    file.write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    return file


NAMES = ["my runs", "a;b", "$(x)", "ä", "lab#2", "50%", "what?", "[x]", "a@b=c"]


@pytest.mark.parametrize("hosts", [None, "1"])
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_may_be_anywhere_on_one_host(
    name: str,
    hosts: str | None,
    program: Callable[[Sequence[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {**os.environ, **(JOB | {"CROSS_SIZE": hosts} if hosts else {})}
    monkeypatch.setattr(os, "environ", environment)
    assert program(["--config", str(written(tmp_path, name)), "--print-config"]) == 0
    assert "name: quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a@b=c"])
def test_shells_of_several_hosts_have_read_the_path(
    name: str,
    program: Callable[[Sequence[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **JOB, "CROSS_SIZE": "2"})
    assert program(["--config", str(written(tmp_path, name)), "--print-config"]) == 2
    assert "which a shell would act on; use letters, digits and _./+-" in capsys.readouterr().err


def test_the_rule_is_that_of_check_hostfile(
    program: Callable[[Sequence[str]], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **JOB, "CROSS_SIZE": "2"})
    assert program(["--config", str(written(tmp_path, "runs+1")), "--print-config"]) == 0
    assert program(["--config", str(written(tmp_path, "runs")), "name=x;y", "--print-config"]) == 2
    assert "put it into a YAML file" in capsys.readouterr().err
