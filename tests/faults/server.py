"""A fork server for trials: torch, deepspeed and bpt_dist are imported once, a trial costs a fork.

`ForkServer` starts this file as a process of its own, without threads, and asks it for trials over a pipe. Each trial has a leader
in a session of its own that adopts every descendant (`PR_SET_CHILD_SUBREAPER`), so that a process that outlives its job is seen
whatever session it moved to. Every wait has a deadline; at the end of a trial the whole group is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).parents[2]
# The repository itself: a class of a test that is sent here is known by its place below it, `tests.faults.test_worlds`.
PATHS = [REPOSITORY / "tests" / "support", REPOSITORY / "tests" / "distributed", REPOSITORY / "tests" / "faults", REPOSITORY]
START_SECONDS = 120
GONE_SECONDS = 10.0  # after the end of a job no process of it may live longer
SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
# Below the kernel's range for outgoing connections: nobody else is given such a port between our look and its use.
FIRST_PORT, NUM_PORTS = 20000, 12000
T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """One start of a job: `launcher/train.py --config FILE words...` on `size` ranks of this machine.

    `prepare(rank)` runs in each rank first. A rank that stops itself (action `stop`) gets the signals of `on_stop`, each after its
    delay in seconds; without any it stays stopped until the others are gone. With `launcher` the leader does what DeepSpeed's
    launch.py does when a rank fails: it sends SIGTERM to the others.
    """

    config: Path
    size: int = 1
    fault: str = ""
    words: tuple[str, ...] = ()
    prepare: Callable[[int], object] | None = None
    on_stop: tuple[tuple[float, int], ...] = ()
    launcher: bool = False
    port: int | None = None
    seconds: float = 60.0


@dataclass
class Ended:
    """How a start ended: exit codes (negative: signals), seconds from its beginning, what ranks wrote to the terminal."""

    codes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stopped: dict[int, float] = field(default_factory=dict)  # when a rank stopped itself
    timed_out: bool = False
    survivors: list[str] = field(default_factory=list)
    screen: str = ""
    began: float = 0.0  # time.monotonic()

    @property
    def notice(self) -> float:
        """Seconds from the first rank that failed, or stopped itself, to the last one that left."""
        first = min([*self.stopped.values(), *(at for at, code in zip(self.seconds, self.codes, strict=True) if code)])
        return max(at for rank, at in enumerate(self.seconds) if rank not in self.stopped) - first


class ForkServer:
    """The client side; a context manager. `mounts` gives the server a mount namespace of its own (needs root)."""

    def __init__(self, *, mounts: bool = False, environment: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        prefix = ["unshare", "--mount", "--propagation", "private"] if mounts else []
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        variables |= {
            "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **(environment or {}),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "BPT_FAULT"):
            variables.pop(name, None)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", "import server; server.main()", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=variables,
            cwd=PATHS[0],
            start_new_session=True,
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._answer(START_SECONDS)

    def start(self, start: Start) -> Ended:
        """Run one start of a job to its end."""
        self._pipe.send(("start", start))
        return self._answer(start.seconds + GONE_SECONDS + 15)

    def call(self, work: Callable[..., T], *arguments: Any, seconds: float = 60.0) -> T:
        """Return what `work(*arguments)` returns in a fork of the server; its exception is raised here."""
        self._pipe.send(("call", (work, arguments, seconds)))
        return self._answer(seconds + 10)

    def close(self) -> None:
        """End the server."""
        self._pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            self.process.kill()
            raise AssertionError(f"the fork server did not answer within {seconds:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


# --- the server ---------------------------------------------------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    """Answer requests until the client is gone."""
    door = _imported()
    pipe.send("ready")
    while True:
        try:
            kind, request = pipe.recv()
        except EOFError:
            return
        if kind == "start":
            answer = _forked(partial(_lead, request, door), request.seconds + GONE_SECONDS + 10)
        else:
            work, arguments, seconds = request
            answer = _forked(partial(work, *arguments), seconds)
        pipe.send(answer)


def _imported() -> Callable[[Sequence[str]], int]:
    """Import what ranks need, leave no thread behind, and return the program of `launcher/train.py`."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import tiny_run  # noqa: F401
    import torch

    import bpt_dist.train  # noqa: F401
    from bpt_dist.backbones import loading
    from bpt_dist.tasks import mini

    torch.set_num_threads(1)
    # transformers compiles a thousand regular expressions at the first load.
    loading.load(str(mini.BACKBONE), name="mini", revision=None, dtype="fp32", attention="auto")
    door = runpy.run_path(str(REPOSITORY / "launcher" / "train.py"))["main"]
    gc.collect()
    gc.freeze()  # pages that a collection in a fork would write to, and so copy
    return door


