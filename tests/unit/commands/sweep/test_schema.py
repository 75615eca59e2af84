"""The schema of sweep files: shipped sweeps fit and name it, typing errors are underlined, at any depth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from bpt_dist.commands.sweep.schema import sweep_schema
from bpt_dist.config.schema import SCHEMA, text_of

FOLDER = SCHEMA.parent / "sweep"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return sweep_schema()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_sweeps_fit_the_schema_they_name(path: Path, schema: dict[str, Any]) -> None:
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


def test_the_file_is_current(schema: dict[str, Any]) -> None:
    assert (FOLDER / "schema.json").read_text() == text_of(schema), "run: make schema"


@pytest.mark.parametrize(
    ("path", "value"),
    [("schedular", "asha"), ("scheduler", "hyperband"), ("run.source.stepz", 3), ("run.method.num_partcles", 3), ("run.seed", 1),
     ("run.name", "x"), ("space.method.lr_full", 0.1), ("space.method.lr_full", []),
     ("space.method.lr_full", {"log_unifrm": [1, 2]}),
     ("space.method.lr_full", {"uniform": [1]}), ("seeds", [])],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses_what_editors_should_underline(path: str, value: object, schema: dict[str, Any]) -> None:
    sweep = copy.deepcopy(yaml.safe_load((FOLDER / "sigma_lr.yaml").read_text()))
    place = sweep
    parts = path.split(".", 1) if path.startswith("space.") else path.split(".")
    for part in parts[:-1]:
        place = place[part]
    place[parts[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(sweep)
