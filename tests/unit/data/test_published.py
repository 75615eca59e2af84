"""Rows without a label and empty texts: one rule for files and the hub, counted, and named with the setting that decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bpt_dist.data import rows
from bpt_dist.errors import DataError
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.text_to_text import ROW_ID
from bpt_dist.tasks.user_tasks import load_user_tasks

NLI = "fields: [premise, hypothesis], label: label, label_words: [entailment, neutral, contradiction], metrics: [accuracy]"


def write(folder: Path, **splits: Sequence[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def nli(num_rows: int, **changed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rows; `r3={"label": -1}` changes row 3, a value of None removes the field."""
    lines = [{"premise": f"a man {i}", "hypothesis": f"a person {i}", "label": i % 3} for i in range(num_rows)]
    for key, values in changed.items():
        line = lines[int(key[1:])]
        line.update(values)
        lines[int(key[1:])] = {name: value for name, value in line.items() if value is not None}
    return lines


def spec(tmp_path: Path, place: str, more: str = "") -> TaskSpec:
    (tmp_path / "tasks.yaml").write_text(f"snli: {{{place}: {tmp_path / 'snli'}, {NLI}{more}}}")
    return load_user_tasks([tmp_path / "tasks.yaml"])["snli"]


PLACES = {"hub": ("hub", ""), "folder with drop": ("folder", ", unlabelled: drop")}


@pytest.mark.parametrize("place", PLACES)
def test_rows_without_a_label_are_left_out_and_counted(place: str, tmp_path: Path, options: Any) -> None:
    marked = nli(20, r3={"label": -1}, r7={"label": -1})
    write(tmp_path / "snli", train=marked, validation=nli(6, r0={"label": -1}), test=nli(6))
    splits = rows.load(spec(tmp_path, *PLACES[place]), options(cache=tmp_path / "cache"))
    assert {split: len(kept) for split, kept in splits.items()} == {"train": 18, "validation": 5, "test": 6}
    assert splits.notes == ("task 'snli': left out 3 rows without a label (2 of train, 1 of validation)",)
    assert [row[ROW_ID] for row in splits["train"]][2:4] == ["train:3", "train:5"]


def test_files_and_the_hub_give_the_same_rows(tmp_path: Path, options: Any) -> None:
    write(
        tmp_path / "snli",
        train=nli(30, r3={"label": -1}, r9={"hypothesis": ""}),
        validation=nli(8, r1={"label": -1}, r5={"premise": " "}),
        test=nli(8, r0={"label": -1}),
    )
    loaded = []
    for place in (("hub", ""), ("folder", ", unlabelled: drop, empty_text: keep")):
        loaded.append(rows.load(spec(tmp_path, *place), options(cache=tmp_path / "cache", max_train_rows=12)))
    assert loaded[0] == loaded[1]
    assert loaded[0].notes == loaded[1].notes
    assert len(loaded[0].notes) == 2
    assert "2 empty text fields in the published data were kept" in loaded[0].notes[1] or "1 empty" in loaded[0].notes[1]


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_rows_with_an_empty_text_can_be_left_out(place: str, tmp_path: Path, options: Any) -> None:
    write(tmp_path / "snli", train=nli(20, r4={"premise": ""}, r5={"hypothesis": "\t"}), validation=nli(6), test=nli(6))
    splits = rows.load(spec(tmp_path, place, ", empty_text: drop"), options(cache=tmp_path / "cache"))
    assert len(splits["train"]) == 18
    assert splits.notes == ("task 'snli': left out 2 rows with an empty text (2 of train)",)


@pytest.mark.parametrize("changed", [{"label": -1}, {"label": None}, {"label": "-"}, {"label": ""}])
def test_a_users_own_row_without_a_label_is_named_with_the_setting(changed: dict[str, Any], tmp_path: Path, options: Any) -> None:
    write(tmp_path / "snli", train=nli(20, r3=changed), validation=nli(6), test=nli(6))
    with pytest.raises(DataError, match=r"train\.jsonl:4: field 'label' is") as error:
        rows.load(spec(tmp_path, "folder"), options())
    assert "set `unlabelled: drop` in the task file" in str(error.value)
    assert "empty_text" not in str(error.value)
    assert len(rows.load(spec(tmp_path, "folder", ", unlabelled: drop"), options())["train"]) == 19


def test_a_users_own_empty_text_is_named_with_the_setting(tmp_path: Path, options: Any) -> None:
    write(tmp_path / "snli", train=nli(20, r3={"premise": " "}), validation=nli(6), test=nli(6))
    with pytest.raises(DataError, match=r"train\.jsonl:4: field 'premise' is empty") as error:
        rows.load(spec(tmp_path, "folder"), options())
    assert "set `empty_text: keep` or `empty_text: drop`" in str(error.value)
    assert len(rows.load(spec(tmp_path, "folder", ", empty_text: keep"), options())["train"]) == 20


