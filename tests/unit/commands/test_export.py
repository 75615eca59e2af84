"""An export that is interrupted leaves what was there, never a mixture of two exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpt_dist.commands import export
from bpt_dist.errors import StorageError


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A run that exported a prompt of one task."""
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(f"new {name}")
    return SimpleNamespace(exported=lambda task: folder)


def old_export(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    (folder / "weights.json").write_text("old")
    (folder / "weights.safetensors").write_text("old")
    return contents(folder)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_an_export_replaces_an_earlier_one_as_a_whole(run: Any, tmp_path: Path) -> None:
    old_export(tmp_path / "out" / "mood")
    place = export._single(run, "mood", tmp_path / "out")
    assert contents(place) == {name: f"new {name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert [path.name for path in place.parent.iterdir()] == ["mood"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_the_old_one(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before, copy = old_export(tmp_path / "out" / "mood"), shutil.copyfile

    def torn(source: Path, target: Path) -> None:
        Path(target).mkdir()
        copy(Path(source) / "adapter_config.json", Path(target) / "adapter_config.json")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", torn)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            export._single(run, "mood", tmp_path / "out")
    assert contents(tmp_path / "out" / "mood") == before
    export._single(run, "mood", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mood"], "leftovers of the interrupted one are removed"


def test_a_folder_that_is_no_export_is_left_alone(run: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "mood").mkdir(parents=True)
    (tmp_path / "out" / "mood" / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="exists and is not an export"):
        export._single(run, "mood", tmp_path / "out")
    assert contents(tmp_path / "out" / "mood") == {"thesis.tex": "mine"}
