"""Who trains the runs of a table: this process, a worker process beside others, or the deepspeed launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from bpt_dist import config as configuration
from bpt_dist.artifacts.stored_run import is_finished
from bpt_dist.commands.table.jobs import Outcome
from bpt_dist.config import RunConfig
from bpt_dist.distributed.environment import child_environment, free_port, num_gpus
from bpt_dist.errors import INTERNAL_ERROR, PeerLost, Stopped
from bpt_dist.storage.files import write_atomic

SCRIPT = Path(__file__).parents[3] / "launcher" / "train.py"
LAST_LINES = 5.0  # seconds to wait for what a process has printed; a child of it that lives on would keep the pipe open
# Ends a process group when its input does, which is when the process that holds the other end is gone, however it went.
WATCH = 'read -r _; kill -TERM -"$0"'


def write_config(run: RunConfig, folder: Path) -> Path:
    """Write the resolved configuration of a run, which reads back to the same value, and return the file."""
    file = folder / f"{run.name}.yaml"
    write_atomic(file, configuration.resolved_yaml(run).encode())
    return file


class InProcessTrainer:
    """Trains in this process."""

    def train(self, run: RunConfig) -> Outcome:
        """Train one run; its guard has the signals meanwhile."""
        environment = child_environment(1)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        from bpt_dist.commands.table.worker import train_here

        began = time.monotonic()
        code, reason = train_here(run)
        return Outcome(code, reason, time.monotonic() - began)

    def stop(self) -> None:
        """Do nothing: between two runs there is nothing to stop, and a run hears the signal itself."""

    def close(self) -> None:
        """Wait until the runs are in the tracking store."""
        from bpt_dist.commands.table.worker import close

        close()


class WorkerTrainer:
    """Trains in a process of its own, started for the first run and again after a death; it writes `folder/worker-N.log`.

    `echo` is called with every line that it writes, each of which names its run.
    """

    def __init__(self, number: int, num_workers: int, folder: Path, echo: Callable[[str], None] | None = None) -> None:
        self.number, self.folder, self.echo = number, folder, echo
        self.environment = child_environment(num_workers)
        # A worker counts as launched: its guard stops the run when this process is gone. With GPUs it takes its own.
        self.environment["LOCAL_RANK"] = str(number % max(1, num_gpus()))
        self.process: subprocess.Popen[bytes] | None = None
        self.answers: IO[bytes]
        self.reader: threading.Thread | None = None

    def train(self, run: RunConfig) -> Outcome:
        """Hand one run to the process and wait for its answer."""
        process = self.process or self._start()
        assert process.stdin is not None
        began = time.monotonic()
        line = b""
        with suppress(BrokenPipeError):
            process.stdin.write(f"{write_config(run, self.folder).resolve()}\n".encode())
            process.stdin.flush()
            line = self.answers.readline()
        if not line:
            return self._dead(process, time.monotonic() - began)
        answer = json.loads(line)
        return Outcome(answer["code"], answer["reason"], time.monotonic() - began)

    def stop(self) -> None:
        """Pass the request on to the guard of the run."""
        if self.process is not None:
            self.process.terminate()

    def close(self) -> None:
        """Let the process end."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self._ended()

    def _start(self) -> subprocess.Popen[bytes]:
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "bpt_dist.commands.table.worker", str(writer), *sys.argv]
        with (self.folder / f"worker-{self.number}.log").open("ab") as log:
            # A session of its own: Ctrl-C is for the command, which passes it on once.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if self.echo else log, stderr=subprocess.STDOUT,
                env=self.environment, pass_fds=[writer], start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        if self.process.stdout is not None:
            self.reader = threading.Thread(target=self._repeat, args=(self.process.stdout,), daemon=True)
            self.reader.start()
        self.answers = os.fdopen(reader, "rb")
        self.answers.readline()  # it is ready, or already dead, which the first run finds out
        return self.process

    def _ended(self) -> None:
        self.answers.close()
        self.process = None
        if self.reader is not None:
            self.reader.join(LAST_LINES)

    def _repeat(self, lines: IO[bytes]) -> None:
        """Write what the process prints to its log and hand on its lines, until it ends."""
        assert self.echo is not None
        with lines, (self.folder / f"worker-{self.number}.log").open("ab", buffering=0) as log:
            for line in lines:
                log.write(line)
                self.echo(line.decode(errors="replace").rstrip("\n"))

    def _dead(self, process: subprocess.Popen[bytes], seconds: float) -> Outcome:
        code = process.wait()
        self._ended()
        if code in (Stopped.exit_code, -signal.SIGTERM):
            return Outcome(Stopped.exit_code, "stopped before the run wrote its final status", seconds)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        reason = f"worker {self.number} {how}; see {self.folder / f'worker-{self.number}.log'}"
        return Outcome(code if code > 0 else INTERNAL_ERROR, reason, seconds, died=True)


class LauncherJob:
    """A job of the deepspeed launcher in a session of its own: the launcher ends alone on SIGTERM and leaves its ranks behind.

    The session is told as a whole, by `stop`, and when this process is gone, however it went. With `subprocess.PIPE` as `output`
    the lines are read from `process.stdout`.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        self._watch = subprocess.Popen(
            ["sh", "-c", WATCH, str(self.process.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def wait(self) -> int:
        """Return the exit code of the launcher when it has ended."""
        code = self.process.wait()
        self._watch.kill()
        self._watch.communicate()
        return code

    def stop(self) -> None:
        """Ask all processes of the job to stop with a checkpoint."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)


class DeepSpeedTrainer:
    """Trains every run as a job of the deepspeed launcher with several processes; they write `folder/launcher.log`."""

    def __init__(self, num_processes: int, folder: Path) -> None:
        self.num_processes, self.folder = num_processes, folder
        self.environment = child_environment(num_processes)
        self.job: LauncherJob | None = None

    def train(self, run: RunConfig) -> Outcome:
        """Launch one run and wait for it; its status file decides, not the launcher's exit code."""
        began = time.monotonic()
        with (self.folder / "launcher.log").open("ab") as log:
            self.job = LauncherJob(self.command(write_config(run, self.folder)), self.environment, log)
        code = self.job.wait()
        seconds = time.monotonic() - began
        if is_finished(run):
            return Outcome(0, None, seconds)
        died = code <= 0 or code == PeerLost.exit_code
        return Outcome(code if code > 0 else INTERNAL_ERROR, self._reason(run), seconds, died=died)

    def command(self, config: Path) -> Sequence[str]:
        """Return the command that launches one run."""
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(self.num_processes)]
        program = [str(SCRIPT)] if SCRIPT.is_file() else ["--module", "bpt_dist.commands.train"]  # a wheel has no launcher/
        return [*launcher, "--master_port", str(free_port()), *program, "--config", str(config)]

    def stop(self) -> None:
        """Tell all processes of the job."""
        if self.job is not None:
            self.job.stop()

    def close(self) -> None:
        """Hold nothing."""

    def _reason(self, run: RunConfig) -> str:
        from bpt_dist.storage.run_directory import read_status

        if (status := read_status(run.directory)) is not None and status.reason:
            return status.reason
        return f"see {self.folder / 'launcher.log'}"
