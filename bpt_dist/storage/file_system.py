"""What some file systems cannot do: lock a file, sync a directory, make a hard link; detected, and done without where it can be.

Lustre is often mounted without locks; shared folders of virtual machines and FUSE file systems cannot sync a directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from bpt_dist.errors import StorageError

HELD = (errno.EAGAIN, errno.EACCES)
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
CANNOT_OPEN_FOLDER = (errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM)
log = logging.getLogger(__name__)
# Their clients cannot read a page again of a file that another host has removed.
REMOTE = ("nfs", "cifs", "smb", "9p", "afs", "fuse.")


class NoFileLocks(StorageError):
    """The file system knows no file locks of any kind."""


def lock_file(file: IO[Any], *, wait: bool) -> None:
    """Lock an open file against other processes until it is closed.

    Where the file system has no `flock`, POSIX locks are used. Raises BlockingIOError when another process holds it and `wait` is
    false, NoFileLocks where there are no locks.
    """
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    reasons = []
    calls: dict[str, Callable[[IO[Any], int], object]] = {"flock": fcntl.flock, "lockf": fcntl.lockf}
    for name, call in calls.items():
        try:
            call(file, how)
        except OSError as error:
            if error.errno in HELD:
                raise BlockingIOError(error.errno, error.strerror) from error
            reasons.append(f"{name}: {error.strerror}")
        else:
            return
    raise NoFileLocks(f"{file.name}: this file system has no file locks ({', '.join(reasons)})")


def sync(path: Path, descriptor: int) -> None:
    """Make the bytes of a file, or the entries of a directory, survive a power loss; warn once where that is impossible."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        _warn_of_sync(_kind(path), error.strerror or "", str(path))


def sync_path(path: Path) -> None:
    """Open a file or a directory and `sync` it; a directory that cannot be opened counts as one that cannot be synced."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in CANNOT_OPEN_FOLDER or not path.is_dir() or path.is_symlink():
            raise
        _warn_of_sync(_kind(path), error.strerror or "", str(path))
        return
    try:
        sync(path, descriptor)
    finally:
        os.close(descriptor)


def _kind(path: Path) -> str:
    return "directory" if path.is_dir() else "file"


def _warn_of_sync(kind: str, reason: str, path: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        log.warning(
            "%s: this file system cannot sync a %s (fsync: %s); the run goes on, and a power failure may cost its newest files",
            path, kind, reason,
        )  # fmt: skip


_warned: set[str] = set()


def nearest_folder(path: Path) -> Path:
    """Return the nearest folder around `path` that exists: where the first folder on the way to it would be made."""
    place = path.absolute().parent
    while not place.is_dir():
        place = place.parent
    return place


def what_is_missing(folder: Path) -> dict[str, str]:
    """Return what the file system of an existing folder cannot do, with the reason: `hard links`, `file locks`, `directory sync`.

    Each is tried with files that are removed again. Raises OSError where no file can be made.
    """
    probe = folder / f".bpt-probe-{uuid.uuid4().hex}"
    linked = probe.with_name(f"{probe.name}-link")
    missing: dict[str, str] = {}

    def attempt(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            missing[name] = error.strerror or type(error).__name__
        except NoFileLocks as error:
            missing[name] = str(error).rpartition("(")[2].rstrip(")")

    try:
        with probe.open("w") as file:
            attempt("hard links", functools.partial(os.link, probe, linked))
            attempt("file locks", functools.partial(lock_file, file, wait=False))
        attempt("directory sync", functools.partial(_sync_folder, folder))
    finally:
        for path in (probe, linked):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return missing


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keeps_removed_files(path: Path) -> bool:
    """Return whether an open file stays readable when another host removes it; True where nobody knows what is mounted."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return True
    place, longest, kind = path.resolve(), -1, ""
    for fields in map(str.split, mounts):
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])  # a blank is written as a number
        if place.is_relative_to(point) and len(point) >= longest:
            longest, kind = len(point), fields[fields.index("-") + 1]
    return not kind.startswith(REMOTE)
