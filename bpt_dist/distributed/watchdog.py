"""End a process in time: stop requests, a launcher that died, a step that hangs, a rank that is lost.

A Python signal handler does not run while the main thread waits in a collective, so everything here is
decided by a thread: signals reach it through the wake-up descriptor, which the C handler writes to at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bpt_dist.distributed.failure_detection import Diagnosis, FailureDetector

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED, EXIT_PEER_LOST = 75, 69
# Ctrl-C reaches a rank twice, from the terminal and from the launcher: only a later one means "now".
SAME_REQUEST_SECONDS = 1.0
# The collective of a rank that waits in vain fails first; the rank then has this time to find the missing one before it is ended.
NAMING_SECONDS = 8.0
# Likewise: a rank that hears who is missing usually finds out by itself, and then leaves with its own words.
HEARD_SECONDS = 5.0
CHECKPOINT_SECONDS = 20.0  # what a stop request waits for beside the step
CLOCK_MONOTONIC, SIGEV_THREAD = 1, 2


class Watchdog:
    """Watches one process; the training loop polls `stop_requested` and calls `heartbeat`.

    `startup_timeout` and `step_timeout` are seconds without a `heartbeat` before and after
    `start_step_timeout()`. A stop request must be *agreed* by all ranks at a step boundary; after `grace` seconds the process
    exits anyway (75), by default once a step must have ended. The same signal again makes it exit at once (75). After a hang it
    exits with 69 and writes the stacks of all threads to `<folder>/rank-<r>.stuck`. Where `detector` knows a missing rank and the
    main thread goes on for `HEARD_SECONDS`, it exits with 69 as well. `on_leave(state, reason)` runs just before a forced exit
    (rank 0 writes its status there).
    """

    def __init__(
        self,
        folder: Path | None,
        rank: int = 0,
        *,
        startup_timeout: float = 600.0,
        step_timeout: float = 120.0,
        storage_timeout: float = 1800.0,
        grace: float | None = None,
        orphan_grace: float = 5.0,
        naming: float = NAMING_SECONDS,
        poll: float = 0.5,
        watch_launcher: bool | None = None,
        on_leave: Callable[[str, str], object] | None = None,
        detector: FailureDetector | None = None,
    ) -> None:
        self.folder, self.rank, self.on_leave = folder, rank, on_leave
        self.step_timeout, self.storage_timeout = step_timeout, storage_timeout
        self.naming, self.orphan_grace, self.poll = naming, orphan_grace, poll
        self.grace = step_timeout + CHECKPOINT_SECONDS if grace is None else grace
        self.detector = detector
        self._patient, self._was_silent = False, False
        self.reason: str | None = None
        self._timeout = startup_timeout
        self._last_beat, self._place = time.monotonic(), "start"
        self._requests: dict[int, float] = {}
        self._deadline = float("inf")
        # Without a launcher the parent is a shell, and closing that must not end the run.
        watch = "LOCAL_RANK" in os.environ if watch_launcher is None else watch_launcher
        self._ancestors = _ancestors() if watch else ()
        self._closed = threading.Event()
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._reader, self._writer = socket.socketpair()
        self._stuck_file: IO[bytes] | None = None
        self._exit_timer: ExitTimer | None = None

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop; ranks must agree on it before one of them leaves a loop."""
        return self.reason is not None

    def start(self) -> Self:
        """Install the signal handlers (main thread only) and start the thread."""
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._old_handlers = {number: signal.signal(number, _remember_only) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def set_directory(self, folder: Path, on_leave: Callable[[str, str], object]) -> None:
        """From now on write stacks below `folder` and call `on_leave`: the run directory is open."""
        self.folder, self.on_leave = folder, on_leave

    def heartbeat(self, place: str) -> None:
        """Record that the main thread is alive at `place` (the name of a step or of the next collective)."""
        self._last_beat, self._place = time.monotonic(), place

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """Allow `storage_timeout` without a heartbeat inside: rank 0 writes, and its peers wait."""
        usual = self._timeout
        self._timeout, self._patient = max(usual, self.storage_timeout + self.naming), True
        self._wake()
        try:
            yield
        finally:
            self.heartbeat(self._place)
            self._timeout, self._patient = usual, False
            self._wake()

    def ignore_peers(self) -> None:
        """From now on end nothing for a missing rank: the main thread leaves by itself, and ranks need not leave together."""
        self.detector = None

    def start_step_timeout(self) -> None:
        """Change from the start-up timeout to the step timeout, once; call it after a step."""
        self.heartbeat(self._place)
        if self._timeout != self.step_timeout + self.naming:
            self._timeout = self.step_timeout + self.naming
            self._wake()

    def request_stop(self, reason: str, *, grace: float | None = None) -> None:
        """Ask this rank to stop, as a signal would."""
        self.reason = self.reason or reason
        self._deadline = min(self._deadline, time.monotonic() + (self.grace if grace is None else grace))

    def close(self) -> None:
        """Restore the signal handlers and end the thread."""
        self._closed.set()
        self._wake()
        if self._old_handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
        self._thread.join(timeout=5)
        self._disarm()
        self._reader.close()
        self._writer.close()
        if self._exit_timer is not None:
            self._exit_timer.close()
        if self._stuck_file is not None:
            is_empty = self._stuck_file.tell() == 0
            self._stuck_file.close()
            if is_empty:
                self._stuck_path().unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._closed.is_set():
            select.select([self._reader], [], [], self.poll)
            self._read_signals()
            now = time.monotonic()
            if self._ancestors and _ancestors() != self._ancestors and not self.stop_requested:
                self.request_stop("the launcher is gone", grace=self.orphan_grace)
            if now > self._deadline:
                self._exit(
                    "stopped",
                    f"{self.reason}; still at '{self._place}' after the grace period",
                    EXIT_STOPPED,
                )
            if now - self._last_beat > self._timeout:
                self._exit("failed", f"no progress for {self._timeout:g} s at '{self._place}'", EXIT_PEER_LOST)
            self._leave_without_peer()
            self._arm_exit()

    def _leave_without_peer(self) -> None:
        """Exit where a rank is missing and the main thread does not notice: it waits for a kernel of a GPU, or computes."""
        detector = self.detector
        if detector is None:
            return
        diagnosis = detector.heard(HEARD_SECONDS)
        # Twice in a row: a call that held the interpreter lock stopped the detector's thread as well.
        is_silent = detector.silence() > (self.step_timeout if self._patient else self._timeout)
        if diagnosis is None and is_silent and self._was_silent:
            diagnosis = detector.diagnose()
        self._was_silent = is_silent
        if diagnosis is not None and self.detector is not None:
            self._exit("failed", words_of(diagnosis), EXIT_PEER_LOST, to_user=detector.reports(diagnosis.reporting_rank))

    def _read_signals(self) -> None:
        try:
            received = self._reader.recv(64)
        except BlockingIOError:
            return
        now = time.monotonic()
        for number in received:
            if number not in STOP_SIGNALS:
                continue
            name = signal.Signals(number).name
            if now - self._requests.setdefault(number, now) > SAME_REQUEST_SECONDS:
                self._exit("stopped", f"{name} again", EXIT_STOPPED, with_stacks=False)
            self.request_stop(name)

    def _exit(self, state: str, reason: str, code: int, *, with_stacks: bool = True, to_user: bool = False) -> None:
        # In another thread: a full disk or a lost mount must not keep this process alive.
        words = threading.Thread(target=self._report, args=(state, reason, with_stacks, to_user), daemon=True)
        try:
            self._disarm()
            words.start()
            words.join(timeout=2)
        finally:
            os._exit(code)

    def _report(self, state: str, reason: str, with_stacks: bool, to_user: bool) -> None:
        if to_user:
            sys.stderr.write(f"{reason}\n")
            sys.stderr.flush()
        if with_stacks:
            self._write_stacks(reason)
        if self.on_leave is not None:
            self.on_leave(state, reason)

    def _write_stacks(self, reason: str) -> None:
        header = f"rank {self.rank}, pid {os.getpid()}: {reason}\n"
        with self._open_stuck() as file:
            file.write(header.encode())
            faulthandler.dump_traceback(file, all_threads=True)

    def _arm_exit(self) -> None:
        """Re-arm what works while a call holds the interpreter lock: a dump of the stacks, and a second later the end (69)."""
        if self.folder is None:
            return
        if self._stuck_file is None:
            self._stuck_file = self._open_stuck()
            with contextlib.suppress(OSError):
                self._exit_timer = ExitTimer(EXIT_PEER_LOST)
        seconds = self._timeout + 2 * self.poll + 1
        # Where there is no such timer the dump itself ends the process, with code 1.
        faulthandler.dump_traceback_later(seconds, file=self._stuck_file, exit=self._exit_timer is None)
        if self._exit_timer is not None:
            self._exit_timer.end_after(seconds + 1)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._exit_timer is not None:
            self._exit_timer.end_after(0)

    def _wake(self) -> None:
        """Let the thread look at once, not at its next turn."""
        self._writer.send(b"\0")

    def _open_stuck(self) -> IO[bytes]:
        if self.folder is None:
            return os.fdopen(os.dup(sys.stderr.fileno()), "wb", buffering=0)
        return self._stuck_path().open("ab", buffering=0)

    def _stuck_path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"rank-{self.rank}.stuck"


def words_of(diagnosis: Diagnosis) -> str:
    """Return what a user reads of a missing rank."""
    return f"{diagnosis.text}; rerun the same command to resume from the newest checkpoint"


def _remember_only(number: int, frame: object) -> None:
    """Do nothing here: the wake-up descriptor has already told the thread."""


def _ancestors() -> tuple[int, ...]:
    """Return the parent, and the grandparent if that is the `deepspeed` command, which ends without a signal to its children."""
    parent = os.getppid()
    try:
        grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        is_deepspeed = b"deepspeed" in Path(f"/proc/{grandparent}/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return (parent,)
    return (parent, grandparent) if is_deepspeed else (parent,)


class _Event(ctypes.Structure):
    """`struct sigevent` of the C library for SIGEV_THREAD: call `function(value)` in a thread of its own."""

    _fields_ = (
        ("value", ctypes.c_long),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: interval, then time to the first expiry, each in seconds and nanoseconds."""

    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class ExitTimer:
    """A POSIX timer that calls `_exit(code)`; raises OSError where the C library has none."""

    def __init__(self, code: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        try:
            end = ctypes.cast(self._libc._exit, ctypes.c_void_p).value
            event = _Event(value=code, notify=SIGEV_THREAD, function=end)
            failed = self._libc.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))
        except AttributeError as error:
            raise OSError("this C library has no timers") from error
        if failed:
            raise OSError(ctypes.get_errno(), "timer_create")

    def end_after(self, seconds: float) -> None:
        """Exit after `seconds` unless called again before; 0 cancels."""
        whole = int(seconds)
        times = _Times(value=(whole, int((seconds - whole) * 1e9)))
        self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def close(self) -> None:
        """Delete the timer."""
        self._libc.timer_delete(self._timer)
