"""From task names to tokens: rows are read, checked, worded and encoded before anything is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bpt_dist.config import Data
from bpt_dist.data import rows, tasks
from bpt_dist.data.spec import Protocol, TaskSpec
from bpt_dist.data.text_to_text import Example, render
from bpt_dist.data.tokens import TokenisedTask, tokenise
from bpt_dist.faults import fault_point
from bpt_dist.mini import TASKS, world

WORLD_SEED = 0  # the miniature world is one data set, like any published one; runs differ by their own seed


@dataclass(frozen=True)
class Split:
    """The examples of one split, and their tokens in the same order."""

    examples: tuple[Example, ...]
    tokens: TokenisedTask


@dataclass(frozen=True)
class TaskData:
    """One task, ready to train on and to evaluate."""

    spec: TaskSpec
    protocol: Protocol
    splits: Mapping[str, Split]

    @property
    def train(self) -> Split:
        """Return the training split."""
        return self.splits["train"]


def content_hash(split: Split) -> str:
    """Return the SHA-256 of what is trained or evaluated on: row ids, source, target and label tokens, in order."""
    digest = hashlib.sha256()
    tokens = split.tokens
    for row_id, source, target in zip(tokens.row_ids, tokens.source_ids, tokens.target_ids, strict=True):
        for part in (row_id.encode(), source.astype(np.int64).tobytes(), target.astype(np.int64).tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    for label in tokens.label_ids:
        digest.update(label.astype(np.int64).tobytes() + b";")
    return digest.hexdigest()


def prepare(names: Sequence[str], data: Data, tokenizer: Any, *, splits: Sequence[str], seed: int) -> list[TaskData]:
    """Return the named tasks with the wanted `splits`; `seed` draws the few-shot rows.

    Raises DataError naming file, line and field of bad rows, and what to do about a data set that is not there.
    """
    known = specs(data)
    return [_prepare(tasks.get(name, known), data, tokenizer, splits, seed) for name in names]


def specs(data: Data) -> dict[str, TaskSpec]:
    """Return the tasks that are not in the catalogue: the user's, and those of the miniature world."""
    known = dict(tasks.load_user_tasks([TASKS]))
    folder = (data.cache or default_cache()) / "mini"
    known = {name: spec.with_folder(folder / name) for name, spec in known.items()}
    return {**known, **tasks.load_user_tasks(data.task_files)}


def default_cache() -> Path:
    """Return the user's cache folder of this project."""
    return Path.home() / ".cache" / "bpt_dist"


def _prepare(spec: TaskSpec, data: Data, tokenizer: Any, splits: Sequence[str], seed: int) -> TaskData:
    if spec.folder is not None and spec.folder.parent == (data.cache or default_cache()) / "mini":
        world.write(spec.folder.parent, WORLD_SEED)
    found = rows.load(spec, data, seed=seed)
    prepared = {}
    for split in splits:
        examples = []
        for row in found[split]:
            fault_point("data.row", task=spec.name)
            examples += render(spec, row, data.protocol, evaluation=split != "train")
        tokens = tokenise(spec, examples, tokenizer, data.max_source_length, protocol=data.protocol)
        prepared[split] = Split(tuple(examples), tokens)
    return TaskData(spec, data.protocol, prepared)
