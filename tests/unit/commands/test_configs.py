"""The shipped configurations, listed and copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpt_dist.commands.main import main
from bpt_dist.config import load, shipped

ROOT = Path(__file__).parents[3]


def test_all_yaml_files_of_the_checkout_are_listed_with_a_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == sorted(str(file.relative_to(ROOT / "configs")) for file in (ROOT / "configs").rglob("*.yaml"))
    assert {name for name, purpose in found.items() if not purpose} == set()
    assert main(["configs"]) == 0
    assert "bpt/mini.yaml " in capsys.readouterr().out


def test_files_and_folders_are_copied_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "bpt/mini", "configs/table/", "--to", str(tmp_path)]) == 0
    copied = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert copied == {"bpt/mini.yaml", *(name for name in shipped.names() if name.startswith("table/"))}
    assert {Path(line) for line in capsys.readouterr().out.splitlines()} == {tmp_path / name for name in copied}
    assert (tmp_path / "bpt" / "mini.yaml").read_bytes() == (ROOT / "configs" / "bpt" / "mini.yaml").read_bytes()
    assert load(tmp_path / "bpt" / "mini.yaml").method.name == "bpt"


def test_all_are_copied_where_only_a_folder_is_named(tmp_path: Path) -> None:
    assert main(["configs", "--to", str(tmp_path / "all")]) == 0
    assert sorted(file.relative_to(tmp_path / "all").as_posix() for file in tmp_path.rglob("*.yaml")) == shipped.names()


def test_nothing_is_overwritten_and_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["configs", "bpt/mini", "quickstart", "--to", str(tmp_path)]) == 2
    assert "quickstart.yaml: exists, and nothing is overwritten; move it away" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["quickstart.yaml"]
    assert main(["configs", "bpt/mimi.yaml", "--to", str(tmp_path)]) == 2
    assert "bpt/mimi.yaml: is no shipped configuration" in capsys.readouterr().err
    assert main(["configs", "bpt/mini", "--to", str(tmp_path / "quickstart.yaml")]) != 0
    assert "cannot be written" in capsys.readouterr().err
