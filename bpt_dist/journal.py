"""`metrics.jsonl`: one strict JSON object a line, each step once and in order: what tracking mirrors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bpt_dist.errors import StorageError
from bpt_dist.faults import fault_point
from bpt_dist.files import decode_json, encode_json, write_or_explain


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
        line = encode_json(_finite(timed))
        write_or_explain(self.path, len(line), lambda: self._write(line))

    def flush(self) -> None:
        """Make everything appended so far survive a power loss; call it before a checkpoint is written."""
        os.fsync(self._descriptor)

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
            os.fsync(self._descriptor)
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


def read_records(path: Path, start: int = 0, limit: int = 1 << 22) -> tuple[list[dict[str, Any]], int]:
    """Return the complete records from byte `start` on (about `limit` bytes) and where the next begins."""
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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