@pytest.mark.parametrize(("label", "message"), [(3, "is 3"), ("neutral", "is .neutral."), (True, "is true"), (-2, "is -2")])
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_wrong_label_is_no_missing_label(place: str, label: Any, message: str, tmp_path: Path, options: Any) -> None:
    changed = nli(20, r3={"label": label})
    if place == "hub":  # a data set has one type a column
        changed = [{**row, "label": row["label"] if isinstance(label, int) else str(row["label"])} for row in changed]
    write(tmp_path / "snli", train=changed, validation=nli(6), test=nli(6))
    if place == "hub" and label is True:
        pytest.skip("a column of the hub does not mix booleans and numbers")
    with pytest.raises(DataError, match=f"field 'label' {message}" if place == "folder" else "field 'label' is"):
        rows.load(spec(tmp_path, place, ", unlabelled: drop"), options(cache=tmp_path / "cache"))


def test_minus_one_may_be_a_label(tmp_path: Path, options: Any) -> None:
    write(tmp_path / "snli", train=nli(21, r0={"label": -1}), validation=nli(6), test=nli(6))
    (tmp_path / "tasks.yaml").write_text(
        f"snli: {{folder: {tmp_path / 'snli'}, fields: [premise], label: label, unlabelled: drop, metrics: [accuracy],"
        " label_words: {-1: worse, 0: same, 1: better, 2: best}}"
    )
    splits = rows.load(load_user_tasks([tmp_path / "tasks.yaml"])["snli"], options())
    assert (len(splits["train"]), splits.notes) == (21, ())


@pytest.mark.parametrize("place", PLACES)
def test_a_test_split_without_labels_counts_as_missing(place: str, tmp_path: Path, options: Any) -> None:
    blind = [{**row, "label": -1} for row in nli(6)]
    write(tmp_path / "snli", train=nli(40), validation=nli(9), test=blind)
    splits = rows.load(spec(tmp_path, *PLACES[place]), options(cache=tmp_path / "cache"))
    assert {split: len(kept) for split, kept in splits.items()} == {"train": 36, "validation": 4, "test": 9}
    assert "no row of test" in splits.notes[0]
    assert "a tenth of train" in splits.notes[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_missing_test_split_is_treated_alike(place: str, tmp_path: Path, options: Any) -> None:
    write(tmp_path / "snli", train=nli(40), validation=nli(9))
    splits = rows.load(spec(tmp_path, *PLACES[place]), options(cache=tmp_path / "cache"))
    assert {split: len(kept) for split, kept in splits.items()} == {"train": 36, "validation": 4, "test": 9}
    assert "no test" in splits.notes[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_name_of_the_label_column_is_refused(place: str, tmp_path: Path, options: Any) -> None:
    write(tmp_path / "snli", train=nli(40), validation=nli(9), test=nli(9))
    task = spec(tmp_path, *PLACES[place])
    text = (tmp_path / "tasks.yaml").read_text().replace("label: label,", "label: gold,")
    (tmp_path / "tasks.yaml").write_text(text)
    task = load_user_tasks([tmp_path / "tasks.yaml"])["snli"]
    with pytest.raises(DataError, match="column 'gold'"):
        rows.load(task, options(cache=tmp_path / "cache"))


def test_the_published_qqp_is_used_from_a_folder_as_from_the_hub(
    tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two published training rows of QQP have an empty question; rows of the catalogue are not the user's to fix."""
    import datasets

    lines = [{"question1": f"q {i}", "question2": "" if i == 7 else f"p {i}", "label": i % 2, "idx": i} for i in range(40)]
    write(tmp_path / "glue" / "qqp", train=lines, validation=lines)
    local = rows.load(TASKS["qqp"], options(root=tmp_path))
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **named: datasets.Dataset.from_list(lines))
    hub = rows.load(TASKS["qqp"], options())
    assert local == hub
    assert local.notes == hub.notes == ("task 'qqp': 2 empty text fields in the published data were kept",)
    assert sum(len(kept) for kept in local.values()) == 80


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": -1.0, "idx": 99}),
        ("squad", {"id": "x", "context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}),
        ("winogrande", {"sentence": "the _ ran", "option1": "a", "option2": "b", "answer": ""}),
        ("openbookqa", {"id": "x", "question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": ""}),
    ],
)
def test_every_kind_of_task_has_its_marks_of_a_missing_label(name: str, row: dict[str, Any]) -> None:
    from bpt_dist.data.row_checks import UNLABELLED, left_out, row_problems

    assert left_out(TASKS[name], row) == UNLABELLED
    own = TASKS[name].with_folder(Path("x"))
    assert left_out(own, row) is None
    assert row_problems(own, row)
