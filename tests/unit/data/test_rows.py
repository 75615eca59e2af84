"""Rows are those behind the published tables, whatever file or hub they come from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bpt_dist.data import rows
from bpt_dist.data.splits import shuffled
from bpt_dist.errors import DataError
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.text_to_text import ROW_ID

PUBLISHED_TESTS = {"rte": (138, 139), "mrpc": (204, 204), "wic": (319, 319), "cb": (28, 28), "wsc": (52, 52), "sst2": (1000, 872)}


@pytest.mark.parametrize("task", PUBLISHED_TESTS)
def test_the_whole_validation_splits_of_the_pack_give_the_published_sizes(task: str, data_root: Path, options: Any) -> None:
    splits = rows.load(TASKS[task], options(root=data_root))
    validation, test = PUBLISHED_TESTS[task]
    assert len(splits["test"]) == test
    assert task == "sst2" or len(splits["validation"]) == validation  # the pack has 4,000 of its training rows


def test_the_wsc_halves_hold_the_rows_behind_the_published_majority(data_root: Path, options: Any) -> None:
    """67.3 in many published rows is 35 of 52 'False': only the published shuffle puts 35 of the 66 into the test half."""
    splits = rows.load(TASKS["wsc"], options(root=data_root))
    assert [sum(row["label"] == 0 for row in splits[split]) for split in ("validation", "test")] == [31, 35]


def test_row_ids_say_where_a_row_stands_and_are_unique(rte: TaskSpec, rte_folder: Path, options: Any) -> None:
    splits = rows.load(rte, options())
    ids = [row[ROW_ID] for split in splits.values() for row in split]
    assert len(set(ids)) == len(ids) == 51
    lines = (rte_folder / "validation.jsonl").read_text().splitlines()
    for row in splits["test"]:
        assert json.loads(lines[int(row[ROW_ID].removeprefix("validation:")) - 1])["idx"] == row["idx"]


def own_task(folder: Path) -> TaskSpec:
    return TaskSpec(
        name="own", summary="", kind="classification", metrics=("accuracy",), fields=TASKS["rte"].fields,
        label_words=("no", "yes"), label_values=(0, 1), folder=folder,
    )  # fmt: skip


def test_a_missing_test_split_is_carved_and_said(rte_folder: Path, options: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        splits = rows.load(own_task(rte_folder), options())
    assert {split: len(kept) for split, kept in splits.items()} == {"train": 36, "validation": 4, "test": 11}
    assert splits.notes == tuple(record.message for record in caplog.records)
    assert "no test.jsonl: a tenth of train" in splits.notes[0]


def test_official_splits_are_taken_as_they_are(rte_folder: Path, options: Any) -> None:
    (rte_folder / "test.jsonl").write_text((rte_folder / "validation.jsonl").read_text())
    splits = rows.load(own_task(rte_folder), options())
    assert [row["idx"] for row in splits["train"]] == list(range(40))
    assert [row["idx"] for row in splits["test"]] == list(range(11))
    assert not splits.notes


def test_caps_take_the_first_of_a_shuffle(rte: TaskSpec, options: Any) -> None:
    capped = rows.load(rte, options(max_train_rows=5, max_eval_rows=2))
    assert [row["idx"] for row in capped["train"]] == shuffled(40, 42)[:5]
    whole = rows.load(rte, options())
    assert all(capped[split] == whole[split][:2] for split in ("validation", "test"))  # halves are shuffled already
    assert rows.load(rte, options(max_train_rows=1000))["train"] == rows.load(rte, options())["train"]


def test_shots_are_drawn_for_every_class_by_the_seed(rte: TaskSpec, options: Any) -> None:
    draws = [[row["idx"] for row in rows.load(rte, options(shots=4), seed=seed)["train"]] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert sorted(index % 2 for index in draws[0]) == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match=r"data\.shots is 21, but train has 20 rows of label"):
        rows.load(rte, options(shots=21))


def test_a_missing_folder_says_what_to_download_and_where_it_goes(tmp_path: Path, options: Any) -> None:
    with pytest.raises(DataError) as error:
        rows.load(TASKS["arc"], options(root=tmp_path))
    for message in (
        f"{tmp_path}/ai2_arc/ARC-Easy",
        "huggingface.co/datasets/allenai/ai2_arc",
        "train.jsonl",
        "ai2_arc/ARC-Challenge",
    ):
        assert message in str(error.value)


def test_a_missing_file_is_named(rte: TaskSpec, rte_folder: Path, options: Any) -> None:
    (rte_folder / "validation.jsonl").unlink()
    with pytest.raises(DataError, match=rf"no validation.jsonl in {rte_folder}"):
        rows.load(rte, options())


def test_an_unreachable_hub_becomes_advice(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataError, match=r"could not load nyu-mll/glue from the hub.*data.root.*glue/rte.*Couldn't reach"):
        rows.load(TASKS["rte"], options())


def test_hub_and_local_rows_are_split_alike(rte: TaskSpec, rte_folder: Path, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, Any]] = []

    def hub(name: str, config: str, *, split: str, cache_dir: str | None) -> Any:
        asked.append((name, config))
        lines = [json.loads(line) for line in (rte_folder / f"{split}.jsonl").read_text().splitlines()]
        return datasets.Dataset.from_list(lines)

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert rows.load(TASKS["rte"], options()) == rows.load(rte, options())
    assert set(asked) == {("nyu-mll/glue", "rte")}


def test_bad_rows_of_the_hub_are_named_and_empty_texts_noted(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    good = [{"sentence1": "a", "sentence2": "b", "label": i % 2, "idx": i} for i in range(20)]
    for change, message in (({"label": 7}, "nyu-mll/glue:train:4: field 'label' is 7"), ({"sentence1": ""}, None)):
        lines = [{**row, **change} if i == 3 else row for i, row in enumerate(good)]
        monkeypatch.setattr("datasets.load_dataset", lambda *a, lines=lines, **k: datasets.Dataset.from_list(lines))
        if message:
            with pytest.raises(DataError, match=message):
                rows.load(TASKS["rte"], options())
        else:
            assert "empty text fields" in rows.load(TASKS["rte"], options()).notes[0]


def test_options_are_what_the_configuration_has() -> None:
    config = pytest.importorskip("bpt_dist.config")
    wanted = set(rows.DataOptions.__annotations__)
    assert wanted <= set(config.DataConfig.model_fields)
