"""What every task of the catalogue keeps: its data of the pack load, render, tokenise and are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rendered import render_all

from bpt_dist.config import DataConfig
from bpt_dist.data import rows
from bpt_dist.data.batches import Batches
from bpt_dist.data.prepare import prepare
from bpt_dist.data.published import local_folders
from bpt_dist.data.tokens import tokenise
from bpt_dist.tasks import metrics
from bpt_dist.tasks.catalogue import GLUE_8, SOURCE_6, SOURCE_12, SUPER_GLUE_5, TASKS
from bpt_dist.tasks.spec import METRICS_OF_KIND

NAMES = sorted(TASKS)


@pytest.fixture(scope="module")
def tokenizer(data_root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_root / "t5-tokenizer")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, data_root: Path) -> tuple[str, rows.Splits]:
    return request.param, rows.load(TASKS[request.param], DataConfig(root=data_root))


def test_the_comparison_has_25_columns_and_21_tasks() -> None:
    columns = [*SOURCE_12, *GLUE_8, *SUPER_GLUE_5]
    assert (len(SOURCE_6), len(SOURCE_12), len(GLUE_8), len(SUPER_GLUE_5), len(columns)) == (6, 12, 8, 5, 25)
    assert set(columns) == set(TASKS)
    assert len(TASKS) == 21


def test_every_configuration_of_the_pack_belongs_to_a_task(data_root: Path) -> None:
    pack = {str(name) for name in json.loads((data_root / "pack.json").read_text())}
    folders = {str(folder.relative_to(data_root)) for spec in TASKS.values() for folder in local_folders(spec, data_root).values()}
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
    ids = [row["_row_id"] for kept in splits.values() for row in kept]
    assert list(splits) == ["train", "validation", "test"]
    assert all(splits.values())
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("protocol", ["fixed", "attempt"])
def test_rows_become_text(loaded: tuple[str, rows.Splits], protocol: Any) -> None:
    spec = TASKS[loaded[0]]
    words = set(spec.words(protocol))
    for split, rows_of_split in loaded[1].items():
        examples = render_all(spec, rows_of_split, protocol, evaluation=split != "train")
        assert len(examples) >= len(rows_of_split)
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
    test = render_all(spec, loaded[1]["test"], evaluation=True)
    right = metrics.compute(spec.metrics, [example.target for example in test], test, spec)
    assert right == pytest.approx(dict.fromkeys(spec.metrics, 100.0))
    assert metrics.majority(spec, test)[spec.headline] < 85.0


def test_the_majority_row_of_wsc_is_the_published_673(data_root: Path) -> None:
    """35 of 52: the score that many rows of the published tables share on WSC."""
    spec = TASKS["wsc"]
    splits = rows.load(spec, DataConfig(root=data_root))
    values = metrics.majority(spec, render_all(spec, splits["test"], evaluation=True))
    assert values["accuracy"] == pytest.approx(100 * 35 / 52)


# The first 16 digits of the content hashes of 64 rows at most: train, validation, test.
CONTENT_HASHES = {
    "attempt cola": ("ff964677bc55ef7e", "603394cb0d0f234c", "fa9169629bc17cf1"),
    "attempt multirc": ("972519131c72aa02", "fd584cc1a2b26ac2", "f129baa78c75fa4a"),
    "attempt winogrande": ("5d4ce682bbf31922", "cc30cc0448336ebb", "aa4d004075179dbc"),
    "fixed arc": ("9ce3e02faf1d0501", "379f99e08a06d70c", "9e395d4b3407f020"),
    "fixed cb": ("6cabd3fffe301165", "41163e2eb77c70ec", "e7e8a85e90174157"),
    "fixed mrpc": ("48392d7bc10cb4c7", "7cf660d6f05d8c8b", "ce7e864f49563290"),
    "fixed multirc": ("4160ab724ba35b99", "186e364d40bc7242", "8c0a6279265c0a24"),
    "fixed qqp": ("28351408c320cb65", "b20ef859b9df804a", "392a5ed4289ae7c8"),
    "fixed record": ("7ea75c44c49169ab", "3eb4faec62c7071e", "baa12724dd437c72"),
    "fixed squad": ("87fef7fc6a50f023", "745cc9c8a8301056", "1220b792287facfb"),
    "fixed stsb": ("f90af56f60ae4544", "08634d8674023cd7", "f4ea26dc3e48a699"),
    "fixed wsc": ("00dee08723262665", "3dfdfc645bd6dd20", "3ca7015e45d34d17"),
}


@pytest.mark.parametrize("case", sorted(CONTENT_HASHES))
def test_the_tokens_of_a_task_stay_what_they_were(case: str, data_root: Path, tokenizer: Any, tmp_path: Path) -> None:
    """A run resumes, and is compared with an older one, only while these hashes stay the same."""
    protocol, name = case.split()
    data = DataConfig.model_validate(
        {"root": data_root, "protocol": protocol, "cache": tmp_path, "max_train_rows": 64, "max_eval_rows": 64}
    )
    (task,) = prepare([name], data, tokenizer, splits=("train", "validation", "test"), seed=0)
    assert tuple(prepared.content_hash[:16] for prepared in task.splits.values()) == CONTENT_HASHES[case]


def test_questions_of_multirc_are_cut_by_the_published_protocol_alone(data_root: Path) -> None:
    """Exact match is counted over whole questions; the published halves hold fragments of them."""
    shared = {}
    for protocol in ("fixed", "attempt"):
        data = DataConfig.model_validate({"root": data_root, "protocol": protocol})
        splits = rows.load(TASKS["multirc"], data)
        questions = [{row["idx"]["question"] for row in splits[split]} for split in ("validation", "test")]
        shared[protocol] = len(questions[0] & questions[1])
        sizes = [len(splits[split]) for split in ("validation", "test")]
        assert abs(sizes[0] - sizes[1]) <= (20 if protocol == "fixed" else 1)
    assert shared["fixed"] == 0
    assert shared["attempt"] > 10


@pytest.mark.parametrize("cap", [20, 40])
def test_a_cap_keeps_questions_of_multirc_whole(cap: int, data_root: Path) -> None:
    whole = rows.load(TASKS["multirc"], DataConfig(root=data_root))
    capped = rows.load(TASKS["multirc"], DataConfig(root=data_root, max_eval_rows=cap))
    for split in ("validation", "test"):
        questions = {row["idx"]["question"] for row in capped[split]}
        assert capped[split] == [row for row in whole[split] if row["idx"]["question"] in questions]
        assert 0 < len(capped[split]) <= cap
