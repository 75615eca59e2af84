"""Tasks from rows in memory: refused at once with the place of every fault, and written as the files everybody reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from bpt_dist.errors import ConfigError, DataError
from bpt_dist.library.task import Task, write_tasks
from bpt_dist.tasks.user_tasks import load_user_tasks

ROWS = [{"text": f"the cat {number}", "label": number % 2} for number in range(4)]
SETTINGS: dict[str, Any] = {"fields": ["text"], "label": "label", "label_words": ["bad", "good"]}


def task(train: Any = ROWS, name: str = "mood", **changes: Any) -> Task:
    return Task(name, train, ROWS[:2], **{**SETTINGS, **changes})


def test_it_is_written_as_a_task_file_with_its_rows(tmp_path: Path) -> None:
    given = task(label_words={0: "no", 1: "good"}, metrics=("accuracy", "f1"))
    (file,) = write_tasks([given], tmp_path)
    (spec,) = load_user_tasks([file]).values()
    assert (spec.name, spec.label_words, spec.label_values, spec.metrics) == ("mood", ("no", "good"), (0, 1), ("accuracy", "f1"))
    assert spec.folder is not None
    for split, rows in (("train", ROWS), ("validation", ROWS[:2])):
        assert [json.loads(line) for line in (spec.folder / f"{split}.jsonl").read_text().splitlines()] == rows
    assert not (spec.folder / "test.jsonl").exists()


def test_the_same_rows_go_to_the_same_place_and_others_to_another(tmp_path: Path) -> None:
    first, again = task(), task([dict(row) for row in ROWS])
    assert first.write(tmp_path) == again.write(tmp_path)
    others = [task(ROWS[:3]), task(label_words=["worse", "good"]), task(name="other")]
    places = {str(one.write(tmp_path)) for one in (first, *others)}
    assert len(places) == 4
    for one in (first, *others):
        assert list(load_user_tasks([one.write(tmp_path)])) == [one.name]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    given = task([{"text": "a b", "label": numpy.int64(1)}])
    assert json.loads(given.lines["train"][0]) == {"text": "a b", "label": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "train[1]: field 'label' is missing"),
        ({"label": 1}, "train[1]: field 'text' is missing"),
        ({"text": "a", "label": 7}, "train[1]: field 'label' is 7; task 'mood' has labels 0 (bad), 1 (good)"),
        ({"text": "a", "label": True}, "train[1]: field 'label' is true"),
        ({"text": "  ", "label": 1}, "train[1]: field 'text' is empty"),
        ({"text": 3, "label": 1}, "train[1]: field 'text' is 3; it must be a text"),
        ({"text": "a", "label": 1, "more": float("nan")}, "train[1]: NaN is not JSON"),
        ({"text": "a", "label": 1, "more": object()}, "train[1]: holds a value that is no text, number, list or mapping (object)"),
        ("a text", "train[1]: a row must be a mapping from column to value, this is str"),
        ({"text": "\ud800", "label": 1}, "train[1]: "),
    ],
)
def test_bad_rows_are_named_by_their_place(row: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        task([ROWS[0], row])
    assert said in str(caught.value)
    assert str(caught.value).startswith("task 'mood': 1 bad row, nothing was trained; fix the rows")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fields": []}, "task 'mood'.fields: list the columns of the source text in their order"),
        ({"label_words": ["one"]}, "task 'mood'.label_words: list the target text of at least two classes"),
        ({"feilds": ["text"]}, "task 'mood'.feilds: unknown key; did you mean 'fields'?"),
        ({"metrics": ["rouge"]}, "task 'mood'.metrics: 'rouge' does not fit this task"),
        ({"folder": "rows"}, "task 'mood'.folder: says where rows are, and these are in memory; remove it"),
        ({"name": "Mood!"}, "task 'Mood!': task names are lower-case letters"),
    ],
)
def test_settings_that_describe_no_task_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task(**changes)
    assert said in str(caught.value)


def test_rows_that_a_task_leaves_out_are_no_fault() -> None:
    assert len(task([*ROWS, {"text": "a", "label": None}], unlabelled="drop").lines["train"]) == 5


def test_no_rows_and_two_tasks_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train: there are no rows"):
        task([])
    with pytest.raises(ConfigError, match="two of them are named 'mood'"):
        write_tasks([task(), task()], tmp_path)
