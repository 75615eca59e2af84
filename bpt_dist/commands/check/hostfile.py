"""What the deepspeed launcher is given for several hosts: hostfile, exported variables, command line; read strictly.

The launcher passes all of it through a shell on every host, some of it unquoted, and takes `$(command) slots=2` for a host.
Whatever a shell could act on is refused here, before it is used.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bpt_dist.config.shell_words import check_words
from bpt_dist.errors import ConfigError

EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""Prefixes of the variables that the launcher passes on (NCCL where it finds GPUs); all others need `.deepspeed_env`."""
MOST_SLOTS = 1024
DEFAULT_PORT = 29500
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*")
_LINE = re.compile(r"(\S+)\s+slots=(\d{1,5})")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OUTSIDE_VALUE = re.compile(r"[^A-Za-z0-9_./+,:@= -]")
_SECRET_NAME = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL)S?(_|$)")
_SECRET_VALUE = re.compile(r"://[^/@\s]+@")


class Host(NamedTuple):
    """One line of a hostfile."""

    name: str
    slots: int


class Problem(NamedTuple):
    """Something that must not be passed on, without its value, which may be a secret."""

    place: str
    text: str
    remedy: str


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts in order; `#` begins a comment line.

    Raises ConfigError whose lines name every problem: `file:line: what is wrong (got VALUE); remedy`.
    """
    hosts: list[Host] = []
    problems: list[str] = []
    for number, line in _lines(path, "hostfile"):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        problem = _problem_with_host(match, [host.name for host in hosts])
        if problem is not None:
            problems.append(f"{path}:{number}: {problem} (got {line[:80]!r}); write `name slots=n`")
        elif match is not None:
            hosts.append(Host(match[1], int(match[2])))
    if not (hosts or problems):
        problems.append(f"{path}: lists no host; write one line `name slots=n` for each")
    if problems:
        raise ConfigError("\n".join(problems))
    return hosts


def _problem_with_host(match: re.Match[str] | None, seen: Sequence[str]) -> str | None:
    if match is None:
        return "is no host"
    name, slots = match[1], int(match[2])
    if re.fullmatch(r"[\d.]+", name) or ":" in name:
        try:
            if ipaddress.ip_address(name).version != 4:  # noqa: PLR2004
                return "pdsh takes no IPv6 address, give a name that resolves to it"
        except ValueError:
            return "is no address"
    elif not _NAME.fullmatch(name):
        return "is no DNS name"
    if name in seen:
        return f"lists {name} a second time"
    return None if 1 <= slots <= MOST_SLOTS else f"slots must be 1 to {MOST_SLOTS}"


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environment` that the launcher passes to the other hosts by itself."""
    return {name: value for name, value in environment.items() if name.startswith(EXPORTED)}


def problems_with_variables(variables: Mapping[str, str], place: str = "environment") -> Iterator[Problem]:
    """Yield what must not travel on a command line: characters a shell acts on, and secrets, which `ps` would show."""
    for name, value in variables.items():
        where = f"{place}: {name}"
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
            yield Problem(where, "holds a secret, which the launcher writes into its log and into the process list of every host",
                          f"unset {name}; store it in a file on each host that only you can read")  # fmt: skip
        elif outside := _OUTSIDE_VALUE.search(value):
            yield Problem(where, f"contains {outside[0]!r}, which pdsh or the shell of a host would act on",
                          f"unset {name}, or give it a value of letters, digits and _./+,:@=-")  # fmt: skip


def read_environment_file(path: Path) -> tuple[dict[str, str], list[Problem]]:
    """Return the variables of a `.deepspeed_env` file and its problems; the launcher stops at a comment or blank line."""
    variables: dict[str, str] = {}
    problems: list[Problem] = []
    for number, line in _lines(path, ".deepspeed_env"):
        key, equals, value = line.partition("=")
        if not equals or not _KEY.fullmatch(key):
            kind = "a blank line" if not line else "a comment" if line.startswith("#") else "no KEY=VALUE"
            problems.append(Problem(f"{path}:{number}", f"is {kind}, at which the launcher stops", "remove the line"))
        else:
            problems += problems_with_variables({key: value}, f"{path}:{number}")
            variables[key] = value
    return variables, problems


def command(hostfile: Path, config: Path, overrides: Sequence[str], num_slots: int, port: int = DEFAULT_PORT) -> str:
    """Return the command that starts the job on all hosts and says how many processes it expects.

    Raises ConfigError when a path or an override contains what a shell on the hosts would act on.
    """
    check_words([("hostfile", str(hostfile)), ("configuration", str(config))], overrides)
    expected = f"distribution.expect_world_size={num_slots}"
    known = [expected] if not any("expect_world_size=" in override for override in overrides) else []
    port_option = [] if port == DEFAULT_PORT else ["--master_port", str(port)]
    arguments = [
        "deepspeed",
        "--hostfile",
        str(hostfile),
        *port_option,
        "launcher/train.py",
        "--config",
        str(config),
        *overrides,
        *known,
    ]
    return f'PDSH_SSH_ARGS_APPEND="{KEEP_ALIVE}" {shlex.join(arguments)}'


def _lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigError(f"{path}: the {what} cannot be read ({reason}); give another path") from error
    for number, line in enumerate(text.splitlines(), 1):
        yield number, line.strip()
