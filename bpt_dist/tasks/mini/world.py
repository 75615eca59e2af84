"""The tasks of the miniature world, written as JSON lines in the layout a user's own tasks have. Imports no torch.

Eight source tasks use one half of the words, five target tasks the other half: the same puzzles, never the same task. Texts have
no instruction, and the label words do not reveal the question.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpt_dist.storage.files import read_json, write_atomic, write_json_atomic
from bpt_dist.tasks.mini import TASKS, puzzles
from bpt_dist.tasks.mini.grammar import SOURCE, TARGET, Domain

GENERATOR_VERSION = 2
MARKER = "world.json"
SPLITS = ("train", "validation", "test")
DRAWS_PER_ROW = 200

Row = dict[str, object]


@dataclass(frozen=True)
class MiniTask:
    """One task: whose words it uses, the puzzle it asks, its columns, and its label words.

    The puzzle is a `puzzles.Classified`; without label words, for free-text answers, a `puzzles.Answered`.
    """

    domain: Domain
    puzzle: Callable[..., Any]
    columns: tuple[str, ...]
    label_words: tuple[str, ...] = ()


SOURCE_TASKS: dict[str, MiniTask] = {
    "mini_sentiment": MiniTask(SOURCE, puzzles.opinion_plain, ("sentence",), ("negative", "positive")),
    "mini_nli": MiniTask(SOURCE, puzzles.entailment, ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mini_paraphrase": MiniTask(SOURCE, puzzles.restatement, ("sentence1", "sentence2"), ("different", "same")),
    "mini_answerable": MiniTask(SOURCE, puzzles.answered, ("question", "sentence"), ("missing", "answered")),
    "mini_topic": MiniTask(SOURCE, puzzles.category, ("text",), ("food", "travel", "repair", "clothing")),
    "mini_order": MiniTask(SOURCE, puzzles.word_order, ("sentence",), ("broken", "valid")),
    "mini_span": MiniTask(SOURCE, puzzles.reading, ("question", "context")),
    "mini_cloze": MiniTask(SOURCE, puzzles.cloze, ("query", "passage")),
}
TARGET_TASKS: dict[str, MiniTask] = {
    "mini_review": MiniTask(TARGET, puzzles.opinion_contrast, ("review",), ("bad", "good")),
    "mini_rte": MiniTask(TARGET, puzzles.entailment_binary, ("premise", "hypothesis"), ("true", "false")),
    "mini_duplicate": MiniTask(TARGET, puzzles.same_question, ("question1", "question2"), ("distinct", "duplicate")),
    "mini_sense": MiniTask(TARGET, puzzles.word_sense, ("sentence1", "sentence2", "word"), ("clash", "match")),
    "mini_agreement": MiniTask(TARGET, puzzles.number, ("sentence",), ("wrong", "right")),
}
ALL_TASKS: dict[str, MiniTask] = SOURCE_TASKS | TARGET_TASKS


def write(folder: Path, seed: int, train_rows: int = 2000, eval_rows: int = 500) -> None:
    """Write `<folder>/<task>/{train,validation,test}.jsonl` for every task, and `<folder>/tasks.yaml`, which describes them.

    A finished world is not written again. Each file appears whole or not at all, and the marker last; the bytes depend on the
    arguments and the generator version only. Raises StorageError when a file cannot be written.
    """
    folder = Path(folder)
    sizes = {"train": train_rows, "validation": eval_rows, "test": eval_rows}
    marker = {"generator": GENERATOR_VERSION, "seed": seed, "rows": sizes}
    if _is_finished(folder, marker):
        return
    files = {}
    for name, task in ALL_TASKS.items():
        for split, rows in draw(name, task, seed, sizes).items():
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            write_atomic(folder / name / f"{split}.jsonl", data)
            files[f"{name}/{split}.jsonl"] = hashlib.sha256(data).hexdigest()
    write_atomic(folder / TASKS.name, TASKS.read_bytes())
    write_json_atomic(folder / MARKER, marker | {"files": files})


def draw(name: str, task: MiniTask, seed: int, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Return the rows of every split of one task: labels balanced to one row, no text twice in any split."""
    stream = _distinct_rows(name, task, seed, sum(sizes.values()))
    splits = {split: [next(stream) for _ in range(size)] for split, size in sizes.items()}
    for split, rows in splits.items():
        random.Random(f"{GENERATOR_VERSION} {seed} {name} {split}").shuffle(rows)  # noqa: S311
        splits[split] = [{"id": f"{split}-{index}", **row} for index, row in enumerate(rows)]
    return splits


def _distinct_rows(name: str, task: MiniTask, seed: int, count: int) -> Iterator[Row]:
    rng = random.Random(f"{GENERATOR_VERSION} {seed} {name}")  # noqa: S311  (reproducible, not secret)
    seen: set[puzzles.Texts] = set()
    for _ in range(DRAWS_PER_ROW * count):
        label = len(seen) % len(task.label_words) if task.label_words else None
        texts, row = _draw_row(rng, task, label)
        if texts not in seen:
            seen.add(texts)
            yield row
    raise AssertionError(f"the grammar of {name} has fewer than {count} texts")


def _draw_row(rng: random.Random, task: MiniTask, label: int | None) -> tuple[puzzles.Texts, Row]:
    if label is not None:
        texts = task.puzzle(rng, task.domain, label)
        return texts, {**dict(zip(task.columns, texts, strict=True)), "label": label}
    texts, answer = task.puzzle(rng, task.domain)
    start = f" {texts[-1]}".index(f" {answer}")
    row = {**dict(zip(task.columns, texts, strict=True)), "answers": {"text": [answer], "answer_start": [start]}}
    return texts, row


def _is_finished(folder: Path, marker: dict[str, object]) -> bool:
    if not (folder / MARKER).is_file():
        return False
    stored = read_json(folder / MARKER)
    files = stored.pop("files", {})
    return stored == marker and all(_digest(folder / path) == digest for path, digest in files.items())


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
