"""`bpt-dist train` is the program of `launcher/train.py`; `--version` says what a bug report needs."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import pytest

from bpt_dist.commands.main import main
from bpt_dist.config import RunConfig
from bpt_dist.storage import run_directory

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def test_it_takes_the_options_of_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-c", str(CONFIG), "--print-config", "name=other"]) == 0
    assert "name: other" in capsys.readouterr().out


def test_it_trains_the_rows_that_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained: list[str] = []

    def one(config: RunConfig, *_: object, number: str, **__: object) -> bool:
        trained.append(number + config.name)
        return False

    monkeypatch.setattr("bpt_dist.train.train_run", one)
    assert main(["train", "-c", str(CONFIG), "--row", "untrained", "--row", "vanilla_transfer", "seeds=[3,4]"]) == 0
    assert trained == ["1/4 untrained-s3", "2/4 untrained-s4", "3/4 vanilla_transfer-s3", "4/4 vanilla_transfer-s4"]
    assert main(["train", "-c", str(CONFIG), "--row", "vanilla"]) == 2
    assert capsys.readouterr().err.startswith("--row: vanilla is no row of quickstart; rows are untrained, ")


def test_its_usage_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-c", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("nowhere.yaml: no such configuration file")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config"])
    assert ended.value.code == 2
    assert "usage: bpt-dist train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/opt/env/bin/bpt-dist", "train", "-c", "my file.yaml"], "bpt-dist train -c 'my file.yaml'"),
        (["launcher/train.py", "--config", "a.yaml"], "python launcher/train.py --config a.yaml"),
        (["/site/bpt_dist/commands/train.py", "-c", "a.yaml"], "python -m bpt_dist.commands.train -c a.yaml"),
    ],
)
def test_the_command_to_resume_is_the_one_that_started(argv: list[str], command: str) -> None:
    assert run_directory._command_line(argv) == command


def test_the_version_names_what_can_change_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"bpt_dist {metadata.version('bpt_dist')}")
    assert f"Python {platform.python_version()}" in said
    assert f"torch {metadata.version('torch')}" in said
