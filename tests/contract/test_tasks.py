"""What every task of the catalogue keeps: its data of the pack load, render, tokenise and are scored."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpt_dist.data import metrics, rows
from bpt_dist.data.batches import Batches
from bpt_dist.data.spec import METRICS_OF_KIND
from bpt_dist.data.tasks import GLUE_8, SOURCE_6, SOURCE_12, SUPER_GLUE_5, TASKS
from bpt_dist.data.text_to_text import Example, render_all
from bpt_dist.data.tokens import tokenise

NAMES = sorted(TASKS)


@pytest.fixture(scope="module")
def tokenizer(data_root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_root / "t5-tokenizer")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, data_root: Path) -> tuple[str, rows.Splits]:
    options = SimpleNamespace(root=data_root, cache=None, max_train_rows=None, max_eval_rows=None, shots=None, split_seed=42)
    return request.param, rows.load(TASKS[request.param], options)


def test_the_comparison_has_25_columns_and_21_tasks() -> None:
    columns = [*SOURCE_12, *GLUE_8, *SUPER_GLUE_5]
    assert (len(SOURCE_6), len(SOURCE_12), len(GLUE_8), len(SUPER_GLUE_5), len(columns)) == (6, 12, 8, 5, 25)
    assert set(columns) == set(TASKS)
    assert len(TASKS) == 21


def test_every_configuration_of_the_pack_belongs_to_a_task(data_root: Path) -> None:
    pack = {str(name) for name in json.loads((data_root / "pack.json").read_text())}
    folders = {
        str(folder.relative_to(data_root)) for spec in TASKS.values() for folder in rows.local_folders(spec, data_root).values()
    }
    assert folders == {name for name in pack if (data_root / name).is_dir()}
    assert len(folders) == 22


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_whole(name: str) -> None:
    spec = TASKS[name]
    assert spec.name == name
    assert spec.summary
    assert spec.fields
    assert set(spec.metrics) <= set(METRICS_OF_KIND[spec.kind])
    assert spec.headline == spec.metrics[0]
    assert (spec.hub_name or "").count("/") == 1  # ids without an owner are script data sets, which no longer load
    assert (spec.kind == "text") == (not spec.label_words)
    assert len(set(spec.label_words)) == len(spec.label_words)
    if spec.kind == "classification":
        assert len(spec.label_values) == len(spec.label_words)
    if spec.group_column is not None:
        assert "multirc_em" in spec.metrics


def test_cola_reports_matthews_and_accuracy() -> None:
    assert TASKS["cola"].metrics == ("matthews", "accuracy")


def test_class_names_are_those_of_the_pack(data_root: Path) -> None:
    pack = json.loads((data_root / "pack.json").read_text())
    for spec in TASKS.values():
        names = pack[f"{spec.local_name}/{spec.hub_configs[0] or 'default'}"].get("label_names")
        if names and spec.kind == "classification" and spec.form != "options":
            assert spec.label_words == tuple(names), spec.name


def test_splits_are_disjoint_and_ids_unique(loaded: tuple[str, rows.Splits]) -> None:
    _, splits = loaded
    ids = [row["_row_id"] for found in splits.values() for row in found]
    assert list(splits) == ["train", "validation", "test"]
    assert all(splits.values())
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("protocol", ["fixed", "attempt"])
def test_rows_become_text(loaded: tuple[str, rows.Splits], protocol: Any) -> None:
    spec = TASKS[loaded[0]]
    words = set(spec.words(protocol))
    for split, found in loaded[1].items():
        examples = render_all(spec, found, protocol, evaluation=split != "train")
        assert len(examples) >= len(found)
        assert len({example.row_id for example in examples}) == len(examples)
        for example in examples:
            assert example.source.startswith(f"{spec.title(protocol)} ")
            assert example.target.strip()
            if words and not (spec.kind == "regression" and protocol == "attempt"):
                assert example.target in words
            assert (example.label is None) == (spec.kind == "text")


def test_rows_become_tokens_and_batches(loaded: tuple[str, rows.Splits], tokenizer: Any) -> None:
    spec = TASKS[loaded[0]]
    examples = render_all(spec, loaded[1]["train"][:200])
    tokenised = tokenise(spec, examples, tokenizer)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert len(tokenised) == len(examples)
    for ids in (*tokenised.source_ids, *tokenised.target_ids, *tokenised.label_ids):
        assert ids[-1] == tokenizer.eos_token_id
        assert not special & set(ids[:-1].tolist())
    assert max(map(len, tokenised.source_ids)) <= spec.max_source_length
    assert tokenised.num_truncated_targets == 0
    batch = Batches([tokenised], batch_size=4, seed=0).at(0)
    assert len(batch) == 4
    assert batch.weight.sum().item() == pytest.approx(1.0)


def test_right_answers_score_100_and_the_majority_less(loaded: tuple[str, rows.Splits]) -> None:
    spec = TASKS[loaded[0]]
    train = render_all(spec, loaded[1]["train"])
    test = render_all(spec, loaded[1]["test"], evaluation=True)
    right = metrics.compute(spec.metrics, [example.target for example in test], test, spec)
    assert right == pytest.approx(dict.fromkeys(spec.metrics, 100.0))
    assert metrics.majority(spec, train, test)[spec.headline] < 85.0


def test_the_majority_row_of_wsc_is_the_published_673(data_root: Path) -> None:
    """35 of 52: the score that many rows of the published tables share on WSC."""
    spec = TASKS["wsc"]
    options = SimpleNamespace(root=data_root, cache=None, max_train_rows=None, max_eval_rows=None, shots=None, split_seed=42)
    splits = rows.load(spec, options)
    train: list[Example] = render_all(spec, splits["train"])
    found = metrics.majority(spec, train, render_all(spec, splits["test"], evaluation=True))
    assert found["accuracy"] == pytest.approx(100 * 35 / 52)
