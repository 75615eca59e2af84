"""Tracking on a file system without `flock`: POSIX locks serve as well, and without any the start says what to do."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from bpt_dist.errors import StorageError
from bpt_dist.storage.files import write_json_atomic
from bpt_dist.tracking import mirror, store
from bpt_dist.tracking.request import Request
from bpt_dist.tracking.sender import Sender


def refuse(monkeypatch: pytest.MonkeyPatch, *names: str, number: int = errno.ENOSYS) -> None:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in names:
        monkeypatch.setattr(fcntl, name, call)


def request(uri: str) -> Request:
    return Request(id="x", uri=uri, experiment="e", run_name="r")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    sent: list[dict] = []
    monkeypatch.setattr(mirror, "_tell", sent.append)
    return sent


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_flock_a_run_is_mirrored_under_posix_locks(
    number: int, tmp_path: Path, told: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "flock", number=number)
    handle = mirror.Mirror(tmp_path, request(f"sqlite:///{tmp_path}/mlflow.db"))
    handle.finish()
    assert [command["do"] for command in told] == ["open", "finish"]
    Sender(tmp_path).close()  # no "another process is sending this run"


def test_without_any_lock_the_start_says_so_and_nothing_is_mirrored(
    tmp_path: Path, told: list[dict], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, "flock", "lockf")
    with caplog.at_level(logging.WARNING):
        mirror.Mirror(tmp_path, request(f"sqlite:///{tmp_path}/mlflow.db")).finish()
    assert told == []
    (line,) = caplog.messages
    assert "this file system has no file locks" in line
    assert store.NO_LOCKS in line
    assert (tmp_path / "tracking.json").is_file()  # `bpt-dist sync` works once the folder is elsewhere


def test_a_server_needs_no_locks(tmp_path: Path, told: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "flock", "lockf")
    mirror.Mirror(tmp_path, request("http://127.0.0.1:5000")).finish()
    assert [command["do"] for command in told] == ["open", "finish"]
    Sender(tmp_path, request("http://127.0.0.1:5000")).close()


def test_a_lock_that_is_held_is_no_missing_lock(tmp_path: Path, told: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "flock", number=errno.EAGAIN)
    store.check_locks(f"sqlite:///{tmp_path}/mlflow.db")
    write_json_atomic(tmp_path / "tracking.json", {"uri": "http://127.0.0.1:5000"})
    with pytest.raises(StorageError, match="another process is sending this run"):
        Sender(tmp_path)


@pytest.mark.parametrize("name", ["a b", "lab#2", "50%", "é", "x[1]", "a&b=c+d@e"])
def test_a_store_may_be_in_any_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "mlflow.db").touch()
    store.check_locks(f"sqlite:///{folder}/mlflow.db")
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
