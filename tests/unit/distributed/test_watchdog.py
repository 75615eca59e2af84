"""A process leaves in time and says why: stop requests, a launcher that is gone, a step that hangs."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from bpt_dist.distributed.watchdog import Watchdog

PRELUDE = """
import os, sys, time
from pathlib import Path
from bpt_dist.distributed.watchdog import Watchdog
folder = Path(sys.argv[1])
def leave(state, reason):
    (folder / "left").write_text(f"{state}: {reason}")
def ready():
    print("ready", flush=True)
"""


def start(tmp_path, body, **keywords):
    script = PRELUDE + textwrap.dedent(body)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, **keywords)
    assert process.stdout.readline() == b"ready\n"
    return process


def code_of(process, seconds=60):
    try:
        return process.wait(seconds)
    finally:
        process.kill()
        process.stdout.close()


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_request(number):
    with Watchdog(None) as watchdog:
        os.kill(os.getpid(), number)
        wait_until(lambda: watchdog.stop_requested, 1.0)
        assert watchdog.reason == number.name


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Watchdog(None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_request_is_seen_while_the_main_thread_waits_in_c(tmp_path):
    # As in a collective: a Python handler would run only after the call has returned.
    process = start(
        tmp_path,
        """
        import threading
        with Watchdog(folder, grace=0.5, on_leave=leave):
            lock = threading.Lock()
            lock.acquire()
            ready()
            lock.acquire(timeout=60)
        """,
    )
    process.send_signal(signal.SIGTERM)
    assert code_of(process) == 75
    assert "SIGTERM; still at 'start' after the grace period" in (tmp_path / "left").read_text()
    assert "Thread" in (tmp_path / "rank-0.stuck").read_text()


def test_the_same_signal_later_means_now(tmp_path):
    process = start(
        tmp_path,
        """
        with Watchdog(folder, grace=60):
            ready()
            while True:
                time.sleep(0.1)
        """,
    )
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None, "the terminal's and the launcher's copies of one Ctrl-C are one request"
    process.send_signal(signal.SIGINT)
    assert code_of(process) == 75


def test_a_hang_is_ended_with_stacks(tmp_path):
    process = start(
        tmp_path,
        """
        def endless_loop_in_the_data():
            while True:
                pass
        with Watchdog(folder, rank=3, startup_timeout=60, step_timeout=1, naming=0, on_leave=leave) as watchdog:
            watchdog.start_step_timeout()
            watchdog.heartbeat("step 7: all-gather of the scores")
            ready()
            endless_loop_in_the_data()
        """,
    )
    started = time.monotonic()
    assert code_of(process) == 69
    assert time.monotonic() - started < 20
    written = (tmp_path / "rank-3.stuck").read_text()
    assert "no progress for 1 s at 'step 7: all-gather of the scores'" in written
    assert "endless_loop_in_the_data" in written
    assert (tmp_path / "left").read_text().startswith("failed: no progress")


def test_a_call_that_holds_the_interpreter_lock_is_ended_too(tmp_path):
    process = start(
        tmp_path,
        """
        import ctypes
        with Watchdog(folder, startup_timeout=5, poll=0.2) as watchdog:
            time.sleep(0.5)
            ready()
            ctypes.PyDLL(None).sleep(60)
        """,
    )
    assert code_of(process) == 69
    assert "Timeout" in (tmp_path / "rank-0.stuck").read_text()


def test_beats_keep_it_alive_and_nothing_is_left_behind(tmp_path):
    """In a process of its own: a machine that pauses longer than the timeout must fail this test, not end its worker."""
    process = start(
        tmp_path,
        """
        with Watchdog(folder, startup_timeout=4, poll=0.1) as watchdog:
            ready()
            for step in range(12):
                watchdog.heartbeat(f"step {step}")
                time.sleep(0.5)
            assert not watchdog.stop_requested
        """,
    )
    assert code_of(process) == 0
    assert not list(tmp_path.iterdir())


def test_a_writer_that_hangs_does_not_keep_the_process(tmp_path):
    process = start(
        tmp_path,
        """
        with Watchdog(folder, startup_timeout=0.5, poll=0.1, on_leave=lambda state, reason: time.sleep(60)):
            ready()
            time.sleep(60)
        """,
    )
    assert code_of(process, 30) == 69


def test_an_orphan_leaves(tmp_path):
    # The launcher is killed; its child must not live on.
    child = PRELUDE + textwrap.dedent(
        """
        with Watchdog(folder, orphan_grace=0.3, poll=0.1, watch_launcher=True, on_leave=leave) as watchdog:
            ready()
            time.sleep(60)
        """
    )
    launcher = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]])\n"
        "print(child.pid, flush=True)\nchild.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher, child, str(tmp_path)], stdout=subprocess.PIPE)
    lines = {process.stdout.readline(), process.stdout.readline()}
    pid = int(next(line for line in lines if line != b"ready\n"))
    process.kill()
    process.wait()
    # Its copy of our pipe closes when it is gone.
    assert select.select([process.stdout], [], [], 5)[0]
    assert process.stdout.read() == b""
    process.stdout.close()
    assert "the launcher is gone" in (tmp_path / "left").read_text()
    with pytest.raises(ProcessLookupError):
        wait_until(lambda: os.kill(pid, 0))


def test_without_a_launcher_the_shell_may_go(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Watchdog(None)._ancestors == ()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Watchdog(None)._ancestors[0] == os.getppid()
