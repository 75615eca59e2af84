"""`bpt-dist check --config` reads the texts of every task with the tokenizer of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run

from bpt_dist.commands.check.job import Finding, job_findings
from bpt_dist.config import RunConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    plain = tiny_run.settings(tiny_run.world(tmp_path), {"name": "prompt_tuning"})
    plain["data"] = {"target_tasks": ["mood"], "task_files": plain["data"]["task_files"], "cache": str(tmp_path / "cache")}
    return tiny_run.load(tmp_path, plain)


def finding(config: RunConfig, name: str = "task mood") -> Finding:
    (task_finding,) = (each for each in job_findings(config) if each.name == name)
    return task_finding


def rewrite(folder: Path, text: str, num_rows: int = 32) -> None:
    file = folder / "tasks" / "mood" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [{**row, "sentence": text} if index < num_rows else row for index, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in changed))


def test_known_text_adds_nothing(config: RunConfig) -> None:
    found = finding(config)
    assert found.remedy is None
    assert found.text == "32 train, 6 validation, 6 test rows, all valid"


def test_unknown_text_is_reported_with_field_and_words(config: RunConfig, tmp_path: Path) -> None:
    rewrite(tmp_path, "the zebra sat", num_rows=1)
    found = finding(config)
    assert found.remedy is None
    assert "field 'sentence' (" in found.text
    assert "% of train): 'zebra'" in found.text


def test_a_field_of_unknown_text_fails_the_check(config: RunConfig, tmp_path: Path) -> None:
    rewrite(tmp_path, "zebras gnaw")
    found = finding(config)
    assert found.remedy is not None
    assert "field 'sentence' (" in found.text
    assert "choose a backbone" in found.text


def test_label_words_that_the_tokenizer_cannot_tell_apart_fail_the_check(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "tasks" / "tasks.yaml"
    file.write_text(file.read_text().replace("[good, not good]", "[gut, schlecht]"))
    found = finding(config)
    assert found.remedy is not None
    assert "task 'mood': label_words: 'gut' becomes '<unk>'" in found.text


def test_rows_left_out_are_counted(config: RunConfig, tmp_path: Path) -> None:
    tasks, rows = tmp_path / "tasks" / "tasks.yaml", tmp_path / "tasks" / "mood" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"label": 1', '"label": -1', 3))
    assert "set `unlabelled: drop`" in finding(config).text
    tasks.write_text(tasks.read_text().replace("label_words: [good, not good]", "label_words: [good, not good], unlabelled: drop"))
    assert "29 train, 6 validation" in finding(config).text
    assert "left out 3 rows without a label (3 of train)" in finding(config).text
