"""Paths and overrides that a launcher passes through the shells of several hosts, some of them unquoted: read strictly."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bpt_dist.errors import ConfigError

# Without "%": pdsh replaces %h, %n and %u.
_OUTSIDE_PATH = re.compile(r"[^A-Za-z0-9_./+-]")
_OUTSIDE_ARGUMENT = re.compile(r"[^A-Za-z0-9_./+,:@=-]")


def problem_with_path(path: str) -> str | None:
    """Return what the launcher, which does not quote it, must not meet in a path; None for a good one."""
    outside = _OUTSIDE_PATH.search(path)
    if outside is None:
        return None if path and not path.startswith("-") else "is no path"
    return f"contains {outside[0]!r}, which a shell would act on; use letters, digits and _./+-"


def check_words(paths: Sequence[tuple[str, str]], overrides: Sequence[str]) -> None:
    """Raise ConfigError when a path, given with what it is, or an override contains what a shell on the hosts would act on."""
    problems = [f"{what} {path}: {problem}" for what, path in paths if (problem := problem_with_path(path)) is not None]
    for override in overrides:
        outside = _OUTSIDE_ARGUMENT.search(override)
        if outside is not None or not re.match(r"[A-Za-z_]", override):
            character = repr(outside[0] if outside else override[:1])
            problems.append(
                f"{override.partition('=')[0][:40]!r}: contains {character}, which a shell would act on; put it into a YAML file"
            )
    if problems:
        raise ConfigError("\n".join(problems))
