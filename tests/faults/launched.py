"""A job started by the real `deepspeed` command, with every process it brings forth in sight."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from server import REPOSITORY, free_port

BIN = Path(sys.executable).parent


class Launched:
    """`deepspeed --num_gpus SIZE launcher/train.py --config FILE` in a session of its own, ended with all it has started."""

    def __init__(self, config: Path, size: int, fault: str = "") -> None:
        self.mark = f"BPT_TRIAL={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "BPT_FAULT": fault, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [
            BIN / "deepspeed",
            "--num_gpus",
            str(size),
            "--master_port",
            str(free_port()),
            "launcher/train.py",
            "--config",
            config,
        ]
        self.size, self.began = size, time.monotonic()
        self.screen = config.with_name("screen")
        with self.screen.open("wb") as screen:
            self.top = subprocess.Popen(
                list(map(str, command)), cwd=REPOSITORY, env=environment, stdout=screen, stderr=screen, start_new_session=True
            )

    def processes(self) -> dict[int, str]:
        """Return every living process of this job with its command line: they have inherited the mark."""
        found = {}
        for place in Path("/proc").iterdir():
            if place.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in (place / "environ").read_bytes():
                        found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    @property
    def launch_py(self) -> int:
        """The pid of launch.py, which starts and watches the ranks."""
        return next(pid for pid, line in self.processes().items() if "deepspeed.launcher.launch" in line)

    @property
    def ranks(self) -> list[int]:
        """The pids of the ranks."""
        return [pid for pid, line in self.processes().items() if "launcher/train.py" in line and "deepspeed" not in line]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 90.0) -> None:
        """Wait until `condition` holds; a job that ends before or takes longer is a failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.screen.read_text()[-3000:]
            time.sleep(0.05)

    def wait_until_gone(self, seconds: float) -> float:
        """Return the seconds until no process is left; those that are left after `seconds` are a failure."""
        began = time.monotonic()
        while self.processes():
            self.top.poll()
            assert time.monotonic() - began < seconds, (self.processes(), self.screen.read_text()[-3000:])
            time.sleep(0.1)
        return time.monotonic() - began

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.top.wait(10)