def _forked(work: Callable[[], Any], seconds: float) -> Any:
    """Return the result of `work` in a fork, or the exception that tells why there is none."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        try:
            result = work()
        except BaseException as error:
            result = AssertionError(f"{error}\n{traceback.format_exc()}")
        with os.fdopen(writer, "wb") as file:
            file.write(pickle.dumps(result))
        os._exit(0)
    os.close(writer)
    with Connection(reader, writable=False) as pipe:
        in_time = pipe.poll(seconds)
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(os.dup(pipe.fileno()), "rb") as file:
            data = file.read() if in_time else b""
    os.waitpid(pid, 0)
    return pickle.loads(data) if data else AssertionError(f"no result within {seconds:g} s")


def _lead(start: Start, door: Callable[[Sequence[str]], int]) -> Ended:
    """Fork the ranks and see the job to its end; runs in the leader."""
    os.setsid()
    _prctl(SET_CHILD_SUBREAPER, 1)
    screen = os.memfd_create("screen")
    port = start.port or free_port()
    began = time.monotonic()
    ranks = {_fork_rank(start, rank, port, screen, door): rank for rank in range(start.size)}
    ended = _Watch(start, ranks, began).run()
    ended.began = began
    ended.survivors = _clear_away()
    ended.screen = os.pread(screen, os.fstat(screen).st_size, 0).decode(errors="replace")
    return ended


class _Watch:
    """The leader's wait for its ranks."""

    def __init__(self, start: Start, ranks: dict[int, int], began: float) -> None:
        self.start, self.ranks, self.began = start, ranks, began
        self.codes: dict[int, int] = {}
        self.at: dict[int, float] = {}
        self.stopped: dict[int, float] = {}
        self.signals: list[tuple[float, int, int]] = []  # when, pid, signal
        self.told = False

    def run(self) -> Ended:
        timed_out = False
        while len(self.codes) < len(self.ranks):
            now = time.monotonic() - self.began
            self._reap(now)
            self._send_signals(now)
            running = [pid for pid, rank in self.ranks.items() if rank not in self.codes and rank not in self.stopped]
            waiting = self.signals or running
            if not timed_out and (now > self.start.seconds or not waiting):
                timed_out = bool(waiting)
                self._kill(running)
            time.sleep(0.002)
        order = range(len(self.ranks))
        return Ended([self.codes[rank] for rank in order], [self.at[rank] for rank in order], self.stopped, timed_out)

    def _reap(self, now: float) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            rank = self.ranks.get(pid)
            if rank is None:  # a descendant that was left to us
                continue
            if os.WIFSTOPPED(status):
                self.stopped[rank] = now
                self.signals += [(now + delay, pid, number) for delay, number in self.start.on_stop]
            else:
                self.codes[rank], self.at[rank] = os.waitstatus_to_exitcode(status), now
                if self.codes[rank] and self.start.launcher and not self.told:
                    self.told = True
                    self.signals += [(now + 1, p, signal.SIGTERM) for p, r in self.ranks.items() if r not in self.codes]

    def _send_signals(self, now: float) -> None:
        due = [entry for entry in self.signals if entry[0] <= now]
        self.signals = [entry for entry in self.signals if entry[0] > now]
        for _, pid, number in due:
            rank = self.ranks[pid]
            if rank not in self.codes:
                os.kill(pid, number)
                if number == signal.SIGCONT:
                    self.stopped.pop(rank, None)

    def _kill(self, running: list[int]) -> None:
        """Show where the ranks hang, then kill them; also those that stay stopped."""
        for pid in running:
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.5 if running else 0)
        for pid, rank in self.ranks.items():
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)


def _clear_away() -> list[str]:
    """Wait until every descendant is gone; kill and return those that are not in time."""
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        time.sleep(0.02)
    survivors = []
    for pid in _children(os.getpid()):
        with contextlib.suppress(OSError):
            survivors.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            os.kill(pid, signal.SIGKILL)
    return survivors


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _fork_rank(start: Start, rank: int, port: int, screen: int, door: Callable[[Sequence[str]], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    _prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    terminal = os.open(f"/proc/self/fd/{screen}", os.O_WRONLY | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    code = 70
    try:
        os.environ["BPT_FAULT"] = start.fault
        if start.size > 1 or start.port is not None:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(start.size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
        if start.prepare is not None:
            start.prepare(rank)
        code = door(["--config", str(start.config), *start.words])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def free_port() -> int:
    """Return a port of the loopback device that nobody listens on now."""
    offset = int.from_bytes(os.urandom(2), "little")
    for number in range(NUM_PORTS):
        port = FIRST_PORT + (offset + number) % NUM_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """Serve on the descriptor named on the command line."""
    serve(Connection(int(sys.argv[1])))
