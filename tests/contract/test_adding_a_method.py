"""The method in docs/adding_a_method.md is a method: one new file, held to the whole contract, with nothing else changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bpt_dist import config as configuration

REPOSITORY = Path(__file__).parents[2]
NAME = "residual_prompt"


def blocks(language: str) -> list[str]:
    text = (REPOSITORY / "docs" / "adding_a_method.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import the package from in which one file was added."""
    folder = tmp_path_factory.mktemp("newcomer")
    methods = folder / "bpt_dist" / "methods"
    methods.mkdir(parents=True)
    for place, own in ((REPOSITORY / "bpt_dist", methods.parent), (REPOSITORY / "bpt_dist" / "methods", methods)):
        for entry in place.iterdir():
            if entry.name not in ("methods", "__pycache__"):
                (own / entry.name).symlink_to(entry)
    (snippet,) = blocks("python")
    (methods / f"{NAME}.py").write_text(snippet)
    return folder


def test_the_snippet_is_in_the_style_of_the_project(package: Path) -> None:
    file = package / "bpt_dist" / "methods" / f"{NAME}.py"
    for check in (["check"], ["format", "--check"]):
        ruff = [str(Path(sys.executable).with_name("ruff")), *check, "--config", str(REPOSITORY / "pyproject.toml"), str(file)]
        assert subprocess.run(ruff, capture_output=True, check=False).returncode == 0, check


def test_the_shown_configuration_is_valid(package: Path, tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(text)
    found = configuration.load(tmp_path / "config.yaml", methods=package / "bpt_dist" / "methods")
    assert found.method.name == NAME
    assert yaml.safe_load(text)["method"]["bottleneck"] == found.method.bottleneck


def test_the_snippet_passes_the_contract(package: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(REPOSITORY)]
    command += ["-c", str(REPOSITORY / "pyproject.toml"), str(REPOSITORY / "tests" / "contract" / "test_methods.py"), "-k", NAME]
    # From the folder of the newcomer, whose package comes before the installed one.
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 11, done.stdout[-3000:]
