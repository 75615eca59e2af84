"""What the package imports is what it asks for: a package that only comes with another one may leave with its next version."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OURS = {"bpt_dist", "launcher"}
# Packages called otherwise than what holds them, and not installed everywhere.
HOLDERS = {"pynvml": ["nvidia-ml-py"], "pyro": ["pyro-ppl"]}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return {normalised(Requirement(text).name) for text in texts}


def imported() -> dict[str, str]:
    """Return each top-level package of others -> the first file that imports it, also in functions and for types only."""
    found: dict[str, str] = {}
    for file in sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            for name in names:
                found.setdefault(name.partition(".")[0], file.relative_to(ROOT).as_posix())
    return {name: file for name, file in found.items() if name not in OURS | sys.stdlib_module_names}


def test_everything_imported_is_declared() -> None:
    known, asked = {**HOLDERS, **packages_distributions()}, declared()
    found = imported()
    assert {"torch", "yaml", "requests"} <= found.keys()
    missing = {name: file for name, file in found.items() if asked.isdisjoint(map(normalised, known.get(name, [name])))}
    assert missing == {}
