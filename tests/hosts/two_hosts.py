"""Two hosts on one machine: network namespaces joined by a bridge, each with its own name and a real sshd.

    node0 10.77.0.1 --- bridge --- 10.77.0.2 node1

The bridge lies in a namespace of its own, so the machine's network is not touched. Keys, ssh configuration and home folder are
throw-away files; an `ssh` first in PATH leads both the launcher and pdsh to them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launcher" / "train.py"
BIN = Path(sys.executable).parent
TOOLS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NODES = ("node0", "node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
KEEP_ALIVE = "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"
JOB_ENVIRONMENT = "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"


def why_not() -> str | None:
    """Return why there can be no two hosts here, or None."""
    if os.geteuid() != 0:
        return "needs root: network namespaces and sshd"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SEARCHED) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 openssh-server openssh-client pdsh)"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"this machine allows no namespaces: {probe.stderr.strip()}" if probe.returncode else None


class TwoHosts:
    """Two hosts that share the file system of this machine; `folder` holds what they need and is the working folder of jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bridge = f"bpt{os.getpid()}sw"
        self.spaces = [f"bpt{os.getpid()}n{index}" for index in range(2)]
        self._servers: list[subprocess.Popen[bytes]] = []

    # --- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> TwoHosts:
        remove(left_behind())
        try:
            self._write_files()
            self._connect()
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        remove([*self.spaces, self.bridge])
        for server in self._servers:
            server.wait()
        for name in ("key", "host_key"):
            (self.folder / name).unlink(missing_ok=True)

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("bin", "home"):
            (folder / name).mkdir()
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        (folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
            "  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
        )
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        wrapper = folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        (folder / ".deepspeed_env").write_text(JOB_ENVIRONMENT)
        self.hostfile("hostfile", *(f"{name} slots=1" for name in NODES))

    def _connect(self) -> None:
        run = lambda command: subprocess.run(command.split(), check=True, capture_output=True)  # noqa: E731
        run(f"ip netns add {self.bridge}")
        run(f"ip -n {self.bridge} link add bridge type bridge")
        run(f"ip -n {self.bridge} link set bridge up")
        for index, space in enumerate(self.spaces):
            self.name_hosts(index)
            run(f"ip netns add {space}")
            run(f"ip link add port{index} netns {self.bridge} type veth peer name eth0 netns {space}")
            run(f"ip -n {self.bridge} link set port{index} master bridge up")
            run(f"ip -n {space} addr add {ADDRESSES[index]}/24 dev eth0")
            for device in ("lo", "eth0"):
                run(f"ip -n {space} link set {device} up")

    def name_hosts(self, index: int, own_address: str | None = None) -> None:
        """Write the /etc/hosts of one host; with `own_address` its own name leads there, as Debian's 127.0.1.1 does."""
        addresses = list(ADDRESSES)
        addresses[index] = own_address or addresses[index]
        file = Path("/etc/netns") / self.spaces[index] / "hosts"
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written in place: the namespaces have this very file mounted over /etc/hosts.
        file.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in zip(addresses, NODES, strict=True))
        )

    def _serve(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = shutil.which("sshd", path=SEARCHED)
        for index in range(2):
            with (self.folder / f"sshd{index}.log").open("wb") as log:
                command = self._inside(index, [str(sshd), "-D", "-e", "-f", str(self.folder / "sshd_config")])
                self._servers.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        for index in range(2):
            wait_until(lambda name=NODES[index]: self.run(["ssh", name, "true"]).returncode == 0, 10, f"sshd of {NODES[index]}")

    # --- use ----------------------------------------------------------------------------------------------------------

    def hostfile(self, name: str, *lines: str) -> Path:
        """Write a hostfile and return it."""
        file = self.folder / name
        file.write_text("".join(f"{line}\n" for line in lines))
        return file

    def _inside(self, index: int, command: Sequence[str]) -> list[str]:
        enter = ["ip", "netns", "exec", self.spaces[index], "unshare", "--uts", "sh", "-c"]
        return [*enter, f'hostname {NODES[index]}; exec "$@"', "sh", *map(str, command)]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the variables of a shell on one of the hosts."""
        kept = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "TERM")}
        return {
            **kept,
            "PATH": f"{self.folder}/bin:{BIN}:{SEARCHED}",
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "PDSH_SSH_ARGS_APPEND": KEEP_ALIVE,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            **variables,
        }

    @contextmanager
    def started(self, command: Sequence[object], index: int = 0, **variables: str) -> Iterator[Job]:
        """Start a command on a host in a session of its own; what is left of it is killed at the end."""
        output = self.folder / f"output-{time.monotonic_ns()}.txt"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                self._inside(index, [str(word) for word in command]),
                cwd=self.folder,
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Job(process, output)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, command: Sequence[object], index: int = 0, seconds: float = 120, **variables: str) -> Ended:
        """Run a command on a host and return how it ended."""
        with self.started(command, index, **variables) as job:
            return job.ended(seconds)

    def train(self, config: Path, *overrides: str, hostfile: str = "hostfile", options: Sequence[str] = ()) -> list[object]:
        """Return the launcher's command for a configuration."""
        return ["deepspeed", "--hostfile", hostfile, *options, SCRIPT, "--config", config, *overrides]

    def cut(self, index: int) -> None:
        """Pull the cable of a host."""
        subprocess.run(["ip", "-n", self.bridge, "link", "set", f"port{index}", "down"], check=True)

    def repair(self, index: int) -> None:
        """Put the cable back."""
        subprocess.run(["ip", "-n", self.bridge, "link", "set", f"port{index}", "up"], check=True)

    def jobs(self) -> list[str]:
        """Return the command lines of launchers and ranks that are alive on either host."""
        lines = [line_of(pid) for space in self.spaces for pid in pids(space)]
        return [line for line in lines if "train.py" in line or "deepspeed" in line or "hosts_probe" in line]


def pids(space: str) -> list[int]:
    """Return the processes in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def remove(spaces: Sequence[str]) -> None:
    """Remove namespaces of ours with all that runs in them."""
    for space in spaces:
        for pid in pids(space):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)


def left_behind() -> list[str]:
    """Return the namespaces of a test process that was killed before it could remove them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    ours = re.findall(r"^(bpt(\d+)(?:sw|n[01]))\b", listed, re.MULTILINE)
    return [space for space, owner in ours if not Path("/proc", owner).exists()]


class Ended:
    """How a command ended."""

    def __init__(self, returncode: int, output: str, seconds: float) -> None:
        self.returncode, self.output, self.seconds = returncode, output, seconds


class Job:
    """A command under way."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path) -> None:
        self.process, self._file, self._started = process, file, time.monotonic()

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._file.read_text(errors="replace")

    def ended(self, seconds: float) -> Ended:
        """Wait for its end."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{shlex.join(map(str, self.process.args))} still runs after {seconds:g} s:\n{self.output}"
            ) from None
        return Ended(code, self.output, time.monotonic() - self._started)


def line_of(pid: int) -> str:
    """Return the command line of a process, empty when it is gone."""
    with suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def wait_until(true: object, seconds: float, what: str) -> float:
    """Wait for a condition and return how long it took."""
    started = time.monotonic()
    while not true():  # type: ignore[operator]
        if time.monotonic() - started > seconds:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - started
