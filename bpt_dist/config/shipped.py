"""The configurations that come with the package: `configs/` of a checkout, or the copy of it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Return the folder of the shipped configurations."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the shipped configurations, in order, as paths below their folder."""
    return sorted(file.relative_to(folder()).as_posix() for file in folder().rglob("*.yaml"))


def purpose(name: str) -> str:
    """Return the first sentence of the comment that a shipped configuration begins with; empty without one."""
    lines = (folder() / name).read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("#").strip() for line in lines if line.startswith("#") and "yaml-language-server" not in line)
    return next(comments, "")
