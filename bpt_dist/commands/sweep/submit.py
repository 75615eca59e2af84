"""Hand a sweep to a Ray cluster: a job whose driver is `launcher/sweep.py` itself, on the cluster."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from bpt_dist.commands.sweep.settings import Sweep
from bpt_dist.config.mlflow_environment import usable_variables
from bpt_dist.config.overrides import OVERRIDE
from bpt_dist.config.sections import LOCAL_HOSTS
from bpt_dist.distributed.environment import home_folder
from bpt_dist.errors import ConfigError, StorageError

ROOT = Path(__file__).parents[3]
LEFT_AT_HOME = (
    "/.git/",
    "/.venv/",
    "/runs/",
    "/build/",
    "**/__pycache__/",
    "*.db",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
)
PASSED_ON = ("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "DS_ACCELERATOR")
"""Variables that a job inherits. No secret is among them: jobs and their environments are listed to everybody on the cluster."""
STARTING_SECONDS = 60.0
ENDED = {"SUCCEEDED": 0, "STOPPED": 75, "FAILED": 70}


def submit(sweep: Sweep, file: Path, overrides: Sequence[str], address: str, *, resume: bool, follow: bool) -> int:
    """Submit the sweep as a job, print how to look after it, and return 0 (with `follow`, what the job ended with).

    The folders that the sweep names must be the same on all nodes. Raises ConfigError for an address that is not safe to talk to,
    StorageError for one that does not answer.
    """
    check_address(address)
    config = ROOT / "configs"
    if not file.resolve().is_relative_to(ROOT):
        raise ConfigError(f"--config: {file} is outside {ROOT}, which is what travels to the cluster; put it below {config}")
    entrypoint = command(sweep, file, overrides, resume=resume)
    client = _client(address)
    job = f"{sweep.settings.name}-{secrets.token_hex(3)}"
    _hand_over(client, address, job, entrypoint, usable_variables(sweep.example().tracking))
    auth = "RAY_AUTH_MODE=token " if _has_token() else ""
    typer.echo(f"submitted {job}: {entrypoint}")
    for verb in ("status", "logs --follow", "stop"):
        typer.echo(f"  {auth}ray job {verb} --address {address} {job}")
    return _follow(client, job) if follow else 0


def _hand_over(client: Any, address: str, job: str, entrypoint: str, tracking: Mapping[str, str]) -> None:
    """Submit the job with the variables `tracking`; a cluster that has just been started may ask to try again."""
    variables = {"PYTHONPATH": ".", **{name: os.environ[name] for name in PASSED_ON if name in os.environ}, **tracking}
    environment = {"working_dir": str(ROOT), "excludes": list(LEFT_AT_HOME), "env_vars": variables}
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            client.submit_job(submission_id=job, entrypoint=entrypoint, runtime_env=environment)
            return
        except RuntimeError as error:
            if "try again" not in str(error) or time.monotonic() > deadline:
                raise StorageError(f"--submit: {address} did not take the job ({_first_line(error)})") from error
            time.sleep(2)


def command(sweep: Sweep, file: Path, overrides: Sequence[str], *, resume: bool) -> str:
    """Return the command line of the job: paths that are relative here are made absolute, for the job runs in a copy elsewhere."""
    run = sweep.settings.run
    made_absolute = ("output", "source.posterior", "posterior", "data.root", "root")
    arguments = [override for override in overrides if override.partition("=")[0] not in made_absolute]
    arguments.append(f"output={sweep.settings.output.resolve()}")
    for section, key in (("source", "posterior"), ("data", "root")):
        value = (run.get(section) or {}).get(key)
        if value is not None:
            arguments.append(f"{section}.{key}={Path(value).expanduser().resolve()}")
    for argument in arguments:
        if not OVERRIDE.fullmatch(argument):
            raise ConfigError(
                f"--submit: {argument!r} holds a character that no key=value may hold; rename that folder, or give paths that are "
                "absolute in the sweep file and the same on all nodes"
            )
    arguments = ["python", "launcher/sweep.py", "--config", str(file.resolve().relative_to(ROOT)), *arguments]
    return shlex.join([*arguments, *(["--resume"] if resume else [])])


def check_address(address: str) -> None:
    """Raise ConfigError unless the address is on this machine, or a token protects what is sent to it."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--submit: {address!r} is no address of a Ray dashboard; write http://HOST:8265")
    if parts.username or parts.password:
        raise ConfigError(
            "--submit: the address holds credentials (value withheld); put the token into ~/.ray/auth_token, mode 0600"
        )
    if parts.hostname in LOCAL_HOSTS:
        return
    if os.environ.get("RAY_AUTH_MODE") != "token" or not _has_token():
        raise ConfigError(
            f"--submit: {parts.hostname} is another host, and anybody who reaches an open Ray can run anything there; start the "
            "cluster with RAY_AUTH_MODE=token, put its token into ~/.ray/auth_token (mode 0600) and set RAY_AUTH_MODE=token here"
        )


def _has_token() -> bool:
    home = home_folder()
    kept = Path(os.environ["RAY_AUTH_TOKEN_PATH"]) if "RAY_AUTH_TOKEN_PATH" in os.environ else home and home / ".ray" / "auth_token"
    return "RAY_AUTH_TOKEN" in os.environ or (kept is not None and kept.is_file())


def _client(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it names every file that stays at home
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"--submit: {address} asks for its token ({_first_line(error)}); set RAY_AUTH_MODE=token and put the token into "
            "~/.ray/auth_token, mode 0600"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # nobody, or somebody else
        raise StorageError(f"--submit: no Ray answers at {address} ({_first_line(error)}); is the cluster up?") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _follow(client: Any, job: str) -> int:
    """Show the output of the job until it ends and return its exit code."""
    import asyncio

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            typer.echo(lines, nl=False)

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        typer.echo(f"{job} continues without this terminal")
        return 0
    info = client.get_job_info(job)
    code = info.driver_exit_code
    return int(code) if code is not None else ENDED.get(str(info.status), 70)
