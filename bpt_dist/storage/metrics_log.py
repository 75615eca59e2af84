"""`metrics.jsonl`: one strict JSON object a line, each step once and in order; tracking mirrors it.

A record has `time`, `step`, `stage` (`source`, `target/<task>`, `results`, `sweep`) and `metrics`, a mapping of names to numbers.
The names below are shared by those who write records and those who read them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bpt_dist.errors import StorageError
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.file_system import sync
from bpt_dist.storage.files import decode_json, encode_json, write_or_explain

BEST_SCORE = "best/score"  # mean headline metric over the targets on the last reported split; the record of a finished run
SWEEP_SCORE = "sweep/score"  # the score of a trial after each validation
VALIDATION = "validation"  # `<stage>/validation/<metric>`
TARGET_VALIDATION = f"target/{VALIDATION}/"
COST = "cost"  # `<stage>/cost/<what>`: times and memory, the only metrics that differ when a run is repeated
LONGEST_TAIL = 4096  # bytes by which a follower knows that what it has read is still there
LONGEST_NUMBER = 24  # characters of a double, as -1.2345678901234567e-308
LOSS = "loss"  # `<stage>/loss`, and `<stage>/loss/<task>` where a stage has several tasks


class MetricsLog:
    """Append records; one writer (rank 0). A last line that a crash has torn is dropped on opening.

    A checkpoint stores `position()` after `flush()`; a resume calls `cut(position)`, so no step is ever there
    twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot be opened ({error.strerror})") from error
        self._size = os.fstat(self._descriptor).st_size
        self._truncate(self._end_of_last_line())

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record with `step` and `stage`; `time` is added, NaN and infinity become null."""
        fault_point("metrics.before_append", step=record["step"], stage=record["stage"])
        timed = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
        line = _line(_finite(timed))
        write_or_explain(self.path, len(line), lambda: self._write(line))

    def flush(self) -> None:
        """Make everything appended so far survive a power loss; call it before a checkpoint is written."""
        sync(self.path, self._descriptor)

    def position(self) -> int:
        """Return the size in bytes, always at the end of a line."""
        return self._size

    def cut(self, position: int) -> None:
        """Forget what was appended after `position`. Raises StorageError if the file is shorter."""
        if position > self._size or (position and os.pread(self._descriptor, 1, position - 1) != b"\n"):
            raise StorageError(
                f"{self.path}: {self._size} bytes, no line end at {position}, where the checkpoint left it; "
                "restore the file or start again under another name="
            )
        self._truncate(position)

    def close(self) -> None:
        """Sync and close."""
        self.flush()
        os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        # One system call for a line: a process that is killed leaves all of it or, on a full disk, a part we
        # remove.
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            self._truncate(self._size)
            raise
        self._size += len(line)

    def _truncate(self, size: int) -> None:
        if size != os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, size)
            sync(self.path, self._descriptor)
        self._size = size

    def _end_of_last_line(self) -> int:
        end = self._size
        while end:
            start = max(0, end - (1 << 16))
            newline = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every complete record, a part of the file at a time; none if there is no file."""
    start = 0
    while True:
        records, end = read_records(path, start)
        if not records:
            return
        yield from records
        start = end


class RecordFollower:
    """Reads a `metrics.jsonl` that another process writes, each record once.

    A resume cuts off what its checkpoint does not know. It is noticed by the last line read: its time is part of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position, self._last_line, self._seen = 0, b"", (0, 0, 0)

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the records since the last call, and whether they begin again because the file was cut or replaced."""
        seen = facts_of(self.path)
        if seen == self._seen:
            return [], False
        self._seen, was_cut = seen, False
        if self._position and not self._is_where_it_was():
            self._position, self._last_line, was_cut = 0, b"", True
        found: list[dict[str, Any]] = []
        while True:
            records, end = read_records(self.path, self._position)
            if not records:
                return found, was_cut
            found += records
            self._remember(end)

    def _is_where_it_was(self) -> bool:
        return _part(self.path, self._position - len(self._last_line), self._position) == self._last_line

    def _remember(self, end: int) -> None:
        """Remember the line that ends at `end`."""
        start = max(self._position, end - LONGEST_TAIL)
        self._position, self._last_line = end, _part(self.path, start, end)


def facts_of(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to: inode, size, time of change; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _part(path: Path, start: int, end: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    except OSError:
        return b""


def read_records(path: Path, start: int = 0, limit: int = 1 << 22) -> tuple[list[dict[str, Any]], int]:
    """Return the complete records from byte `start` on (about `limit` bytes) and where the next begins.

    `iter_records` reads all of them.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(limit)
        if b"\n" not in data:
            data += file.readline()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [decode_json(line) for line in whole.splitlines()], start + len(whole)
    except ValueError as error:
        raise StorageError(f"{path}: a line after byte {start} is not JSON ({error}); restore the file") from error


def _line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line whose length does not depend on its costs.

    Checkpoints and results hold positions in this file. They have the same bits whenever the same steps are taken.
    """
    costs = [value for name, value in record.get("metrics", {}).items() if f"/{COST}/" in name]
    padding = sum(LONGEST_NUMBER - len(encode_json(value).rstrip()) for value in costs)
    return encode_json(record).rstrip() + b" " * padding + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
