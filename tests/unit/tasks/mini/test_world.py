"""The miniature tasks: same bytes for a seed, disjoint splits, balanced and correct labels, readable as user tasks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mini_checker as checker
import pytest
import yaml

from bpt_dist.storage.file_system import NoFileLocks
from bpt_dist.tasks.mini import TASKS, skills, world
from bpt_dist.tasks.user_tasks import load_user_tasks

ROWS = {"train": 400, "validation": 100, "test": 100}
# SHA-256 over all files of world.write(folder, 5, train_rows=40, eval_rows=10, target_rows=20); a new value needs a new version.
DIGEST_OF_SEED_5 = "0dc924592383e8c989d81ce6805336ee0b03e6f648132d024e98a08b04e3c32c"

ANSWERS = {
    "mini_sentiment": lambda row: checker.polarity(row["sentence"]),
    "mini_review": lambda row: checker.polarity(row["review"]),
    "mini_nli": lambda row: checker.entailment(row["premise"], row["hypothesis"]),
    "mini_rte": lambda row: int(checker.entailment(row["report"], row["claim"]) > 0),
    "mini_paraphrase": lambda row: int(same_event(row["sentence1"], row["sentence2"])),
    "mini_duplicate": lambda row: int(same_event(row["question1"], row["question2"])),
    "mini_answerable": lambda row: int(checker.answers(row["ask"], row["told"]) is not None),
    "mini_order": lambda row: int(checker.parse(row["line"]) is not None),
    "mini_topic": lambda row: ("fruit", "vehicle", "tool", "garment").index(checker.topic(row["text"])),
    "mini_kind": lambda row: ("animal", "person").index(checker.kind(row["subject"])),
    "mini_sense": lambda row: int(checker.sense(row["usage1"]) == checker.sense(row["usage2"])),
    "mini_agreement": lambda row: checker.agrees(row["phrase"]),
    "mini_site": lambda row: int(checker.parse(row["site"]).place in {"park", "village", "garden"}),
    "mini_span": lambda row: checker.find_answer(row["question"], row["context"]),
    "mini_cloze": lambda row: checker.fill(row["query"], row["passage"]),
}


def same_event(first: str, second: str) -> bool:
    facts = checker.parse(first), checker.parse(second)
    assert None not in facts, (first, second)
    return facts[0].event == facts[1].event


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("world")
    world.write(target, 0, ROWS["train"], ROWS["validation"], target_rows=ROWS["train"])
    return target


def rows(folder: Path, task: str, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.jsonl")):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_a_seed_gives_the_same_bytes_in_every_process_without_torch(tmp_path: Path, hash_seed: str) -> None:
    code = (
        "import sys; from pathlib import Path; from bpt_dist.tasks.mini import world;"
        "world.write(Path(sys.argv[1]), 5, 40, 10, 20); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert digest(tmp_path) == DIGEST_OF_SEED_5


def test_another_seed_gives_other_rows(folder: Path, tmp_path: Path) -> None:
    world.write(tmp_path, 1, ROWS["train"], ROWS["validation"], target_rows=ROWS["train"])
    assert digest(tmp_path) != digest(folder)


def test_a_finished_world_is_not_written_again_and_a_damaged_one_is_repaired(tmp_path: Path) -> None:
    world.write(tmp_path, 0, 20, 10)
    victim = tmp_path / "mini_nli" / "train.jsonl"
    stamp, whole = victim.stat().st_mtime_ns, digest(tmp_path)
    world.write(tmp_path, 0, 20, 10)
    assert victim.stat().st_mtime_ns == stamp
    victim.write_text(victim.read_text()[:100])
    world.write(tmp_path, 0, 20, 10)
    assert digest(tmp_path) == whole


def test_jobs_that_start_together_write_one_world(tmp_path: Path) -> None:
    """The first use on a machine is often two runs side by side; each removed the unfinished files of the other."""
    code = (
        "import sys; from pathlib import Path; from bpt_dist.tasks.mini import world; world.write(Path(sys.argv[1]), 0, 200, 100)"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "shared")], stderr=subprocess.PIPE) for _ in range(4)]
    said = [job.communicate(timeout=120)[1].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, said
    world.write(tmp_path / "alone", 0, 200, 100)
    assert digest(tmp_path / "shared") == digest(tmp_path / "alone")
    assert not list((tmp_path / "shared").rglob("*.tmp-*"))


def test_without_file_locks_the_world_is_written_after_one_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    def none(file: object, *, wait: bool) -> None:
        raise NoFileLocks("no locks here")

    monkeypatch.setattr(world, "lock_file", none)
    world.write(tmp_path, 0, 20, 10)
    assert len(rows(tmp_path, "mini_nli", "train")) == 20
    assert [record.getMessage() for record in caplog.records] == [
        "no locks here; start other jobs after the miniature world is written"
    ]


def test_other_sizes_are_written_again(tmp_path: Path) -> None:
    world.write(tmp_path, 0, 20, 10)
    world.write(tmp_path, 0, 30, 10)
    assert len(rows(tmp_path, "mini_nli", "train")) == 30


def test_targets_come_with_few_rows_and_more_of_them_begin_with_the_fewer_ones(tmp_path: Path) -> None:
    world.write(tmp_path / "few", 0, 20, 10)
    world.main([str(tmp_path / "many"), "--train-rows", "20", "--eval-rows", "10", "--target-rows", "100"])
    for task in world.TARGET_TASKS:
        few, many = (rows(tmp_path / name, task, "train") for name in ("few", "many"))
        assert (len(few), len(many)) == (64, 100)
        assert many[:64] == few
        for split in ("validation", "test"):
            assert rows(tmp_path / "few", task, split) == rows(tmp_path / "many", task, split)


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_a_wrong_number_of_rows_is_refused_and_nothing_written(tmp_path: Path, count: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        world.main([str(tmp_path / "world"), "--target-rows", count])
    assert ended.value.code == 2
    assert "rows" in capsys.readouterr().err
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize("task", world.ALL_TASKS)
def test_no_text_stands_in_two_rows(folder: Path, task: str) -> None:
    columns = world.ALL_TASKS[task].columns
    texts = [tuple(row[name] for name in columns) for split in ROWS for row in rows(folder, task, split)]
    assert len(texts) == len(set(texts)) == sum(ROWS.values())


@pytest.mark.parametrize("task", [name for name, task in world.ALL_TASKS.items() if task.label_words])
def test_labels_are_balanced_in_every_split(folder: Path, task: str) -> None:
    for split, size in ROWS.items():
        counts = Counter(row["label"] for row in rows(folder, task, split))
        classes = len(world.ALL_TASKS[task].label_words)
        assert sorted(counts) == list(range(classes))
        assert max(counts.values()) - min(counts.values()) <= 1, (split, size, counts)


@pytest.mark.parametrize("task", world.ALL_TASKS)
def test_labels_are_those_of_an_independent_reading(folder: Path, task: str) -> None:
    for row in rows(folder, task, "train"):
        label = row["label"] if "label" in row else row["answers"]["text"][0]
        assert ANSWERS[task](row) == label, row


@pytest.mark.parametrize("task", ["mini_span", "mini_cloze"])
def test_answers_stand_where_they_are_said_to(folder: Path, task: str) -> None:
    for row in rows(folder, task, "test"):
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row[world.ALL_TASKS[task].columns[-1]][start:].startswith(answer)


def test_target_words_are_not_in_source_tasks(folder: Path) -> None:
    agents_and_things = {noun for name in ("artist", "official", "instrument", "furniture") for noun in checker.lx.NOUNS[name]}
    for task in world.SOURCE_TASKS:
        text = (folder / task / "train.jsonl").read_text().replace(".", " ").replace("?", " ").split()
        assert not agents_and_things & set(text), task


def test_the_task_file_beside_the_rows_describes_them(folder: Path) -> None:
    specs = load_user_tasks([folder / "tasks.yaml"])
    assert set(specs) == set(world.ALL_TASKS) == set(yaml.safe_load(TASKS.read_text()))
    for name, task in world.ALL_TASKS.items():
        assert tuple(field.column for field in specs[name].fields) == task.columns
        assert specs[name].label_words == task.label_words
        assert specs[name].folder == folder / name


def test_world_has_the_tasks_that_are_promised() -> None:
    assert len(world.SOURCE_TASKS) >= 8
    assert not set(world.SOURCE_TASKS) & set(world.TARGET_TASKS)


def family_of(columns: tuple[str, ...]) -> str | None:
    """Return the family of the skill that has these columns as fields."""
    found = {skill.family for skill in skills.SKILLS if skill.fields == tuple(f"{column}:" for column in columns)}
    return found.pop() if found else None


def test_targets_are_of_the_kinds_they_are_listed_under() -> None:
    families = {family_of(task.columns) for task in world.SOURCE_TASKS.values()}
    assert None not in families
    for task in (world.NEAR | world.SAME_FAMILY).values():
        assert family_of(task.columns) in families
    for task in world.OTHER_FAMILY.values():
        assert family_of(task.columns) not in families | {None}
    for task in world.UNPREPARED.values():
        assert family_of(task.columns) is None
        assert task.puzzle not in {skill.draw for skill in skills.SKILLS}


def test_no_two_tasks_share_their_fields() -> None:
    """The fields say which question it is, so that one prompt can serve all."""
    fields = [task.columns for task in world.ALL_TASKS.values()]
    assert len(set(fields)) == len(fields)
