"""The sending process: mirrors the runs of one training process while it trains, and ends soon after it.

Training talks to it through a pipe and never waits: `open FOLDER`, `finish FOLDER`, `quit`; everything else
is read from the run directory. `python -m bpt_dist.mirror` is the process itself.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bpt_dist.files import write_json_atomic
from bpt_dist.tracking import Request, Sender
from bpt_dist.tracking_machine import Machine
from bpt_dist.tracking_store import SHORT_CALLS

# Seconds without news after which an ending training process stops waiting; a dead server is given up after
# 5.
PATIENCE = {"starting": 30, "loading": 60, "opening": 60, "sending": 5, "waiting": 5}
LONGEST_WAIT = 120
ORPHAN_SECONDS = 8
INTERVAL, LONGEST_INTERVAL = 1.0, 60.0
log = logging.getLogger(__name__)
_process: subprocess.Popen[bytes] | None = None  # one for all runs of this process: importing mlflow takes seconds


class Mirror:
    """Rank 0's handle: mirrors `folder` in the background from here to `finish`; never waits for the store.

    Several runs of one process share one sending process; `shutdown` ends it (at the latest when Python
    exits). Create it after `MetricsLog.cut`.
    """

    def __init__(self, folder: Path, request: Request) -> None:
        self.folder = folder
        if not (folder / "tracking.json").exists():
            write_json_atomic(folder / "tracking.json", asdict(request))
        _tell({"do": "open", "folder": str(folder), "request": asdict(request)})

    def finish(self) -> None:
        """Say that nothing more comes; the status is taken from `status.json` once the run is closed."""
        _tell({"do": "finish", "folder": str(self.folder)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def shutdown() -> list[str]:
    """Wait until all is sent or the store fails (5 s); return the directories left to `sync`."""
    global _process
    process, _process = _process, None
    if process is None:
        return []
    assert process.stdin
    assert process.stdout
    deadline, patience, behind = time.monotonic() + LONGEST_WAIT, 5.0, None
    try:
        process.stdin.write(b'{"do": "quit"}\n')
        process.stdin.close()
    except BrokenPipeError:
        pass
    while behind is None and time.monotonic() < deadline:
        if not select.select([process.stdout], [], [], patience)[0]:
            break
        line = process.stdout.readline()
        if not line:
            break
        news = json.loads(line)
        patience, behind = news["patience"], news.get("behind")
    if behind is None:
        process.kill()
        behind = ["the runs of this process"]
    process.wait()
    process.stdout.close()
    for folder in behind:
        log.warning("the tracking store did not get all of %s; complete it with: bpt-dist sync %s", folder, folder)
    return behind


def _tell(command: Mapping[str, Any]) -> None:
    global _process  # noqa: PLW0603
    if _process is None:
        environment = os.environ | SHORT_CALLS | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *_python_path()])
        environment.pop("BPT_FAULT", None)
        # In its own session: Ctrl-C and the launcher's signals are for the ranks; it ends when its parent
        # does.
        _process = subprocess.Popen(
            [sys.executable, "-m", "bpt_dist.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        atexit.register(shutdown)
    assert _process.stdin
    try:
        _process.stdin.write(json.dumps(command).encode() + b"\n")
    except BrokenPipeError:
        log.warning("the tracking process has ended; `bpt-dist sync` completes this run later")


def _python_path() -> list[str]:
    path = os.environ.get("PYTHONPATH")
    return [path] if path else []


class _Loop:
    """The sending process. Sends every second while the store answers; waits longer after each failure."""

    def __init__(self) -> None:
        self.commands: queue.Queue[dict[str, Any]] = queue.Queue()
        self.requests: dict[Path, Request] = {}
        self.senders: dict[Path, Sender] = {}
        self.finishing: set[Path] = set()
        self.phase, self.quitting, self.orphaned = "starting", False, False
        self.parent = os.getppid()
        self.machine = Machine()
        # MLflow prints a farewell with links for each run of a server; the pipe to our parent is for our own lines.
        self.news = os.dup(sys.stdout.fileno())
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def run(self) -> None:
        """Work until `quit` or until the parent is gone; then once more, and say what is missing."""
        for watch in (self._read_commands, self._watch_parent):
            threading.Thread(target=watch, daemon=True).start()
        interval, answered = INTERVAL, True
        while not self.quitting:
            self._await_commands(interval)
            # A store that fails while we are told to quit is not asked again: its silence costs seconds.
            answered = self.quitting or self._send()
            interval = INTERVAL if answered else min(2 * interval, LONGEST_INTERVAL)
            answered = answered or not self.quitting
        self._obey(0)
        if self.orphaned:
            self._await_settled(2.0)
        if answered:
            self._send(last=True)
        self._say({"patience": 5, "behind": [str(folder) for folder in self.requests]})

    def _send(self, *, last: bool = False) -> bool:
        """Bring every open run up to date; false if the store failed (the others would fail as slowly)."""
        for folder, request in list(self.requests.items()):
            try:
                if folder not in self.senders:
                    self.senders[folder] = Sender(folder, request, report=self._report)
                sender = self.senders[folder]
                if last or (folder in self.finishing and sender.is_settled()):
                    sender.finish()
                    sender.close()
                    del self.requests[folder], self.senders[folder]
                else:
                    sender.pump()
            except Exception as error:
                # Whatever MLflow, its server or the disk raises: training goes on, and `sync` completes the
                # run.
                log.info("%s: %s", folder, error)
                self._report("waiting")
                # If only this run cannot be sent, the others come first the next time.
                self.requests[folder] = self.requests.pop(folder)
                return False
        self._report("waiting")
        return True

    def _await_commands(self, seconds: float) -> None:
        """Wait up to `seconds` for a command and take it, and measure the machine meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self._obey(min(left, self.machine.seconds_left())):
            self.machine.measure_if_due([folder for folder in self.requests if folder not in self.finishing])

    def _obey(self, seconds: float) -> bool:
        """Wait up to `seconds` for a command, then take all there are; false if there were none."""
        obeyed = False
        try:
            command = self.commands.get(timeout=seconds) if seconds else self.commands.get_nowait()
            while True:
                folder, obeyed = Path(command["folder"]), True
                if command["do"] == "finish":
                    self.finishing.add(folder)
                elif command["do"] == "open":
                    self.requests[folder] = Request(**command["request"])
                command = self.commands.get_nowait()
        except queue.Empty:
            return obeyed

    def _await_settled(self, seconds: float) -> None:
        """Our pipe closes a moment before the parent is gone, and only then its run counts as killed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(sender.is_settled() for sender in self.senders.values()):
            time.sleep(0.05)

    def _read_commands(self) -> None:
        for line in sys.stdin.buffer:
            command = json.loads(line)
            if command["do"] == "quit":
                self._quit(orphaned=False)
                return
            self.commands.put(command)
        self._quit(orphaned=True)

    def _watch_parent(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(0.5)
        if not self.quitting:
            self._quit(orphaned=True)
        time.sleep(ORPHAN_SECONDS)
        os._exit(0)

    def _quit(self, *, orphaned: bool) -> None:
        self.orphaned, self.quitting = orphaned, True
        self._report(self.phase)
        self.commands.put({"do": "wake", "folder": ""})

    def _report(self, phase: str) -> None:
        self.phase = phase
        if self.quitting:
            self._say({"patience": PATIENCE[phase]})

    def _say(self, news: dict[str, Any]) -> None:
        try:
            os.write(self.news, json.dumps(news).encode() + b"\n")
        except OSError:
            self.quitting = True  # nobody listens any more


if __name__ == "__main__":
    os.nice(5)
    _Loop().run()
    os._exit(0)  # all is said and stored, and whoever waits for this process need not wait for mlflow's modules to be taken down
