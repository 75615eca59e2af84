"""The run directory: which process owns it, what it was started with, and how it ended (`status.json`).

    config.yaml  run.json  status.json  run.lock  metrics.jsonl  logs/rank-0.log ...

Rank 0 opens it first and alone writes shared files; the other ranks open it after rank 0 succeeded and write
only their log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from bpt_dist.errors import INTERNAL_ERROR, ConfigError, Stopped, StorageError, UserError, exit_code, reason_of
from bpt_dist.storage import layout
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.files import read_bytes, read_json, write_atomic, write_json_atomic
from bpt_dist.storage.lock import STALE, RunLock, holder_of
from bpt_dist.storage.log_lines import ELSEWHERE, add_place, enter_stage
from bpt_dist.storage.provenance import git_state, versions

State = Literal["created", "running", "stopped", "failed", "finished"]
STATES = get_args(State)
Changed = Callable[[str], Sequence[str]]
IsSame = Callable[[Mapping[str, Any]], bool]
FORMAT = 1
SHORTEST_SECRET = 6  # replacing a value such as "1" would make logs unreadable
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a run may have left behind when it ended before its run.json was written.
_PREAMBLE = re.compile(r"run\.lock(\..*)?|run\.json\.tmp-[0-9a-f]{8}|logs")
_SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)")
log = logging.getLogger(__name__)


class RunDirectory:
    """An open run directory; as a context manager it turns an exception into `stopped` or `failed`."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.id, self.resumed = "", False
        self.fingerprint = ""  # of the configuration the run was started with: its checkpoints carry it (rank 0 knows)
        self._record: dict[str, Any] = {}
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
        is_same: IsSame = lambda record: False,
    ) -> Self:
        """Create or reopen `run_dir`; `changed(old_yaml)` lists `key: old -> new` if the fingerprint differs.

        `is_same(record)` tells whether a `run.json` with another fingerprint is of this configuration all the same.

        Not collective, but rank 0 first: the others need its success. Raises ConfigError (2) if the directory
        is in use, holds another configuration or something that is no run; such a directory is not touched.
        """
        run = cls(_checked_folder(run_dir), rank, world_size)
        if rank == 0:
            run._claim(fresh, heartbeat, stale)
            try:
                run._describe(config_yaml, fingerprint, changed, is_same, dict(extra or {}))
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

    def status(
        self, state: State, reason: str | None = None, *, step: int | None = None, stage: str | None = None, reported: bool = False
    ) -> None:
        """Write `status.json` (rank 0; other ranks only log). `reported`: the end of the job prints the reason on the screen."""
        if stage is not None or state == "finished":
            enter_stage(stage or "")
        what = f": results in {self.folder / layout.RESULTS}" if state == "finished" else f": {reason}" if reason else ""
        if state != "created":  # its line comes when there is a file for it
            log.info("%s%s", state, what, extra=ELSEWHERE if reported else None)
        if self.rank != 0:
            return
        with self._saying:  # the watchdog's thread may write the last status
            self._write_status(state, reason, step, stage)

    def _write_status(self, state: State, reason: str | None, step: int | None, stage: str | None) -> None:
        fault_point("status.before_write", state=state)
        fields: dict[str, Any] = {"state": state, "reason": redacted(reason) if reason else None, "updated": _now()}
        fields |= {key: value for key, value in (("step", step), ("stage", stage)) if value is not None}
        self._status |= fields | {"next": self._command if state in ("stopped", "failed") else None}
        write_json_atomic(self.folder / layout.STATUS, self._status)

    def check_lock(self) -> None:
        """Raise StorageError if another process took this directory (rank 0; call it before a checkpoint)."""
        if self._lock is not None:
            self._lock.check()

    def choice(self, name: str) -> str | None:
        """Return what an earlier start of this run chose for `name` (rank 0), None where none did."""
        chosen: str | None = self._record.get("choices", {}).get(name)
        return chosen

    def record_choice(self, name: str, value: str) -> None:
        """Write into run.json what was chosen for `name`, so that every resume takes the same (rank 0)."""
        if self.choice(name) != value:
            self._record["choices"] = {**self._record.get("choices", {}), name: value}
            write_json_atomic(self.folder / layout.RUN, self._record)

    def close(self) -> None:
        """Give the lock back and close the log."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._log_file is not None:
            logging.getLogger().removeHandler(self._log_file)
            self._log_file.close()
            self._log_file = None
        enter_stage("")  # lines after it belong to no stage of this run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            if exit_code(error) == INTERNAL_ERROR and not isinstance(error, UserError):
                log.error("internal error", exc_info=error, extra=ELSEWHERE)
            # A full disk may be what ended the run: then the exception reports it, not the status.
            with contextlib.suppress(OSError, StorageError):
                stopped = exit_code(error) == Stopped.exit_code
                self.status("stopped" if stopped else "failed", reason_of(error), reported=True)
        self.close()

    def _claim(self, fresh: bool, heartbeat: float, stale: float) -> None:
        folder = self.folder
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        if layout.RUN not in names and (foreign := sorted(n for n in names if not _PREAMBLE.fullmatch(n))):
            raise ConfigError(f"{folder}: is not a run but holds {foreign[0]!r}; choose another name= or output=")
        if fresh and layout.RUN in names:
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

    def _describe(self, config_yaml: str, fingerprint: str, changed: Changed, is_same: IsSame, extra: dict[str, Any]) -> None:
        argv = [part for part in map(redacted, sys.argv) if not part.startswith("--local_rank")]
        self._command = extra.get("command") or _command_line(argv)
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
        if (self.folder / layout.RUN).exists():
            record = self._reopen(fingerprint, changed, is_same)
        else:
            record = {"format": FORMAT, "id": uuid.uuid4().hex, "fingerprint": fingerprint, "openings": []}
        self.id, self.fingerprint = record["id"], record["fingerprint"]
        if self.finished:
            return
        self._openings = [*record["openings"], opening]
        self._record = record | {"openings": self._openings}
        write_json_atomic(self.folder / layout.RUN, self._record)
        write_atomic(self.folder / layout.CONFIG, config_yaml.encode())
        if not self.resumed:
            self.status("created")

    def _reopen(self, fingerprint: str, changed: Changed, is_same: IsSame) -> dict[str, Any]:
        record = read_json(self.folder / layout.RUN)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ConfigError(f"{self.folder / layout.RUN}: no record this version can read; choose another name=")
        if self._failed_before_training():
            # A mistyped path or a bad row: the corrected command is the same run, and nothing is lost.
            for name in (layout.BACKBONE, layout.DATA, layout.INPUTS):
                (self.folder / name).unlink(missing_ok=True)
            if record["fingerprint"] != fingerprint:
                return {"format": FORMAT, "id": record["id"], "fingerprint": fingerprint, "openings": record["openings"]}
        if fingerprint not in (record["fingerprint"], record.get("resume_fingerprint")) and not is_same(record):
            old = read_bytes(self.folder / layout.CONFIG).decode()
            lines = "".join(f"\n  {line}" for line in changed(old))
            raise ConfigError(
                f"{self.folder}: holds a run with another configuration:{lines}\n"
                "restore these values to resume, or choose another name= (--fresh needs an empty directory)"
            )
        if record["fingerprint"] != fingerprint:
            record["resume_fingerprint"] = fingerprint
        self.resumed = True
        status = self.folder / layout.STATUS
        self.previous = self._status = read_json(status) if status.exists() else {}
        return record

    def _failed_before_training(self) -> bool:
        """Whether an earlier start failed and left nothing that was trained."""
        status, metrics = self.folder / layout.STATUS, self.folder / layout.METRICS
        if any((self.folder / stage).exists() for stage in (layout.SOURCE, layout.TARGET)) or not status.exists():
            return False
        recorded = metrics.stat().st_size if metrics.exists() else 0
        return recorded == 0 and read_json(status)["state"] == "failed"

    def _open_log(self) -> None:
        try:
            folder = self.path(layout.LOGS)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._log_file = logging.FileHandler(folder / f"rank-{self.rank}.log", encoding="utf-8")
        except OSError as error:
            self.close()
            raise StorageError(f"{self.folder / layout.LOGS}: cannot be written ({error.strerror})") from error
        self._log_file.addFilter(add_place)
        self._log_file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(place)s%(message)s"))
        logging.getLogger().addHandler(self._log_file)
        logging.getLogger("bpt_dist").setLevel(logging.INFO)

    def _announce(self) -> None:
        if self._lock is not None and self._lock.taken_from is not None:
            log.warning("%s: taken over from a process that is gone (%s)", self.folder, self._lock.taken_from)
        if self.finished:
            results = self.folder / layout.RESULTS
            log.info("finished by an earlier start: results in %s; choose another name= to train it again", results)
        if self.finished:
            return
        log.info("%s %s", "resuming" if self.resumed else "created", self.folder)
        if not self.resumed:
            return
        last_opening, opening = self._openings[-2:]
        for key in ("python", "packages", "git"):
            if last_opening.get(key) != opening.get(key):
                log.warning("resuming with another %s: %s -> %s", key, last_opening.get(key), opening.get(key))


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


@dataclass(frozen=True)
class RunStatus:
    """The state of a run now. `killed`: its process died and wrote no final status; `next` is the command that resumes it."""

    state: State
    reason: str | None = None
    next: str | None = None
    killed: bool = False


def read_status(folder: Path) -> RunStatus | None:
    """Return how the run in `folder` ended or that it is still running; None where no run has begun.

    This is the one reader of `status.json`. The file of a process that was killed still says "running": where nobody holds the
    lock of the directory, the run has failed.
    """
    if not (folder / layout.STATUS).is_file():
        return None
    status = read_json(folder / layout.STATUS)
    if not isinstance(status, dict) or status.get("state") not in STATES:
        raise StorageError(f"{folder / layout.STATUS}: names no state of a run; restore it from a backup or choose another name=")
    state, reason = status["state"], status.get("reason")
    if state not in ("created", "running") or holder_of(folder) is not None:
        return RunStatus(state, reason, status.get("next"))
    openings = read_json(folder / layout.RUN)["openings"] if (folder / layout.RUN).is_file() else [{}]
    return RunStatus("failed", f"the process died while the run was {state}", openings[-1].get("command"), killed=True)


def _checked_folder(run_dir: Path) -> Path:
    text = os.fspath(run_dir)
    if not text.isprintable() or not _FOLDER.fullmatch(run_dir.name):
        raise ConfigError(f"{text!r}: no run directory; its last name has letters, digits, '.', '_', '-' (at most 64)")
    if run_dir.is_symlink() or (run_dir.exists() and not run_dir.is_dir()):
        raise ConfigError(f"{text}: is a link or a file instead of a directory; choose another name= or output=")
    return run_dir.resolve()


def _command_line(argv: Sequence[str]) -> str:
    """Return the command that started this process, to be given again; `python` stands for whatever interpreter it was."""
    program, *words = argv or ["?"]
    if Path(program).name == "bpt-dist":
        return shlex.join(["bpt-dist", *words])
    if Path(program).is_absolute() and Path(program).parent.name == "commands":  # `-m` and `--module` give the file of the module
        return shlex.join(["python", "-m", f"bpt_dist.commands.{Path(program).stem}", *words])
    return shlex.join(["python", program, *words])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
