"""Text that the tokenizer does not know is counted by field, reported, refused from a stated share on, and kept in the cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_t5 import make

from bpt_dist.config import DataConfig
from bpt_dist.data import prepare as preparation
from bpt_dist.data import token_cache
from bpt_dist.data.prepare import TaskData, prepare
from bpt_dist.data.unknown_text import UnknownText, describe
from bpt_dist.errors import DataError

KNOWN = "the cat sat on a mat"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make(tmp_path_factory.mktemp("t5")))


def prepared(folder: Path, tokenizer: Any, texts: dict[str, list[str]], **entry: Any) -> TaskData:
    """Prepare a task of two fields; `texts` are those of the second field by split, six known rows where it is not named."""
    task = folder / "mood"
    task.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = [{"first": KNOWN, "second": text, "label": i % 2} for i, text in enumerate(texts.get(split, [KNOWN] * 6))]
        (task / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    described = {"folder": "mood", "fields": ["first", "second"], "metrics": ["accuracy"], **entry}
    if "target" not in described:
        described |= {"label": "label", "label_words": ["yes", "no"]}
    (folder / "tasks.yaml").write_text(json.dumps({"mood": described}))
    data = DataConfig(task_files=(folder / "tasks.yaml",), cache=folder / "cache")
    return prepare(["mood"], data, tokenizer, splits=("train", "validation", "test"), seed=0)[0]


def test_known_text_is_not_reported(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    task = prepared(tmp_path, tokenizer, {})
    assert [split.unknown for split in task.splits.values()] == [(), (), ()]
    assert not caplog.records


def test_the_report_is_one_line_with_field_share_split_and_words(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    task = prepared(tmp_path, tokenizer, {"train": [KNOWN] * 5 + ["the zebra sat"]})
    (unknown,) = task.splits["train"].unknown
    assert unknown == UnknownText("second", len("zebra"), 5 * len(KNOWN.replace(" ", "")) + len("thezebrasat"), ("zebra",))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "task 'mood'" in record.getMessage()
    assert "field 'second' (5.81 % of train): 'zebra'" in record.getMessage()
    assert "'first'" not in record.getMessage()


def test_a_small_share_is_counted_and_not_reported(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    task = prepared(tmp_path, tokenizer, {"train": [KNOWN] * 99 + [f"{KNOWN} x"]})
    (unknown,) = task.splits["train"].unknown
    assert 0 < unknown.share < 0.01
    assert not caplog.records
    assert "'x'" in (describe({"train": [unknown]}, least_share=0.0) or "")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_field_of_unknown_text_is_refused_in_any_split(split: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        prepared(tmp_path, tokenizer, {split: ["zebras gnaw"] * 6})
    for piece in ("task 'mood'", "50 % or more", "field 'second'", f"100 % of {split}", "'zebras' 'gnaw'", "choose a backbone"):
        assert piece in str(error.value)


@pytest.mark.parametrize(("text", "is_refused"), [("the zeb", True), ("the cat ze", False), ("the z", False)])
def test_half_of_the_characters_is_the_limit(text: str, is_refused: bool, tmp_path: Path, tokenizer: Any) -> None:
    if is_refused:
        with pytest.raises(DataError, match="50 % or more"):
            prepared(tmp_path, tokenizer, {"train": [text] * 6})
    else:
        prepared(tmp_path, tokenizer, {"train": [text] * 6})


def test_unknown_characters_of_a_subword_tokenizer_are_counted_one_by_one(t5_tokenizer: Any, tmp_path: Path) -> None:
    """A run of them is one piece: two unknown pieces of seven would hide that the whole sentence is lost."""
    with pytest.raises(DataError, match=r"field 'second' \(100 % of train\).*'好'"):
        prepared(tmp_path, t5_tokenizer, {"train": ["这个电影很好很好", "好 电影"]})
    task = prepared(tmp_path, t5_tokenizer, {"train": ["if x then { y } else z", "~"] + [KNOWN] * 40})
    (unknown,) = task.splits["train"].unknown
    assert (unknown.num_unknown, set(unknown.examples)) == (3, {"{", "}", "~"})


def test_free_text_targets_are_a_field(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="field 'second'"):
        prepared(tmp_path, tokenizer, {"train": ["zebra"] * 6}, fields=["first"], target="second")


def test_counts_come_back_from_the_cache_and_refuse_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparation, "LEAST_BYTES", 1)
    few = {"train": [KNOWN] * 5 + ["the zebra sat"]}
    made = prepared(tmp_path, tokenizer, few).splits["train"].unknown
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    token_cache._held.clear()
    monkeypatch.setattr(preparation, "tokenise", None)  # a second preparation would fail
    assert prepared(tmp_path, tokenizer, few).splits["train"].unknown == made
    assert [record.getMessage() for record in caplog.records] == messages
    monkeypatch.undo()
    monkeypatch.setattr(preparation, "LEAST_BYTES", 1)
    for _ in range(2):
        with pytest.raises(DataError, match="50 % or more"):
            prepared(tmp_path, tokenizer, {"train": ["zebra"] * 6})
        token_cache._held.clear()
