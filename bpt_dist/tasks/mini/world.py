"""The tasks of the miniature world, written as JSON lines in the layout a user's own tasks have. Imports no torch.

Eight source tasks use one half of the words, seven target tasks the other half. Targets come with few training rows, as the small
SuperGLUE tasks do, and are of four kinds, so that transfer can help, do nothing, or harm (`NEAR` and so on).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpt_dist.storage.file_system import NoFileLocks, lock_file
from bpt_dist.storage.files import read_json, write_atomic, write_json_atomic
from bpt_dist.tasks.mini import TASKS, puzzles
from bpt_dist.tasks.mini.grammar import SOURCE, TARGET, Domain

log = logging.getLogger(__name__)

GENERATOR_VERSION = 4
MARKER, LOCK = "world.json", "world.lock"
SPLITS = ("train", "validation", "test")
TARGET_ROWS = 64
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
    "mini_topic": MiniTask(SOURCE, puzzles.category, ("text",), ("food", "travel", "repair", "clothing")),
    "mini_kind": MiniTask(SOURCE, puzzles.kind, ("subject",), ("beast", "human")),
    "mini_nli": MiniTask(SOURCE, puzzles.entailment, ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mini_paraphrase": MiniTask(SOURCE, puzzles.restatement, ("sentence1", "sentence2"), ("different", "same")),
    "mini_answerable": MiniTask(SOURCE, puzzles.answered, ("ask", "told"), ("missing", "answered")),
    "mini_span": MiniTask(SOURCE, puzzles.reading, ("question", "context")),
    "mini_cloze": MiniTask(SOURCE, puzzles.cloze, ("query", "passage")),
}
# A source asks nearly the same question, with other fields, words and label words.
NEAR: dict[str, MiniTask] = {
    "mini_review": MiniTask(TARGET, puzzles.opinion_contrast, ("review",), ("bad", "good")),
    "mini_rte": MiniTask(TARGET, puzzles.entailment_binary, ("report", "claim"), ("true", "false")),
    "mini_duplicate": MiniTask(TARGET, puzzles.same_question, ("question1", "question2"), ("distinct", "duplicate")),
}
# Sources ask other questions of the same family.
SAME_FAMILY: dict[str, MiniTask] = {
    "mini_sense": MiniTask(TARGET, puzzles.word_sense, ("usage1", "usage2", "word"), ("clash", "match")),
}
# The backbone knows the question; no source is of its family.
OTHER_FAMILY: dict[str, MiniTask] = {
    "mini_agreement": MiniTask(TARGET, puzzles.number, ("phrase",), ("wrong", "right")),
    "mini_order": MiniTask(TARGET, puzzles.word_order, ("line",), ("broken", "valid")),
}
# The backbone never met the question.
UNPREPARED: dict[str, MiniTask] = {
    "mini_site": MiniTask(TARGET, puzzles.site, ("site",), ("inside", "outside")),
}
TARGET_TASKS: dict[str, MiniTask] = NEAR | SAME_FAMILY | OTHER_FAMILY | UNPREPARED
ALL_TASKS: dict[str, MiniTask] = SOURCE_TASKS | TARGET_TASKS


def write(folder: Path, seed: int, train_rows: int = 2000, eval_rows: int = 500, target_rows: int = TARGET_ROWS) -> None:
    """Write `<folder>/<task>/{train,validation,test}.jsonl` for every task, and `<folder>/tasks.yaml`, which describes them.

    Source tasks get `train_rows` rows to train on, target tasks `target_rows`. A world with more of the latter begins with the same
    rows and has the same other splits. A finished world is not written again. Each file appears whole or not at all, and the marker
    last; the bytes depend on the arguments and the generator version only. Raises StorageError when a file cannot be written.
    """
    folder = Path(folder)
    rows_of = {"train": train_rows, "target": target_rows, "validation": eval_rows, "test": eval_rows}
    marker = {"generator": GENERATOR_VERSION, "seed": seed, "rows": rows_of}
    if _is_finished(folder, marker):
        return
    with _sole_writer(folder):
        if _is_finished(folder, marker):
            return
        files = {}
        for name, task in ALL_TASKS.items():
            sizes = {split: rows_of["target" if split == "train" and name in TARGET_TASKS else split] for split in SPLITS}
            for split, rows in draw(name, task, seed, sizes).items():
                data = "".join(json.dumps(row) + "\n" for row in rows).encode()
                write_atomic(folder / name / f"{split}.jsonl", data)
                files[f"{name}/{split}.jsonl"] = hashlib.sha256(data).hexdigest()
        write_atomic(folder / TASKS.name, TASKS.read_bytes())
        write_json_atomic(folder / MARKER, marker | {"files": files})


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Wait for other jobs that write the same world: each would remove the unfinished files of the others as left behind.

    Without file locks there is one warning; a folder that cannot be written is for the write to explain.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_file(stack.enter_context((folder / LOCK).open("w")), wait=True)
        except NoFileLocks as error:
            log.warning("%s; start other jobs after the miniature world is written", error)
        except OSError:
            pass
        yield


def draw(name: str, task: MiniTask, seed: int, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Return the rows of every split of one task: labels balanced to one row, no text twice in any split.

    Rows to train on are drawn last and kept in order, so that more of them begin with the fewer ones.
    """
    stream = _distinct_rows(name, task, seed, sum(sizes.values()))
    splits = {split: [next(stream) for _ in range(sizes[split])] for split in reversed(SPLITS)}
    for split in ("validation", "test"):
        random.Random(f"{GENERATOR_VERSION} {seed} {name} {split}").shuffle(splits[split])  # noqa: S311
    return {split: [{"id": f"{split}-{index}", **row} for index, row in enumerate(splits[split])] for split in SPLITS}


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


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and write a world with other seeds or numbers of rows than the one configurations get by default."""
    parser = argparse.ArgumentParser(
        prog="python -m bpt_dist.tasks.mini.world", description="Write the miniature tasks as JSON lines."
    )
    parser.add_argument("folder", type=Path, help="where; give FOLDER/tasks.yaml as data.task_files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=2000, help="rows to train on of each source task")
    parser.add_argument("--target-rows", type=int, default=TARGET_ROWS, help="rows to train on of each target task")
    parser.add_argument("--eval-rows", type=int, default=500, help="rows of each validation and test split")
    options = parser.parse_args(arguments)
    if min(options.train_rows, options.target_rows, options.eval_rows) < 1:
        parser.error("numbers of rows must be at least 1")
    write(options.folder, options.seed, options.train_rows, options.eval_rows, options.target_rows)


if __name__ == "__main__":
    main()
