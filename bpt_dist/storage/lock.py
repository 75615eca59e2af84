"""One live process per run directory: `run.lock`, created by a hard link, kept alive by its time stamp.

A dead holder is succeeded, never deleted: the successor of the lock with id X is the file `run.lock.after-X`,
which only one process can create; it is then renamed over `run.lock`. Ids are never used again, so a process
that acts on an old observation fails one of the two comparisons and starts over. Works over any hosts that
share a file system with hard links (NFS included).
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage import layout
from bpt_dist.storage.files import decode_json, encode_json

NAME = layout.LOCK
# Seconds. A lock this old is then watched for 15 more: a holder elsewhere has then been silent for a minute.
STALE = 45.0
ATTEMPTS = 50


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; `machine` is the boot and the pid namespace in which `pid` and `born` are meant."""

    id: str
    host: str
    machine: str
    pid: int
    born: str
    since: float

    def is_dead_here(self) -> bool | None:
        """Whether the process is gone; None if only its own machine can tell."""
        return _born(self.pid) != self.born if self.machine and self.machine == _machine() else None

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"host {self.host}, pid {self.pid}, since {since}"


class RunLock:
    """Hold `folder/run.lock` from `acquire` to `release`; a thread touches it every `heartbeat` seconds.

    A holder on this machine is judged by its process alone. One on another machine is dead if its lock is
    older than `stale` seconds *and* is not touched while we watch for `1.5 * heartbeat`: clocks of two hosts
    may differ. `taken_from` is the dead holder, if there was one; `lost` is set if somebody took the lock
    from us.
    """

    def __init__(self, folder: Path, *, heartbeat: float = 10.0, stale: float = STALE) -> None:
        self.path, self.heartbeat, self.stale = folder / NAME, heartbeat, stale
        pid = os.getpid()
        self.me = Holder(uuid.uuid4().hex, platform.node(), _machine(), pid, _born(pid), time.time())
        self.taken_from: Holder | None = None
        self.lost = False
        self._released = threading.Event()
        self._draft = folder / f"{NAME}.draft-{self.me.id}"

    def acquire(self) -> None:
        """Take the lock. Raises ConfigError naming the live holder's host and pid."""
        self._draft.write_bytes(encode_json(asdict(self.me)))
        self._descriptor = os.open(self._draft, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for _ in range(ATTEMPTS):
                if self._try(self.path, []):
                    break
            else:
                raise StorageError(f"{self.path}: still contended after {ATTEMPTS} attempts; rerun the same command")
        except BaseException:
            os.close(self._descriptor)
            raise
        finally:
            self._draft.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back (only if it is still ours)."""
        self._released.set()
        self._thread.join(timeout=5)
        if self._is_ours():
            self.path.unlink()
        os.close(self._descriptor)

    def check(self) -> None:
        """Raise StorageError if another process took the lock, as it may while this one is suspended."""
        if self.lost or not self._is_ours():
            self.lost = True
            taker = _read(self.path)
            raise StorageError(
                f"{self.path}: taken by {taker or 'nobody known'} while this process did not run; "
                "this process stops so that two do not write one run directory"
            )

    def _try(self, path: Path, chain: list[Holder]) -> bool:
        """Try once for `path`, the place of the successor of `chain[-1]`; false means: start over."""
        if self._create(path):
            if chain and not self._still(chain):
                path.unlink()
                return False
            return self._move_to_front(path, chain)
        holder = _read(path)
        if holder is None:  # released or moved this moment
            return False
        if not self._is_dead(path, holder):
            raise ConfigError(f"{self.path.parent}: a run is alive here ({holder}); wait for it, stop it, or choose another name=")
        return self._try(self.path.with_name(f"{NAME}.after-{holder.id}"), [*chain, holder])

    def _create(self, path: Path) -> bool:
        try:
            os.link(self._draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            remedy = "a run directory needs a file system with hard links, choose another output="
            raise StorageError(f"{path}: {error.strerror}; {remedy}") from error
        return True

    def _still(self, chain: list[Holder]) -> bool:
        return all(_read(place) == holder for place, holder in zip(self._places(chain), chain, strict=True))

    def _places(self, chain: list[Holder]) -> list[Path]:
        return [self.path] + [self.path.with_name(f"{NAME}.after-{holder.id}") for holder in chain[:-1]]

    def _move_to_front(self, path: Path, chain: list[Holder]) -> bool:
        if chain:
            os.rename(path, self.path)
            self.taken_from = chain[0]
            for place in self._places(chain)[1:]:
                place.unlink(missing_ok=True)
        return True

    def _is_dead(self, path: Path, holder: Holder) -> bool:
        dead = holder.is_dead_here()
        if dead is not None:
            return dead
        try:
            last_beat = path.stat().st_mtime_ns
            if abs(time.time() - last_beat / 1e9) <= self.stale:
                return False
            time.sleep(1.5 * self.heartbeat)
            return path.stat().st_mtime_ns == last_beat and _read(path) == holder
        except FileNotFoundError:
            return True  # released meanwhile: the chain is broken, and the caller looks again

    def _beat(self) -> None:
        while not self._released.wait(self.heartbeat):
            # Through the descriptor: it touches our file, never one that has replaced it.
            with contextlib.suppress(OSError):  # a network file system that stumbles: the next beat may reach it
                os.utime(self._descriptor)
                self.lost = self.lost or not self._is_ours()

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False


def holder_of(folder: Path, *, stale: float = STALE) -> Holder | None:
    """Return who is alive in this run directory, as far as can be told without waiting."""
    path = folder / NAME
    holder = _read(path)
    if holder is None:
        return None
    dead = holder.is_dead_here()
    if dead is None:
        try:
            dead = abs(time.time() - path.stat().st_mtime) > stale
        except FileNotFoundError:  # released this moment
            return None
    return None if dead else holder


def _read(path: Path) -> Holder | None:
    try:
        fields: Any = decode_json(path.read_bytes())
        return Holder(**fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        remedy = "remove it if no run is alive here"
        raise StorageError(f"{path}: not a lock of this program ({error}); {remedy}") from error


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no /proc: only the heartbeat tells
        return ""


def _born(pid: int) -> str:
    """The kernel's start time of a process ("" if it is gone or a zombie): process ids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
