"""`bpt-dist check`: one line for everything a job needs, ok or FAIL with what to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bpt_dist import config as configuration
from bpt_dist.commands.check.job import Finding, attempt, job_findings, report
from bpt_dist.commands.check.loopback import RANKS
from bpt_dist.distributed.environment import free_port
from bpt_dist.storage.file_system import nearest_folder, what_is_missing

PACKAGE = "bpt_dist"
LEAST_FREE_BYTES = 1 << 30
LOOPBACK_SECONDS = 60


def check_all(path: Path | None, overrides: Sequence[str], *, as_json: bool = False) -> bool:
    """Run every check, print a line for each, and return whether all passed."""
    return report(_findings(path, overrides), as_json=as_json)


def _findings(path: Path | None, overrides: Sequence[str]) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    # Two processes that import torch take a while: they work while the other checks do.
    with _Loopback() as loopback:
        yield _devices()
        yield _deepspeed()
        yield _schema()
        config = None
        if path is not None:
            finding, config = attempt("configuration", lambda: configuration.load(path, overrides))
            yield finding
        yield _output(Path("runs") if config is None else config.directory)
        yield _cache(None if config is None else config.data.cache)
        if config is not None:
            yield from job_findings(config)
        yield loopback.finding()


def _python() -> Finding:
    needed = metadata.metadata(PACKAGE)["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", f"{version} ({sys.executable})", None if version in SpecifierSet(needed) else f"needs {needed}")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with the bounds of pyproject.toml; extras are optional."""
    count, wrong = 0, []
    for requirement in map(Requirement, metadata.requires(PACKAGE) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(Finding(requirement.name, "is not installed", f"pip install '{requirement}'"))
            continue
        # A local build (2.13.0+cpu) is the version it was built from.
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append(Finding(requirement.name, f"is {version}", f"pip install '{requirement}'"))
    yield from wrong
    yield Finding("packages", f"{count - len(wrong)} of {count} within the bounds of {PACKAGE} {metadata.version(PACKAGE)}",
                  "install those named above" if wrong else None)  # fmt: skip


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("devices", f"no GPU, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads; backend gloo")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    remedy = None if torch.distributed.is_nccl_available() else "install a torch with nccl"
    return Finding("devices", f"{len(names)} GPU(s): {', '.join(sorted(set(names)))}; backend nccl", remedy)


def _deepspeed() -> Finding:
    """Import DeepSpeed in a process of its own: it takes seconds, and what it prints or breaks stays there."""
    command = [sys.executable, "-c", "import deepspeed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    version = metadata.version("deepspeed")
    if done.returncode == 0:
        return Finding("deepspeed", f"{version} imports")
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return Finding(
        "deepspeed", f"{version} does not import ({reason})", "reinstall it; on a machine without GPU set DS_ACCELERATOR=cpu"
    )


def _schema() -> Finding:
    from bpt_dist.config.schema import SCHEMA, schema_text

    if not SCHEMA.is_file():
        return Finding("schema", "not a checkout, nothing to compare")
    current = SCHEMA.read_text(encoding="utf-8") == schema_text()
    return Finding("schema", str(SCHEMA), None if current else f"is not that of these settings: bpt-dist schema {SCHEMA}")


def _output(folder: Path) -> Finding:
    """Write into the folder of the run, or where it would be made, and try what a run asks of a file system."""
    place = nearest_folder(folder.resolve() / "run")
    try:
        missing = what_is_missing(place)
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding("output", f"{place} cannot be written ({error.strerror})", "choose another output=")
    text = f"{place} can be written, {free / 2**30:.1f} GiB free"
    text += "".join(f"; without {name} ({reason})" for name, reason in missing.items())
    if "hard links" in missing:  # run.lock is one
        return Finding("output", text, "choose another output= on a file system with hard links")
    return Finding("output", text, None if free > LEAST_FREE_BYTES else "free some space or choose another output=")


def _cache(given: Path | None) -> Finding:
    """Find the folder of what is prepared once: rows, tokens, the miniature world."""
    from bpt_dist.data.prepare import default_cache

    finding, folder = attempt("cache", lambda: given or default_cache())
    if folder is None:
        return finding
    place = nearest_folder(folder / "x")
    good = os.access(place, os.W_OK | os.X_OK)
    return Finding(
        "cache", f"{folder} can{'' if good else 'not'} be written", None if good else "set data.cache= to another folder"
    )


class _Loopback:
    """Two processes that add their ranks over gloo on this machine, as the ranks of a job would."""

    def __enter__(self) -> _Loopback:
        port = free_port()
        command = [sys.executable, "-m", "bpt_dist.commands.check.loopback", str(port), str(LOOPBACK_SECONDS)]
        self.processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for rank in range(RANKS)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def finding(self) -> Finding:
        """Wait for both and return the outcome."""
        remedy = "set GLOO_SOCKET_IFNAME to an interface that is up; does this host's name resolve?"
        try:
            errors = [process.communicate(timeout=2 * LOOPBACK_SECONDS)[1] for process in self.processes]
        except subprocess.TimeoutExpired:
            return Finding("processes", f"no answer within {2 * LOOPBACK_SECONDS} s", remedy)
        failed = [text for process, text in zip(self.processes, errors, strict=True) if process.returncode]
        if failed:
            return Finding("processes", f"an all-reduce of {RANKS} processes failed ({failed[0].strip().splitlines()[-1]})", remedy)
        return Finding("processes", f"an all-reduce of {RANKS} gloo processes on this machine")
