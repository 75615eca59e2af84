"""What a trial changes in a rank before it starts: `Start.prepare`; functions of this module, so that a request can name them."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from bpt_dist.distributed import failure_detection
from bpt_dist.storage import fault_injection

RESERVE = 4096


def quick_failure_detection(rank: int) -> None:
    """Let ranks ask each other in a third of a second: a campaign loses hundreds of peers."""
    failure_detection.POLL_SECONDS, failure_detection.ANSWER_SECONDS = 0.05, 0.3


class Filling:
    """Adds the action `fill:BYTES`: the disk of `folder` is full but for so many bytes, until somebody removes the ballast."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rank: int) -> None:
        add_action("fill", lambda amount: fill(self.folder, int(amount or 0)))


def fill(folder: Path, left: int) -> None:
    """Write ballast into `folder` until only `left` bytes fit."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        size = RESERVE * 16
        while size >= RESERVE:
            try:
                file.write(bytes(size))
            except OSError:  # full: smaller pieces may still fit
                size //= 2
        file.truncate(max(0, file.tell() - left))


class FileSizeLimit:
    """No file may grow beyond `num_bytes`: what a quota does to one that has no tmpfs at hand."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def __call__(self, rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.RLIM_INFINITY))


def memory(rank: int) -> None:
    """Add the action `memory:BYTES`: from there on this process gets only so many more bytes."""
    add_action("memory", lambda amount: limit_memory(int(amount)))


def limit_memory(more: int) -> None:
    """Take what the allocator has in pieces that a pass could use, then let `more` bytes be mapped."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    mapped = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped, resource.RLIM_INFINITY))
    for size in (1 << 20, 1 << 18, 1 << 16):
        while libc.malloc(ctypes.c_size_t(size)):
            pass
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))


def hanging(rank: int) -> None:
    """Add the actions `lock` (a C call that keeps the interpreter lock) and `loop` (Python that never ends)."""
    add_action("lock", hold_the_interpreter_lock)
    add_action("loop", loop_forever_in_the_data)


def hold_the_interpreter_lock(amount: str) -> None:
    """Sleep in C as a broken extension would."""
    say_when()
    ctypes.PyDLL(None).sleep(60)


def loop_forever_in_the_data(amount: str) -> None:
    """Keep this thread busy."""
    say_when()
    while True:
        time.monotonic()


def say_when() -> None:
    """Write to the terminal when the hang began; the clock is that of all processes of this machine."""
    sys.stderr.write(f"hangs at {time.monotonic()}\n")
    sys.stderr.flush()


def add_action(name: str, act: Any) -> None:
    """Teach `BPT_FAULT` one more action; `act` takes what follows the colon."""
    known = fault_injection._act

    def also(fault: str, point: str) -> bool:
        action, _, amount = fault.rpartition(",")[2].partition(":")
        if action != name:
            return known(fault, point)
        act(amount)
        return False

    fault_injection.ACTIONS += (name,)
    fault_injection._act = also


class Clock:
    """Every clock of this process that a person could set is off by `hours`; in time zone `zone`."""

    def __init__(self, hours: float, zone: str = "UTC") -> None:
        self.hours, self.zone = hours, zone

    def __call__(self, rank: int) -> None:
        from bpt_dist.storage import lock, metrics_log, run_directory

        shift, true_time = self.hours * 3600, time.time
        os.environ["TZ"] = self.zone
        time.tzset()
        time.time = lambda: true_time() + shift  # type: ignore[assignment]

        class Shifted(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + timedelta(seconds=shift)

        metrics_log.datetime = run_directory.datetime = Shifted  # type: ignore[attr-defined]
        assert lock.time is time


class Listing:
    """Directories are listed in an order drawn with `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, rank: int) -> None:
        import random

        rng, listdir, scandir = random.Random(self.seed), os.listdir, os.scandir

        def shuffled(path: Any = ".") -> list[str]:
            names = sorted(listdir(path))
            rng.shuffle(names)
            return names

        class Scan:
            def __init__(self, path: Any = ".") -> None:
                with scandir(path) as entries:
                    self.entries = sorted(entries, key=lambda entry: entry.name)
                rng.shuffle(self.entries)

            def __iter__(self) -> Any:
                return iter(self.entries)

            def __enter__(self) -> Scan:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def close(self) -> None:
                pass

        os.listdir, os.scandir = shuffled, Scan  # type: ignore[assignment]


class CrashAtCall:
    """End this process at the n-th call that changes a file below `folder`, before it is made."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = str(folder), number

    def __call__(self, rank: int) -> None:
        calls = 0
        main = threading.main_thread()

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls
            if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                return
            if threading.current_thread() is not main or not str(arguments[0]).startswith(self.folder):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            calls += 1
            if calls == self.number:
                os._exit(99)

        sys.addaudithook(audit)
