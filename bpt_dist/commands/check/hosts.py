"""`bpt-dist check --hostfile`: every host of a job, asked over ssh before anything is started on it."""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

from bpt_dist import config as configuration
from bpt_dist.commands.check import hostfile
from bpt_dist.commands.check.compare import compared, connections, of_one_host, world_size
from bpt_dist.commands.check.hostfile import Host
from bpt_dist.commands.check.job import Finding, attempt, report
from bpt_dist.config import RunConfig
from bpt_dist.config.shell_words import problem_with_path
from bpt_dist.distributed.environment import home_folder
from bpt_dist.errors import ConfigError
from bpt_dist.tasks import mini

CONNECT_SECONDS, ANSWER_SECONDS, PEER_SECONDS, HASH_SECONDS = 5, 20.0, 30.0, 600.0
# What ssh says, and what to do about it.
SSH_REMEDIES = {
    "Permission denied": "let this user log in there without a password: ssh-copy-id {host}",
    "Host key verification failed": "log in once by hand and compare its key: ssh {host}",
    "Could not resolve": "correct the name in the hostfile, or add it to DNS or /etc/hosts",
    "No such file": "install the project there under the same path as here",
    "not found": "install the project there under the same path as here",
    "No module named": "install the project there under the same path as here",
}


def check_hosts(file: Path, path: Path | None, overrides: Sequence[str], port: int, *, as_json: bool = False) -> bool:
    """Print a line for each finding, the command to start with when all is well, and return whether it is."""
    listed = hostfile.read_hostfile(file)
    passed = report(_findings(file, listed, path, overrides, port), as_json=as_json)
    if passed and path is not None and not as_json:
        slots = sum(host.slots for host in listed)
        typer.echo(f"start with\n  {hostfile.command(file, path, overrides, slots, port)}")
    return passed


def _findings(file: Path, listed: list[Host], path: Path | None, overrides: Sequence[str], port: int) -> Iterator[Finding]:
    if shutil.which("ssh") is None:
        raise ConfigError("ssh: is not installed here; install the OpenSSH client")
    slots = sum(host.slots for host in listed)
    yield Finding("hostfile", f"{file} lists {len(listed)} host(s), {slots} slots")
    config = None
    if path is not None:
        finding, config = attempt("configuration", lambda: configuration.load(path, overrides))
        yield finding
        failure, command = attempt("command line", lambda: hostfile.command(file, path, overrides, slots, port))
        yield failure if command is None else Finding("command line", "nothing in it that a shell would act on")
    variables: dict[str, str] = {}
    yield from _launcher(len(listed), variables)
    if config is not None:
        yield world_size(config.distribution, slots)
    with _Marker(config) as marker:
        yield from _remote_findings(listed, config, {"variables": variables, "marker": marker, "port": port})


def _launcher(num_hosts: int, variables: dict[str, str]) -> Iterator[Finding]:
    """Check what the launcher itself uses on this host; collect in `variables` what it passes on to the others."""
    if num_hosts > 1:
        pdsh = shutil.which("pdsh")
        yield Finding("pdsh", pdsh or "is not installed", None if pdsh else "install pdsh on the host you start from")
        if "ServerAliveInterval" not in _ssh_options():
            remedy = f"export PDSH_SSH_ARGS_APPEND='{hostfile.KEEP_ALIVE}'"
            yield Finding("ssh", "a host that is cut off would be waited for without end", remedy)
    for what, place in (("python", sys.executable), ("working folder", str(Path.cwd()))):
        problem = problem_with_path(place) if num_hosts > 1 else None
        if problem is not None:
            yield Finding(what, f"{place} {problem}", "move the project to another folder on all hosts")
    passed_on = hostfile.exported(dict(os.environ))
    problems = list(hostfile.problems_with_variables(passed_on))
    # In the launcher's order: the folder of the user first, so that the one here wins.
    home = home_folder()
    for file in (*([home / ".deepspeed_env"] if home is not None else []), Path(".deepspeed_env")):
        if file.is_file():
            variables_there, wrong = hostfile.read_environment_file(file)
            passed_on |= variables_there
            problems += wrong
    problems += _not_passed_on(passed_on)
    if num_hosts > 1:
        yield from (Finding(problem.place, problem.text, problem.remedy) for problem in problems)
        if not problems:
            yield Finding("variables", f"{len(passed_on)} passed on to every host: {', '.join(sorted(passed_on))}")
    # What must not travel does not travel with the probe either.
    bad = {name for name, value in passed_on.items() for _ in hostfile.problems_with_variables({name: value})}
    variables |= {name: value for name, value in passed_on.items() if name not in bad and name != "PYTHONPATH"}


