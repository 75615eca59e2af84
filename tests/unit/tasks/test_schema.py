"""The schema of task files accepts what the reader accepts and underlines what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_run
import yaml

from bpt_dist.config.schema import SCHEMA, text_of
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.mini import TASKS
from bpt_dist.tasks.schema import tasks_schema
from bpt_dist.tasks.user_tasks import load_user_tasks

FILE = SCHEMA.parent / "tasks.schema.json"
README = SCHEMA.parents[1] / "README.md"
RIGHT = {"folder": "x", "fields": ["text"], "label": "stars", "label_words": ["bad", "good"], "metrics": ["accuracy"]}


def example_of_the_readme() -> dict[str, Any]:
    (block,) = (part.partition("```")[0] for part in README.read_text().split("```yaml\n")[1:] if part.startswith("reviews:"))
    return yaml.safe_load(block)


@pytest.mark.parametrize("tasks", [yaml.safe_load(TASKS.read_text()), yaml.safe_load(tiny_run.TASKS), example_of_the_readme()])
def test_task_files_of_the_project_fit(tasks: dict[str, Any], tmp_path: Path) -> None:
    jsonschema.validate(tasks, tasks_schema())
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    assert load_user_tasks([tmp_path / "tasks.yaml"])


@pytest.mark.parametrize(
    "change",
    [{"feilds": ["text"]}, {"hub": "a/b"}, {"target": "answer"}, {"metrics": ["acuracy"]}, {"metrics": []},
     {"label_words": ["bad"]},
     {"split": "random"}, {"unlabelled": "keep"}, {"empty_text": "skip"}, {"max_source_length": 1}, {"fields": []},
     {"label_words": None}, {"score": [1]}],
    ids=str,
)  # fmt: skip
def test_what_the_reader_refuses_is_underlined(change: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"mine": {key: value for key, value in {**RIGHT, **change}.items() if value is not None}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tasks, tasks_schema())
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    with pytest.raises(ConfigError):
        load_user_tasks([tmp_path / "tasks.yaml"])


def test_the_file_is_current() -> None:
    assert FILE.read_text() == text_of(tasks_schema()), "run: make schema"
    assert json.loads(FILE.read_text())["additionalProperties"]["properties"].keys() >= RIGHT.keys()
