"""Files that are never half there: strict JSON, one rename per file, six calls that a test can crash."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bpt_dist.errors import StorageError
from bpt_dist.storage.file_system import sync_path

PIECE = 1 << 26  # bytes of one call: a full disk or a signal is noticed before gigabytes are written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")
Content = bytes | Sequence[bytes | memoryview]
"""What a file holds: its bytes, or pieces in order, so that what is large need not be copied into one."""


class Files(Protocol):
    """The six calls that change a disk; `tests/faults/crashing_fs.py` crashes around each of them."""

    def mkdir(self, path: Path) -> None: ...  # noqa: D102
    def write(self, path: Path, data: Content) -> None: ...  # noqa: D102
    def fsync(self, path: Path) -> None: ...  # noqa: D102
    def rename(self, source: Path, target: Path) -> None: ...  # noqa: D102
    def unlink(self, path: Path) -> None: ...  # noqa: D102
    def rmdir(self, path: Path) -> None: ...  # noqa: D102


class OsFiles:
    """The real file system; `write` creates a new file (an existing one or a link is refused), unsynced."""

    def mkdir(self, path: Path) -> None:
        """Create one directory, readable by its owner only."""
        os.mkdir(path, 0o700)

    def write(self, path: Path, data: Content) -> None:
        """Create `path` with `data`."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for piece in pieces_of(data):
                view = memoryview(piece)
                while view:
                    view = view[file.write(view[:PIECE]) :]

    def fsync(self, path: Path) -> None:
        """Make a file's bytes, or a directory's entries, survive a power loss."""
        sync_path(path)

    def rename(self, source: Path, target: Path) -> None:
        """Move `source` to `target` in one step."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)


OS_FILES = OsFiles()


def pieces_of(data: Content) -> Sequence[bytes | memoryview]:
    """Return the pieces of what a file holds."""
    return [data] if isinstance(data, bytes) else data


def num_bytes_of(data: Content) -> int:
    """Return the length of what a file holds, in bytes."""
    return sum(memoryview(piece).nbytes for piece in pieces_of(data))


def temporary_name(path: Path) -> Path:
    """Return a fresh name beside `path`; leftovers match `<name>.tmp-*`."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def remove_tree(path: Path, fs: Files) -> None:
    """Remove a file, a link, or a directory with everything below it."""
    if path.is_symlink() or not path.is_dir():
        fs.unlink(path)
        return
    for child in sorted(path.iterdir()):
        remove_tree(child, fs)
    fs.rmdir(path)


def leftovers_of(path: Path) -> str:
    """Return the pattern of the temporary names of `path`, whatever characters its name has."""
    return f"{glob.escape(path.name)}.tmp-*"


def remove_leftovers(folder: Path, pattern: str, fs: Files) -> None:
    """Remove what an interrupted write left behind."""
    for leftover in sorted(folder.glob(pattern)):
        remove_tree(leftover, fs)


def write_or_explain(path: Path, num_bytes: int, write: Callable[[], T]) -> T:
    """Call `write`, once more if the disk is full; then raise a StorageError that says what to do."""
    try:
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL:
                raise
            return write()
    except OSError as error:
        raise StorageError(_explanation(path, num_bytes, error)) from error


def _explanation(path: Path, num_bytes: int, error: OSError) -> str:
    cause = f"{path}: cannot be written ({os.strerror(error.errno or errno.EIO)})"
    remedy = "fix that and rerun the same command to resume"
    if error.errno in FULL:
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        cause += f"; it needs {num_bytes} bytes, {free} are free"
        remedy = "free some space (or move the run to another disk) and rerun the same command to resume"
    return f"{cause}; {remedy}"


def write_atomic(path: Path, data: Content, *, fs: Files = OS_FILES) -> Path:
    """Replace `path` by `data` so that a reader, or a crash, sees the old file or the new one.

    One writer per path is assumed. Raises StorageError.
    """

    def publish() -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, leftovers_of(path), fs)
        temporary = temporary_name(path)
        try:
            fs.write(temporary, data)
            fs.fsync(temporary)
            fs.rename(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fs.fsync(path.parent)
        return path

    return write_or_explain(path, num_bytes_of(data), publish)


def encode_json(value: object, *, indent: int | None = None) -> bytes:
    """Encode strict JSON: sorted keys, UTF-8, and a ValueError for NaN or infinity (they are not JSON)."""
    text = json.dumps(value, allow_nan=False, sort_keys=True, ensure_ascii=False, indent=indent, default=_plain)
    return (text + "\n").encode()


def decode_json(data: bytes) -> Any:
    """Decode strict JSON: a NaN literal, a key given twice or bytes that are not UTF-8 raise ValueError."""
    return json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)


def write_json_atomic(path: Path, value: object, *, fs: Files = OS_FILES) -> Path:
    """Write `value` as strict, indented JSON; a reader sees the old file or the new one."""
    return write_atomic(path, encode_json(value, indent=1), fs=fs)


def read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    """Read a regular file without following a link at its end; more than `limit` bytes raise StorageError."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({os.strerror(error.errno or errno.EIO)})") from error
    if limit is not None and len(data) > limit:
        raise StorageError(f"{path}: longer than {limit} bytes; this is not the file that was written")
    return data


def read_json(path: Path) -> Any:
    """Read strict JSON. Raises StorageError naming the file."""
    try:
        return decode_json(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error}); restore it from a backup or remove it") from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "item"):  # a number of NumPy or torch
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result