def _not_passed_on(variables: dict[str, str]) -> Iterator[hostfile.Problem]:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name in os.environ and name not in variables:
            yield hostfile.Problem(f"environment: {name}", "is set here and would not reach the other hosts",
                                f"add the line {name}=... to .deepspeed_env")  # fmt: skip


def _ssh_options() -> str:
    """Return what is known here about ssh beyond its defaults; `ssh -G` also reads the files of the user and the system."""
    appended = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    shown = subprocess.run(["ssh", "-G", "any"], capture_output=True, text=True, check=False).stdout
    set_in_files = "serveraliveinterval" in shown and "serveraliveinterval 0\n" not in shown
    return appended + (" ServerAliveInterval" if set_in_files else "")


def _remote_findings(listed: list[Host], config: RunConfig | None, opening: dict[str, Any]) -> Iterator[Finding]:
    """Ask all hosts at once, first who they are, then whether they reach each other, then which backbone they hold."""
    with ThreadPoolExecutor(len(listed)) as pool:
        remotes = list(pool.map(_Remote, [host.name for host in listed]))
        try:
            openings = [opening | {"port": opening["port"] if not index else None} for index in range(len(remotes))]
            facts = list(pool.map(_Remote.ask, remotes, openings, [ANSWER_SECONDS] * len(remotes)))
            yield from (remote.finding() for remote in remotes)
            present = {host.name: known for host, known in zip(listed, facts, strict=True) if known is not None}
            for host in listed:
                if host.name in present:
                    yield from of_one_host(host, present[host.name], opening["port"])
            yield from compared(present)
            answering = [remote for remote in remotes if remote.host in present]
            peers = [[name, known["gloo"], known["port"]] for name, known in present.items() if known["gloo"]]
            reached = pool.map(
                lambda remote: remote.ask({"peers": [peer for peer in peers if peer[0] != remote.host]}, PEER_SECONDS), answering
            )
            yield from connections({remote.host: answer for remote, answer in zip(answering, reached, strict=True)}, present)
            if config is not None:
                path = mini.backbone_path(config.backbone.path)
                question = {"backbone": path, "revision": config.backbone.revision}
                hashes = list(pool.map(lambda remote: remote.ask(question, HASH_SECONDS), answering))
                yield from compared(
                    {remote.host: answer or {} for remote, answer in zip(answering, hashes, strict=True)}, ("backbone",)
                )
        finally:
            for remote in remotes:
                remote.close()


class _Remote:
    """The probe on one host, and the ssh that leads to it."""

    def __init__(self, host: str) -> None:
        self.host, self.problem, self._started = host, "", time.monotonic()
        self.seconds = 0.0
        options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *options, host]
        probe = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.quote(sys.executable)} -m bpt_dist.commands.check.probe"
        self._process = subprocess.Popen(
            [*ssh, probe], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the answer, or None and keep why there was none within `seconds`."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
            while line and not line.startswith("{"):  # what a login script prints
                line = self._lines.get(timeout=seconds)
        except (OSError, queue.Empty) as error:
            line, self.problem = "", f"no answer within {seconds:g} s" if isinstance(error, queue.Empty) else ""
        if line:
            self.seconds = self.seconds or time.monotonic() - self._started
            return json.loads(line)
        self._process.kill()
        lines = (self._process.stderr.read() if self._process.stderr else "").strip().splitlines()
        self.problem = self.problem or (lines[-1].strip() if lines else f"ssh ended with {self._process.wait()}")
        return None

    def finding(self) -> Finding:
        """Return whether the host answered its first question."""
        if not self.problem:
            return Finding(self.host, f"answers after {self.seconds:.1f} s")
        known = (remedy for sign, remedy in SSH_REMEDIES.items() if sign in self.problem)
        remedy = next(known, "is it up, and does `ssh {host}` work?").format(host=self.host)
        return Finding(self.host, f"does not answer ({self.problem})", remedy)

    def close(self) -> None:
        """End ssh and with it the probe, whose input ends."""
        self._process.kill()
        self._process.communicate()


class _Marker:
    """A file in the folder of the runs that every host must see: checkpoints are written by one rank and read by all."""

    def __init__(self, config: RunConfig | None) -> None:
        self._file = None if config is None else config.output.resolve() / f".check-{uuid.uuid4().hex}"

    def __enter__(self) -> str | None:
        if self._file is None:
            return None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
        except OSError as error:
            raise ConfigError(
                f"output: {self._file.parent} cannot be written ({error.strerror}); choose another output="
            ) from error
        return str(self._file)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
