"""Which versions and which commit a run was made with."""

from __future__ import annotations

import contextlib
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("bpt_dist", "torch", "transformers", "deepspeed", "datasets", "mlflow", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a result."""
    by_package = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            by_package[package] = metadata.version(package)
    return by_package


def git_state() -> dict[str, Any] | None:
    """Return commit and whether the tree differs from it, or None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def own_version() -> str:
    """Return the version of this package, of a checkout that is not installed "0+unknown"."""
    try:
        return metadata.version("bpt_dist")
    except metadata.PackageNotFoundError:
        return "0+unknown"
