"""Leave in time: stop requests, a launcher that died, a step that hangs.

A Python signal handler does not run while the main thread waits in a collective, so everything here is
decided by a thread: signals reach it through the wake-up descriptor, which the C handler writes to at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bpt_dist.last_resort import LastResort

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED, EXIT_PEER_LOST = 75, 69
# Ctrl-C reaches a rank twice, from the terminal and from the launcher: only a later one means "now".
SAME_REQUEST_SECONDS = 1.0
# A rank that waits for another one in vain is told so by the collective, and finds out which one it is, before this watch ends it.
NAMING_SECONDS = 8.0


class Guard:
    """Watches one process; the training loop polls `stop_requested` and calls `beat`.

    `startup_timeout` and `step_timeout` are seconds without a `beat` before and after `steady()`. A stop
    request must be *agreed* by all ranks at a step boundary; after `grace` seconds the process leaves anyway
    (75). The same signal again leaves at once (75). A hang leaves with 69 and writes the stacks of all
    threads to `<folder>/rank-<r>.stuck`. `on_leave(state, reason)` runs just before a forced exit (rank 0
    writes its status there).
    """

    def __init__(
        self,
        folder: Path | None,
        rank: int = 0,
        *,
        startup_timeout: float = 600.0,
        step_timeout: float = 120.0,
        grace: float = 20.0,
        orphan_grace: float = 5.0,
        naming: float = NAMING_SECONDS,
        poll: float = 0.5,
        watch_launcher: bool | None = None,
        on_leave: Callable[[str, str], object] | None = None,
    ) -> None:
        self.folder, self.rank, self.on_leave = folder, rank, on_leave
        self.step_timeout, self.naming, self.grace, self.orphan_grace, self.poll = step_timeout, naming, grace, orphan_grace, poll
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
        self._last_words: IO[bytes] | None = None
        self._last_resort: LastResort | None = None

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
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()
        return self

    def attend(self, folder: Path, on_leave: Callable[[str, str], object]) -> None:
        """From now on write stacks below `folder` and call `on_leave`: the run directory is open."""
        self.folder, self.on_leave = folder, on_leave

    def beat(self, place: str) -> None:
        """Say that the main thread is alive at `place` (the name of a step or of the next collective)."""
        self._last_beat, self._place = time.monotonic(), place

    def steady(self) -> None:
        """Change from the start-up timeout to the step timeout, once; call it after a step."""
        self.beat(self._place)
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
        if self._last_resort is not None:
            self._last_resort.close()
        if self._last_words is not None:
            is_empty = self._last_words.tell() == 0
            self._last_words.close()
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
                self._leave(
                    "stopped",
                    f"{self.reason}; still at '{self._place}' when the grace was over",
                    EXIT_STOPPED,
                )
            if now - self._last_beat > self._timeout:
                self._leave("failed", f"no progress for {self._timeout:g} s at '{self._place}'", EXIT_PEER_LOST)
            self._arm_last_words()

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
                self._leave("stopped", f"{name} again", EXIT_STOPPED, with_stacks=False)
            self.request_stop(name)

    def _leave(self, state: str, reason: str, code: int, *, with_stacks: bool = True) -> None:
        # In a thread of its own: a full disk or a lost mount must not keep this process here.
        words = threading.Thread(target=self._say_why, args=(state, reason, with_stacks), daemon=True)
        try:
            self._disarm()
            words.start()
            words.join(timeout=2)
        finally:
            os._exit(code)

    def _say_why(self, state: str, reason: str, with_stacks: bool) -> None:
        if with_stacks:
            self._write_stacks(reason)
        if self.on_leave is not None:
            self.on_leave(state, reason)

    def _write_stacks(self, reason: str) -> None:
        header = f"rank {self.rank}, pid {os.getpid()}: {reason}\n"
        with self._open_stuck() as file:
            file.write(header.encode())
            faulthandler.dump_traceback(file, all_threads=True)

    def _arm_last_words(self) -> None:
        """Re-arm what works while a call holds the interpreter lock: a dump of the stacks, and a second later the end (69)."""
        if self.folder is None:
            return
        if self._last_words is None:
            self._last_words = self._open_stuck()
            with contextlib.suppress(OSError):
                self._last_resort = LastResort(EXIT_PEER_LOST)
        seconds = self._timeout + 2 * self.poll + 1
        # Where there is no such timer the dump itself ends the process, with code 1.
        faulthandler.dump_traceback_later(seconds, file=self._last_words, exit=self._last_resort is None)
        if self._last_resort is not None:
            self._last_resort.end_after(seconds + 1)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._last_resort is not None:
            self._last_resort.end_after(0)

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


def _remember_only(number: int, frame: object) -> None:
    """Do nothing here: the wake-up descriptor has already told the thread."""


def _ancestors() -> tuple[int, ...]:
    """The parent, and the grandparent if that is the `deepspeed` command (it dies in silence)."""
    parent = os.getppid()
    try:
        grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        is_deepspeed = b"deepspeed" in Path(f"/proc/{grandparent}/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return (parent,)
    return (parent, grandparent) if is_deepspeed else (parent,)
