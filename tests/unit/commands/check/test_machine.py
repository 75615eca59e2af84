"""`bpt-dist check` tries what a run asks of its file systems, and where caches go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bpt_dist.commands.check import job, machine
from bpt_dist.config import RunConfig
from bpt_dist.config.method_source import method_options


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the file systems lack, for the tests to fill."""
    missing: dict[str, str] = {}
    for module in (machine, job):
        monkeypatch.setattr(module, "what_is_missing", lambda folder: missing)
    return missing


def test_a_file_system_that_can_do_everything_is_said_as_before(tmp_path: Path) -> None:
    found = machine._output(tmp_path / "runs" / "run")
    assert found.remedy is None
    assert found.text.startswith(f"{tmp_path} can be written, ")
    assert "without" not in found.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ability", "fails"), [("hard links", True), ("directory sync", False), ("file locks", False)])
def test_what_a_file_system_cannot_do_is_named(ability: str, fails: bool, tmp_path: Path, lacking: dict[str, str]) -> None:
    lacking[ability] = "Function not implemented"
    found = machine._output(tmp_path)
    assert f"without {ability} (Function not implemented)" in found.text
    assert ("hard links" in (found.remedy or "")) is fails


@pytest.mark.parametrize("uri", [None, "http://127.0.0.1:9"])
def test_a_store_needs_locks_and_a_server_does_not(uri: str | None, tmp_path: Path, lacking: dict[str, str]) -> None:
    lacking["file locks"] = "flock: Function not implemented"
    method = method_options("prompt_tuning")(name="prompt_tuning")
    config = RunConfig.model_validate({"method": method, "output": tmp_path, "tracking": {"uri": uri}})
    (found,) = job._tracking(config)
    assert ("no file locks" in found.text) is (uri is None)
    assert found.remedy is not None
    if uri is None:
        assert "set tracking.uri to a server" in found.remedy


def test_the_folder_of_caches_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine._cache(tmp_path / "a" / "b")
    assert (found.text, found.remedy) == (f"{tmp_path}/a/b can be written", None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert machine._cache(tmp_path).remedy == "set data.cache= to another folder"
