"""The sending process: mirrors the runs of one training process while it trains, and ends soon after it.

Training talks to it through a pipe and never waits: `open FOLDER`, `finish FOLDER`, `quit`; everything else
is read from the run directory. `python -m bpt_dist.tracking.mirror` is the process itself.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bpt_dist.storage.file_system import NoFileLocks
from bpt_dist.storage.files import write_json_atomic
from bpt_dist.storage.layout import TRACKING
from bpt_dist.tracking.answer import Silent, explain, is_refusal
from bpt_dist.tracking.request import Request
from bpt_dist.tracking.sender import Sender
from bpt_dist.tracking.store import NO_LOCKS, SHORT_CALLS, check_locks
from bpt_dist.tracking.system_metrics import Machine

# Seconds without news after which an ending training process stops waiting; a dead server is given up after
# 5.
PATIENCE = {"starting": 30, "loading": 60, "opening": 60, "sending": 5, "waiting": 5}
LONGEST_WAIT = 120
ORPHAN_SECONDS = 8
INTERVAL, LONGEST_INTERVAL = 1.0, 60.0
log = logging.getLogger(__name__)
_folders: dict[str, None] = {}  # of the runs that were opened: what a sending process that dies has not finished
_process: subprocess.Popen[bytes] | None = None  # one for all runs of this process: importing mlflow takes seconds
_news: queue.Queue[dict[str, Any] | None] = queue.Queue()  # what it says, None at its end


class Mirror:
    """Rank 0's handle: mirrors `folder` in the background from here to `finish`; never waits for the store.

    Several runs of one process share one sending process; `shutdown` ends it (at the latest when Python
    exits). Create it after `MetricsLog.cut`.
    """

    def __init__(self, folder: Path, request: Request) -> None:
        self.folder = folder
        if not (folder / TRACKING).exists():
            write_json_atomic(folder / TRACKING, asdict(request) | {"folder": str(folder.resolve())})
        self._works = _can_be_locked(request.uri)
        if self._works:
            _folders[str(folder)] = None
            _tell({"do": "open", "folder": str(folder), "request": asdict(request)})

    def finish(self) -> None:
        """Say that nothing more comes; the status is taken from `status.json` once the run is closed."""
        if self._works:
            _tell({"do": "finish", "folder": str(self.folder)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def _can_be_locked(uri: str) -> bool:
    """Return whether the store may be used; warn of a sqlite store on a file system without locks, which writers would spoil."""
    try:
        check_locks(uri)
    except NoFileLocks as error:
        log.warning("%s; the run is not mirrored to MLflow (metrics.jsonl has everything): %s", error, NO_LOCKS)
        return False
    return True


def shutdown() -> list[str]:
    """Wait until all is sent or the store fails (5 s); return the directories left to `sync`."""
    global _process
    process, _process = _process, None
    if process is None:
        return []
    folders = list(_folders)
    _folders.clear()
    assert process.stdin
    deadline, patience, behind = time.monotonic() + LONGEST_WAIT, 5.0, None
    causes: Mapping[str, str] = {}
    try:
        process.stdin.write(b'{"do": "quit"}\n')
        process.stdin.close()
    except BrokenPipeError:
        pass
    while behind is None and time.monotonic() < deadline:
        try:
            news = _news.get(timeout=patience)
        except queue.Empty:
            break
        if news is None:
            break
        patience, behind, causes = news["patience"], news.get("behind"), news.get("causes", {})
    if behind is None:
        process.kill()
        behind = folders
    process.wait()
    for folder in behind:
        cause = f" ({causes[folder]})" if folder in causes else ""
        command = f"bpt-dist sync {shlex.quote(folder)}"
        log.warning("the tracking store did not get all of %s%s; complete it with: %s", folder, cause, command)
    return behind


def _listen(process: subprocess.Popen[bytes], news: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass on what the sending process says, and warn at once of a store that refuses, once for each of its answers."""
    assert process.stdout
    said = set()
    with process.stdout as lines:
        for line in lines:
            message = json.loads(line)
            if "refusal" not in message:
                news.put(message)
            elif message["refusal"] not in said:
                said.add(message["refusal"])
                log.warning("tracking: %s; training continues without it", message["refusal"])
    news.put(None)


def _tell(command: Mapping[str, Any]) -> None:
    global _process, _news  # noqa: PLW0603
    if _process is None:
        environment = os.environ | SHORT_CALLS | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *_python_path()])
        environment.pop("BPT_FAULT", None)
        # In its own session: Ctrl-C and the launcher's signals are for the ranks; it ends when its parent
        # does.
        _process = subprocess.Popen(
            [sys.executable, "-m", "bpt_dist.tracking.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        _news = queue.Queue()
        threading.Thread(target=_listen, args=(_process, _news), daemon=True).start()
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
        self.causes: dict[Path, str] = {}  # why a run could not be sent the last time
        self.phase, self.quitting, self.orphaned = "starting", False, False
        self.was_there = False
        self.parent = os.getppid()
        self.machine = Machine()
        # MLflow prints a farewell with links for each run of a server; the pipe to our parent is for our own lines.
        self.news = os.dup(sys.stdout.fileno())
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def run(self) -> None:
        """Work until `quit` or until the parent is gone; then send once more, and report what is missing."""
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
        causes = {str(folder): text for folder, text in self.causes.items() if folder in self.requests}
        self._say({"patience": 5, "behind": [str(folder) for folder in self.requests], "causes": causes})

    def _send(self, *, last: bool = False) -> bool:
        """Bring every open run up to date; false if the store failed (the others would fail as slowly)."""
        for folder, request in list(self.requests.items()):
            try:
                if folder not in self.senders:
                    self.senders[folder] = Sender(folder, request, report=self._report)
                sender = self.senders[folder]
                if last or (folder in self.finishing and sender.has_ended()):
                    sender.finish()
                    sender.close()
                    del self.requests[folder], self.senders[folder]
                else:
                    sender.send_pending()
                self.was_there = True
            except Exception as error:
                # Whatever MLflow, its server or the disk raises: training continues, and `sync` completes the
                # run.
                self._explain(error, folder, request)
                self._report("waiting")
                # If only this run cannot be sent, the others come first the next time.
                self.requests[folder] = self.requests.pop(folder)
                return False
        self._report("waiting")
        return True

    def _explain(self, error: Exception, folder: Path, request: Request) -> None:
        self.causes[folder] = explain(error, request.uri, request.experiment)
        # A store that was there and is away is asked again, which needs no word before the end.
        if is_refusal(error, request.uri, request.experiment) or (isinstance(error, Silent) and not self.was_there):
            self._say({"refusal": self.causes[folder]})

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
        while time.monotonic() < deadline and not all(sender.has_ended() for sender in self.senders.values()):
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
    os._exit(0)  # all is stored and reported: do not wait until mlflow's modules are taken down
