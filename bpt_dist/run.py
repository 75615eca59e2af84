"""The run directory: whose it is, what it was started with, and how it ended (`status.json` is the truth).

    config.yaml  run.json  status.json  run.lock  metrics.jsonl  logs/rank-0.log ...

Rank 0 opens it first and alone writes shared files; the other ranks open it after rank 0 succeeded and write
only their log.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from bpt_dist.errors import INTERNAL_ERROR, ConfigError, Stopped, StorageError, UserError
from bpt_dist.faults import fault_point
from bpt_dist.files import read_bytes, read_json, write_atomic, write_json_atomic
from bpt_dist.lock import STALE, RunLock, holder_of

State = Literal["created", "running", "stopped", "failed", "finished"]
Changed = Callable[[str], Sequence[str]]
FORMAT = 1
SHORTEST_SECRET = 6  # replacing a value such as "1" would make logs unreadable
PACKAGES = ("bpt_dist", "torch", "transformers", "deepspeed", "datasets", "mlflow", "safetensors", "numpy")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a run may have left behind when it ended before its run.json was written.
_PREAMBLE = re.compile(r"run\.lock(\..*)?|run\.json\.tmp-[0-9a-f]{8}|logs")
_SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)")
log = logging.getLogger(__name__)


class Run:
    """An open run directory; as a context manager it turns an exception into `stopped` or `failed`."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.id, self.resumed = "", False
        self.previous: dict[str, Any] = {}
        self._lock: RunLock | None = None
        self._status: dict[str, Any] = {}
        self._saying = threading.Lock()
        self._log_file: logging.Handler | None = None

    @classmethod
    def open(
        cls,
        config_yaml: str,
        fingerprint: str,
        changed: Changed,
        run_dir: Path,
        *,
        fresh: bool = False,
        rank: int = 0,
        world_size: int = 1,
        extra: Mapping[str, Any] | None = None,
        heartbeat: float = 10.0,
        stale: float = STALE,
    ) -> Self:
        """Create or reopen `run_dir`; `changed(old_yaml)` lists `key: old -> new` if the fingerprint differs.

        Not collective, but rank 0 first: the others need its success. Raises ConfigError (2) if the directory
        is in use, holds another configuration or something that is no run; such a directory is not touched.
        """
        run = cls(_checked_folder(run_dir), rank, world_size)
        if rank == 0:
            run._claim(fresh, heartbeat, stale)
            try:
                run._describe(config_yaml, fingerprint, changed, dict(extra or {}))
            except BaseException:
                run.close()
                raise
        run._open_log()
        if rank == 0:
            run._announce()
            fault_point("run.opened")
        return run

    @property
    def finished(self) -> bool:
        """Whether an earlier process finished this run (rank 0 knows; tell the others)."""
        return self.previous.get("state") == "finished"

    def path(self, *parts: str) -> Path:
        """Return a place below the run directory, refusing names that could lead out of it.

        Each part is one or more names `[a-z0-9][a-z0-9._-]*` joined by `/`; links on the way are refused.
        """
        place = self.folder
        for name in "/".join(parts).split("/"):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r}: no name for a file of a run; use a-z, 0-9, '.', '_', '-' (at most 64)")
            place = place / name
            if place.is_symlink():
                raise StorageError(f"{place}: is a link, and a run holds its own files; put the folder itself there")
        return place

    def status(self, state: State, reason: str | None = None, *, step: int | None = None, stage: str | None = None) -> None:
        """Write `status.json` (rank 0; other ranks only log)."""
        log.info("%s%s%s", state, f" {stage}" if stage else "", f": {reason}" if reason else "")
        if self.rank != 0:
            return
        with self._saying:  # the guard's thread may have the last word
            self._write_status(state, reason, step, stage)

    def _write_status(self, state: State, reason: str | None, step: int | None, stage: str | None) -> None:
        fault_point("status.before_write", state=state)
        fields: dict[str, Any] = {"state": state, "reason": redacted(reason) if reason else None, "updated": _now()}
        fields |= {key: value for key, value in (("step", step), ("stage", stage)) if value is not None}
        self._status |= fields | {"next": self._command if state in ("stopped", "failed") else None}
        write_json_atomic(self.folder / "status.json", self._status)

    def check_lock(self) -> None:
        """Raise StorageError if another process took this directory (rank 0; call it before a checkpoint)."""
        if self._lock is not None:
            self._lock.check()

    def close(self) -> None:
        """Give the lock back and close the log."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._log_file is not None:
            logging.getLogger().removeHandler(self._log_file)
            self._log_file.close()
            self._log_file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            if exit_code(error) == INTERNAL_ERROR and not isinstance(error, UserError):
                log.error("internal error", exc_info=error)
            # A full disk may be what ended the run: then the exception, not the status, has to say so.
            with contextlib.suppress(OSError, StorageError):
                stopped = exit_code(error) == Stopped.exit_code
                self.status("stopped" if stopped else "failed", reason_of(error))
        self.close()

    def _claim(self, fresh: bool, heartbeat: float, stale: float) -> None:
        folder = self.folder
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        if "run.json" not in names and (foreign := sorted(n for n in names if not _PREAMBLE.fullmatch(n))):
            raise ConfigError(f"{folder}: is not a run but holds {foreign[0]!r}; choose another name= or output=")
        if fresh and "run.json" in names:
            remedy = "move it away or choose another name="
            raise ConfigError(f"{folder}: holds a run, and --fresh needs an empty directory; {remedy}")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = RunLock(folder, heartbeat=heartbeat, stale=stale)
            lock.acquire()
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise StorageError(f"{folder}: {reason}; choose another output=") from error
        self._lock = lock

    def _describe(self, config_yaml: str, fingerprint: str, changed: Changed, extra: dict[str, Any]) -> None:
        argv = [part for part in map(redacted, sys.argv) if not part.startswith("--local_rank")]
        self._command = extra.get("command") or shlex.join(["python", *argv])
        opening = {
            "time": _now(),
            "argv": argv,
            "command": self._command,
            "world_size": self.world_size,
            "host": platform.node(),
            "python": platform.python_version(),
            "packages": versions(),
            "git": git_state(),
            **extra,
        }
        if self._lock is not None and self._lock.taken_from is not None:
            opening["taken_from"] = str(self._lock.taken_from)
        if (self.folder / "run.json").exists():
            record = self._reopen(fingerprint, changed)
        else:
            record = {"format": FORMAT, "id": uuid.uuid4().hex, "fingerprint": fingerprint, "openings": []}
        self.id = record["id"]
        if self.finished:
            return
        self._openings = [*record["openings"], opening]
        write_json_atomic(self.folder / "run.json", record | {"openings": self._openings})
        write_atomic(self.folder / "config.yaml", config_yaml.encode())
        if not self.resumed:
            self.status("created")

    def _reopen(self, fingerprint: str, changed: Changed) -> dict[str, Any]:
        record = read_json(self.folder / "run.json")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ConfigError(f"{self.folder}/run.json: no record this version can read; choose another name=")
        if self._failed_before_training():
            # A mistyped path or a bad row: the mended command is the same run, and nothing is lost.
            for name in ("backbone.json", "data.json"):
                (self.folder / name).unlink(missing_ok=True)
            if record["fingerprint"] != fingerprint:
                return {**record, "fingerprint": fingerprint}
        if record["fingerprint"] != fingerprint:
            old = read_bytes(self.folder / "config.yaml").decode()
            lines = "".join(f"\n  {line}" for line in changed(old))
            raise ConfigError(
                f"{self.folder}: holds a run with another configuration:{lines}\n"
                "restore these values to resume, or choose another name= (--fresh needs an empty directory)"
            )
        self.resumed = True
        status = self.folder / "status.json"
        self.previous = self._status = read_json(status) if status.exists() else {}
        return record

    def _failed_before_training(self) -> bool:
        """Whether an earlier start failed and left nothing that was trained."""
        status, metrics = self.folder / "status.json", self.folder / "metrics.jsonl"
        if any((self.folder / stage).exists() for stage in ("source", "target")) or not status.exists():
            return False
        recorded = metrics.stat().st_size if metrics.exists() else 0
        return recorded == 0 and read_json(status)["state"] == "failed"

    def _open_log(self) -> None:
        try:
            folder = self.path("logs")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._log_file = logging.FileHandler(folder / f"rank-{self.rank}.log", encoding="utf-8")
        except OSError as error:
            self.close()
            raise StorageError(f"{self.folder}/logs: cannot be written ({error.strerror})") from error
        self._log_file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._log_file)
        logging.getLogger("bpt_dist").setLevel(logging.INFO)

    def _announce(self) -> None:
        if self._lock is not None and self._lock.taken_from is not None:
            log.warning("%s: taken over from a process that is gone (%s)", self.folder, self._lock.taken_from)
        if self.finished or not self.resumed:
            return
        before, now = self._openings[-2:]
        for key in ("python", "packages", "git"):
            if before.get(key) != now.get(key):
                log.warning("resuming with another %s: %s -> %s", key, before.get(key), now.get(key))


class SafeFormatter(logging.Formatter):
    """Log lines without secrets and without terminal control characters (texts of data end up in logs)."""

    def format(self, record: logging.LogRecord) -> str:
        """Format, then redact and escape; tracebacks keep their line breaks."""
        text = redacted(super().format(record))
        return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def redacted(text: str) -> str:
    """Replace credentials in URIs and the values of password, token and secret variables by `***`."""
    text = _SECRET.sub("***", text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and re.search("PASSWORD|TOKEN|SECRET", name):
            text = text.replace(value, "***")
    return text


def read_status(folder: Path) -> dict[str, Any]:
    """Return `status.json` as it is true now: "running" while nobody is alive there means failed."""
    status = read_json(folder / "status.json")
    if status["state"] in ("created", "running") and holder_of(folder) is None:
        status |= {"state": "failed", "reason": f"the process ended without a word while {status['state']}"}
        status["next"] = read_json(folder / "run.json")["openings"][-1].get("command")
    return status


def exit_code(error: BaseException | None) -> int:
    """Return the code a process ends with after `error`: 0, 2, 65, 69, 70 (internal), 74, 75 or 77."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 2 if error.code else 0
    if isinstance(error, KeyboardInterrupt):
        return Stopped.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return StorageError.exit_code
    return INTERNAL_ERROR


def reason_of(error: BaseException) -> str:
    """Return the sentence of a user error, or kind and text of an internal one."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a result."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Return commit and whether the tree differs from it, or None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def _checked_folder(run_dir: Path) -> Path:
    text = os.fspath(run_dir)
    if not text.isprintable() or not _FOLDER.fullmatch(run_dir.name):
        raise ConfigError(f"{text!r}: no run directory; its last name has letters, digits, '.', '_', '-' (at most 64)")
    if run_dir.is_symlink() or (run_dir.exists() and not run_dir.is_dir()):
        raise ConfigError(f"{text}: is a link or a file instead of a directory; choose another name= or output=")
    return run_dir.resolve()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
