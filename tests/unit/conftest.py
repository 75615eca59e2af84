"""Fixtures of the data tests: options as the configuration gives them, rows as files, the real T5 tokenizer; lines of the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bpt_dist.storage.log_lines import lines_of_run
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Options:
    """The part of the configuration that rows.load reads."""

    root: Path | None = None
    cache: Path | None = None
    protocol: str = "fixed"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    shots: int | None = None
    split_seed: int = 42


@pytest.fixture(autouse=True)
def lines_of_no_run() -> Iterator[None]:
    """Let lines of the log name no run or stage in which an earlier test has left a run: there is one place for the process."""
    with lines_of_run(""):
        yield


@pytest.fixture
def options() -> type[Options]:
    return Options


@pytest.fixture(scope="session")
def t5_tokenizer(data_root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_root / "t5-tokenizer")


@pytest.fixture
def rte_folder(tmp_path: Path) -> Path:
    """A folder with the two files of a small entailment task."""
    for split, num_rows in (("train", 40), ("validation", 11)):
        rows = [{"sentence1": f"one {split} {i}", "sentence2": f"two {i}", "label": i % 2, "idx": i} for i in range(num_rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def rte(rte_folder: Path) -> TaskSpec:
    return replace(TASKS["rte"].with_folder(rte_folder), name="rte")
