"""File systems that cannot lock, sync a directory or make hard links: found out, done without, or named."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpt_dist.storage import file_system
from bpt_dist.storage.file_system import NoFileLocks, lock_file, what_is_missing
from bpt_dist.storage.files import OS_FILES, write_atomic
from bpt_dist.storage.metrics_log import MetricsLog

HOLD = """
import sys, time
from bpt_dist.storage.file_system import lock_file
import bpt_dist.storage.file_system as fs
if sys.argv[2] == "posix":
    def refuse(*_): raise OSError(38, "Function not implemented")
    refuse.__name__ = "flock"
    fs.fcntl.flock = refuse
file = open(sys.argv[1], "w")
lock_file(file, wait=False)
print("held", flush=True)
sys.stdin.read()
"""


def failing(number: int, name: str = "call") -> Callable[..., Any]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    call.__name__ = name
    return call


@pytest.mark.parametrize("kind", ["flock", "posix"])
def test_a_lock_keeps_other_processes_out(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "posix":
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS, "flock"))
    place = tmp_path / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with place.open("w") as file, pytest.raises(BlockingIOError):
        lock_file(file, wait=False)
    other.communicate("")
    with place.open("w") as file:
        lock_file(file, wait=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, failing(number, name))
    with (tmp_path / "lock").open("w") as file, pytest.raises(NoFileLocks, match=r"lock: .* no file locks \(flock: .*, lockf: "):
        lock_file(file, wait=False)


@pytest.fixture
def no_directory_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make `fsync` of directories fail with an error number."""
    real = os.fsync
    file_system._warned.clear()

    def set_number(number: int) -> None:
        def fsync(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return set_number


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_without_directory_sync_files_are_written_with_one_warning(
    number: int, no_directory_sync: Callable[[int], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    no_directory_sync(number)
    with caplog.at_level(logging.WARNING):
        for place in ("a", "b"):
            assert write_atomic(tmp_path / place, b"x").read_bytes() == b"x"
    (line,) = caplog.messages
    assert "cannot sync a directory" in line


def test_a_failing_disk_is_no_missing_ability(no_directory_sync: Callable[[int], None], tmp_path: Path) -> None:
    no_directory_sync(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        OS_FILES.fsync(tmp_path)


def test_a_directory_that_cannot_be_opened_counts_as_one_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file_system._warned.clear()
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    OS_FILES.fsync(tmp_path)
    assert "cannot sync a directory" in caplog.text
    with pytest.raises(PermissionError):
        OS_FILES.fsync(tmp_path / "file")


def test_the_metrics_log_works_where_nothing_can_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file_system._warned.clear()
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSYS))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "stage": "source", "metrics": {}})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    assert "cannot sync a file" in caplog.text


def test_what_is_missing_is_found_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_is_missing(tmp_path) == {}
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, failing(errno.ENOSYS, name))
    found = what_is_missing(tmp_path)
    assert found["hard links"] == "Operation not permitted"
    assert found["directory sync"] == "Invalid argument"
    assert found["file locks"] == "flock: Function not implemented, lockf: Function not implemented"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a[1].json", "a*.json", "a?.json"])
def test_leftovers_are_those_of_the_file_itself(name: str, tmp_path: Path) -> None:
    for leftover in (f"{name}.tmp-12345678", "a1.json.tmp-12345678"):
        (tmp_path / leftover).touch()
    write_atomic(tmp_path / name, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "a1.json.tmp-12345678"])


@pytest.mark.parametrize(
    ("place", "kept"),
    [("/data/x", True), ("/net/x", False), ("/net/scratch/x", True), ("/my disk/x", False), ("/home/x", False), ("/other/x", True)],
)
def test_the_kind_of_a_disk_is_that_of_the_innermost_mount(place: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [
        "1 0 8:1 / / rw - ext4 /dev/sda rw",
        "2 1 0:1 / /net rw,noatime shared:2 - nfs4 server:/a rw",
        "3 2 0:2 / /net/scratch rw - lustre server:/b rw",
        "4 1 0:3 / /my\\040disk rw - cifs //server/c rw",
        "5 1 0:4 / /home rw master:1 shared:3 - fuse.sshfs me@server: rw",
    ]
    monkeypatch.setattr(Path, "read_text", lambda _, **options: "\n".join(mounts) + "\n")
    assert file_system.keeps_removed_files(Path(place)) is kept


def test_without_a_list_of_mounts_a_file_counts_as_local(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path, **options: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert file_system.keeps_removed_files(Path("/"))
