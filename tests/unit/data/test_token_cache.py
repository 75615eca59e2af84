"""Tokens from the cache are the tokens that would be made, bit for bit, and no state of the cache ends a run."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_t5 import make

from bpt_dist.config import DataConfig
from bpt_dist.data import mapped_arrays, rows, token_cache
from bpt_dist.data import prepare as prepared
from bpt_dist.data.prepare import Split, prepare
from bpt_dist.errors import DataError

SPLITS = ("train", "validation", "test")
KINDS = {
    "cb": "classification", "arc": "a choice from two folders", "stsb": "scores", "wsc": "marked spans", "multirc": "groups",
    "squad": "free text, cut", "record": "several examples a row",
}  # fmt: skip
KNOWN_NAMES = {"train": "one", "validation": "two", "test": "three"}  # the tiny T5 knows every word of the texts
WORDS = "a cat sat", "the dog ran on a mat", "no bird flew", "one red mat is not blue"


@pytest.fixture(autouse=True)
def _keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "LEAST_BYTES", 1)
    token_cache._warn_once.cache_clear()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make(tmp_path_factory.mktemp("t5")))


@pytest.fixture
def num_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were tokenised, in order."""
    made: list[str] = []
    tokenise = prepared.tokenise

    def counted(spec: Any, *arguments: Any, **options: Any) -> Any:
        made.append(spec.name)
        return tokenise(spec, *arguments, **options)

    monkeypatch.setattr(prepared, "tokenise", counted)
    return made


def task(folder: Path, num_rows: int = 12, **entry: Any) -> Path:
    """Write a task of two classes and return the file that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", num_rows), ("validation", 6), ("test", 5)):
        texts = [f"{KNOWN_NAMES[split]} w{70 + n} {WORDS[n % 4]}" for n in range(size)]
        lines = [json.dumps({"text": text, "label": n % 2, "id": f"{split}{n}"}) for n, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    described = {
        "folder": ".",
        "fields": ["text"],
        "label": "label",
        "label_words": ["yes", "no"],
        "metrics": ["accuracy"],
        **entry,
    }
    (folder / "tasks.yaml").write_text(json.dumps({"mood": described}))
    return folder / "tasks.yaml"


def options(folder: Path, **values: Any) -> DataConfig:
    return DataConfig(task_files=(folder / "mood" / "tasks.yaml",), cache=folder / "cache", **values)


def splits_of(data: DataConfig, tokenizer: Any, *, name: str = "mood", seed: int = 0) -> dict[str, Split]:
    """Prepare one task as a new process would: nothing of an earlier call is still held."""
    token_cache._held.clear()
    (prepared_task,) = prepare([name], data, tokenizer, splits=SPLITS, seed=seed)
    return dict(prepared_task.splits)


def in_memory(splits: dict[str, Split]) -> dict[str, Split]:
    """Return splits that do not change with the files they are mapped from."""
    copies = {}
    for name, split in splits.items():
        tokens, ids = split.tokens, {}
        for part in token_cache.IDS:
            ids[part] = tuple(row.copy() for row in getattr(tokens, part))
        copies[name] = replace(split, examples=tuple(split.examples), tokens=replace(tokens, row_ids=tuple(tokens.row_ids), **ids))
    return copies


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "tokens").iterdir())


def assert_same(splits: dict[str, Split], expected: dict[str, Split]) -> None:
    assert list(splits) == list(expected)
    for name, split in expected.items():
        same = splits[name]
        assert (tuple(same.examples), same.notes) == (tuple(split.examples), split.notes)
        computed = {replace(one, stored_hash=None).content_hash for one in (same, split)}
        assert computed == {same.content_hash} == {split.content_hash}
        assert [type(e.label) for e in same.examples] == [type(e.label) for e in split.examples]
        assert tuple(same.tokens.row_ids) == tuple(split.tokens.row_ids)
        for part in ("name", "num_truncated_sources", "num_truncated_targets"):
            assert getattr(same.tokens, part) == getattr(split.tokens, part)
        for part in ("source_ids", "target_ids", "label_ids"):
            pairs = list(zip(getattr(same.tokens, part), getattr(split.tokens, part), strict=True))
            assert all(a.dtype == b.dtype == np.int32 and np.array_equal(a, b) for a, b in pairs), part


@pytest.mark.parametrize("protocol", ["fixed", "attempt"])
@pytest.mark.parametrize("name", KINDS)
def test_real_tasks_come_back_bit_for_bit(
    name: str, protocol: Any, data_root: Path, t5_tokenizer: Any, tmp_path: Path, num_made: list[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data = DataConfig(root=data_root, protocol=protocol, cache=tmp_path, max_train_rows=60, max_eval_rows=20, max_source_length=64)
    messages = []
    for least_bytes, num_expected in ((1 << 60, 3), (1, 6), (1, 6)):
        monkeypatch.setattr(prepared, "LEAST_BYTES", least_bytes)
        caplog.clear()
        splits = splits_of(data, t5_tokenizer, name=name)
        messages.append(sorted(record.getMessage() for record in caplog.records))
        if num_expected == 3:
            expected = splits
        assert_same(splits, expected)
        assert len(num_made) == num_expected
    assert messages[0] == messages[1] == messages[2]
    assert any("were cut to 64 tokens" in message for message in messages[2]) == any(
        split.tokens.num_truncated_sources for split in expected.values()
    )


def change_nothing(folder: Path, tokenizer: Any) -> Any:
    return options(folder), tokenizer, 0


def more_rows(folder: Path, tokenizer: Any) -> Any:
    with (folder / "mood" / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more", "label": 1, "id": "more"}) + "\n")
    return options(folder), tokenizer, 0


def same_size_other_rows(folder: Path, tokenizer: Any) -> Any:
    file = folder / "mood" / "train.jsonl"
    facts = file.stat()
    file.write_text(file.read_text().replace("cat", "dog"))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    return options(folder), tokenizer, 0


def no_test_file(folder: Path, tokenizer: Any) -> Any:
    (folder / "mood" / "test.jsonl").unlink()
    return options(folder), tokenizer, 0


def other_words(folder: Path, tokenizer: Any) -> Any:
    task(folder / "mood", label_words=["good", "bad"])
    return options(folder), tokenizer, 0


def other_fields(folder: Path, tokenizer: Any) -> Any:
    task(folder / "mood", fields={"text": "sentence:"})
    return options(folder), tokenizer, 0


def other_scores(folder: Path, tokenizer: Any) -> Any:
    """The vocabulary stays as it is, what is made of a text does not."""
    from transformers import AutoTokenizer

    place = folder / "t5"
    tokenizer.save_pretrained(place)
    state = json.loads((place / "tokenizer.json").read_text())
    assert state["normalizer"] == {"type": "Lowercase"}
    state["normalizer"] = None
    (place / "tokenizer.json").write_text(json.dumps(state))
    changed = AutoTokenizer.from_pretrained(place)
    assert changed.get_vocab() == tokenizer.get_vocab()
    return options(folder), changed, 0


def with_options(seed: int = 0, **values: Any) -> Callable[[Path, Any], Any]:
    return lambda folder, tokenizer: (options(folder, **values), tokenizer, seed)


def other_code(fact: str) -> Callable[[Path, Any], Any]:
    def change(folder: Path, tokenizer: Any) -> Any:
        token_cache.CODE[fact] += "+"
        return options(folder), tokenizer, 0

    return change


CHANGES: dict[str, tuple[int, Callable[[Path, Any], Any]]] = {
    "nothing": (0, change_nothing),
    "the seed, which draws nothing": (0, with_options(seed=1)),
    "rows": (3, more_rows),
    "rows in a file of the same size and time": (3, same_size_other_rows),
    "the files that are there": (3, no_test_file),
    "label words": (3, other_words),
    "fields": (3, other_fields),
    "the tokenizer beyond its vocabulary": (3, other_scores),
    "protocol": (3, with_options(protocol="attempt")),
    "max_source_length": (3, with_options(max_source_length=9)),
    "split_seed": (3, with_options(split_seed=1)),
    "max_train_rows": (1, with_options(max_train_rows=3)),
    "max_eval_rows": (2, with_options(max_eval_rows=3)),
    "shots": (1, with_options(shots=2)),
    **{f"version of {fact}": (3, other_code(fact)) for fact in ("code", "python", "numpy", "tokenizers", "torch")},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_shapes_the_tokens_changes_the_key(
    what: str, tmp_path: Path, tokenizer: Any, num_made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CODE", dict(token_cache.CODE))
    task(tmp_path / "mood")
    splits_of(options(tmp_path), tokenizer)
    num_earlier = len(num_made)
    num_expected, change = CHANGES[what]
    data, changed, seed = change(tmp_path, tokenizer)
    splits = splits_of(data, changed, seed=seed)
    assert len(num_made) - num_earlier == num_expected
    monkeypatch.setattr(prepared, "LEAST_BYTES", 1 << 60)
    assert_same(splits, splits_of(data, changed, seed=seed))


def test_the_seed_of_a_few_shot_draw_is_in_the_key_of_train_alone(tmp_path: Path, tokenizer: Any, num_made: list[str]) -> None:
    task(tmp_path / "mood")
    draws = [splits_of(options(tmp_path, shots=2), tokenizer, seed=seed) for seed in (0, 1, 0)]
    assert len(num_made) == 4
    assert draws[0]["train"].content_hash == draws[2]["train"].content_hash != draws[1]["train"].content_hash


def test_the_modules_of_the_key_are_all_that_a_row_passes() -> None:
    """What `data/prepare` imports of this package, except files, faults, errors and settings, decides what a row becomes."""
    imported = {
        name.removeprefix("bpt_dist.").replace(".", "/")
        for module in (prepared, rows)
        for name in _own_imports(Path(module.__file__))
    }
    assert imported - {
        "config",
        "distributed/environment",
        "errors",
        "storage/fault_injection",
        "tasks/mini",
        "tasks/catalogue",
        "tasks/user_tasks",
        "tasks/mini/world",
    } <= {*token_cache.MODULES}
    assert all((Path(token_cache.__file__).parents[1] / f"{name}.py").is_file() for name in token_cache.MODULES)


def _own_imports(path: Path) -> set[str]:
    import ast

    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bpt_dist"):
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= parts if node.module in ("bpt_dist.data", "bpt_dist.tasks") else {node.module}
    return modules


def test_data_that_were_moved_are_found(tmp_path: Path, tokenizer: Any, num_made: list[str]) -> None:
    task(tmp_path / "mood")
    splits_of(options(tmp_path), tokenizer)
    shutil.copytree(tmp_path / "mood", tmp_path / "elsewhere" / "mood")
    moved = options(tmp_path / "elsewhere").model_copy(update={"cache": tmp_path / "cache"})
    splits_of(moved, tokenizer)
    assert len(num_made) == 3


def test_small_tasks_are_not_kept(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "LEAST_BYTES", 50_000)
    task(tmp_path / "mood")
    splits_of(options(tmp_path), tokenizer)
    assert not (tmp_path / "cache").exists()


def test_a_split_that_is_still_held_is_not_read_again(tmp_path: Path, tokenizer: Any) -> None:
    task(tmp_path / "mood")
    data = options(tmp_path)
    source = prepare(["mood"], data, tokenizer, splits=("train",), seed=0)[0]
    target = prepare(["mood"], data, tokenizer, splits=SPLITS, seed=0)[0]
    assert target.train is source.train
    del source, target
    assert not token_cache._held


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read through, in order."""
    names: list[str] = []
    verify = mapped_arrays._verify

    def counted(name: str, *arguments: Any) -> None:
        names.append(name)
        verify(name, *arguments)

    monkeypatch.setattr(mapped_arrays, "_verify", counted)
    return names


def handed_over(folder: Path, tokenizer: Any) -> tuple[Any, dict[str, Split]]:
    """Prepare as the first rank of a host; return what it hands over, and its splits."""
    token_cache._held.clear()
    (prepared_task,) = prepare(["mood"], options(folder), tokenizer, splits=SPLITS, seed=0)
    token_cache._held.clear()
    return {"mood": prepared_task.files}, dict(prepared_task.splits)


def test_a_file_that_was_handed_over_is_opened_without_a_look_at_rows_or_through_it(
    tmp_path: Path, tokenizer: Any, verified: list[str], num_made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task(tmp_path / "mood")
    handed_over(tmp_path, tokenizer)
    assert verified == []  # what this process has just written needs no look
    handed, expected = handed_over(tmp_path, tokenizer)
    assert len(verified) == len(SPLITS)
    monkeypatch.setattr(rows, "origin_of", None)
    (found,) = prepare(["mood"], options(tmp_path), tokenizer, splits=SPLITS, seed=0, handed=handed)
    assert (len(verified), len(num_made)) == (len(SPLITS), len(SPLITS))
    assert_same(dict(found.splits), expected)
    flat = found.train.tokens.source_ids.flat  # type: ignore[attr-defined]
    assert not flat.flags.owndata
    assert not flat.flags.writeable


@pytest.mark.parametrize("damage", ["another file", "flipped", "removed"])
def test_a_file_that_is_not_the_one_handed_over_is_not_trusted(
    damage: str, tmp_path: Path, tokenizer: Any, verified: list[str], num_made: list[str]
) -> None:
    task(tmp_path / "mood")
    handed, expected = handed_over(tmp_path, tokenizer)
    (file,) = (tmp_path / "cache" / "tokens").glob("mood-train-*")
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    if damage != "removed":
        file.write_bytes(data)  # a new file under the old name
        os.link(file, tmp_path / "keeps its number")
    (found,) = prepare(["mood"], options(tmp_path), tokenizer, splits=SPLITS, seed=0, handed=handed)
    assert_same(dict(found.splits), expected)
    assert verified.count(file.name) == (1 if damage == "another file" else 2 if damage == "flipped" else 0)
    assert len(num_made) == len(SPLITS) + (damage != "another file")


def test_where_removed_files_are_lost_nothing_stays_mapped(
    tmp_path: Path, tokenizer: Any, num_made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapped file that another host has removed from a network disk would end the process by a signal."""
    task(tmp_path / "mood")
    monkeypatch.setattr(mapped_arrays, "keeps_removed_files", lambda _: False)
    monkeypatch.setattr(mapped_arrays.mmap, "mmap", None)
    expected = splits_of(options(tmp_path), tokenizer)
    assert_same(splits_of(options(tmp_path), tokenizer), expected)
    assert len(num_made) == len(SPLITS)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def swap(file: Path) -> None:
    """Another split under this name: whole, but not what it says."""
    other = next(path for path in file.parent.iterdir() if path != file)
    shutil.copyfile(other, file)


def flip(place: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1
        file.write_bytes(data)

    return damage


@pytest.mark.parametrize("damage", [cut, empty, swap, *(flip(place / 40) for place in range(41))])
def test_a_damaged_file_is_named_and_made_again(
    damage: Callable[[Path], None], tmp_path: Path, tokenizer: Any, num_made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    task(tmp_path / "mood")
    expected = in_memory(splits_of(options(tmp_path), tokenizer))
    (file,) = (tmp_path / "cache" / "tokens").glob("mood-train-*")
    whole = file.read_bytes()
    damage(file)
    assert_same(splits_of(options(tmp_path), tokenizer), expected)
    assert [str(file) in record.getMessage() and "is damaged" in record.getMessage() for record in caplog.records] == [True]
    assert len(num_made) == 4
    assert file.read_bytes() == whole
    caplog.clear()
    assert_same(splits_of(options(tmp_path), tokenizer), expected)
    assert (len(num_made), caplog.records) == (4, [])


def no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "tokens").write_text("a file where the folder would be")


def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(token_cache.OS_FILES, "write", write)


@pytest.mark.parametrize("hinder", [no_folder, full_disk])
def test_a_folder_that_cannot_be_written_is_one_warning(
    hinder: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, tokenizer: Any, num_made: list[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    task(tmp_path / "mood")
    hinder(tmp_path, monkeypatch)
    attempts = [splits_of(options(tmp_path), tokenizer) for _ in range(2)]
    assert_same(attempts[1], attempts[0])
    assert len(num_made) == 6
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path / 'cache' / 'tokens'}: prepared data cannot be kept" in record.getMessage()
    assert "set data.cache" in record.getMessage()
    assert not list(tmp_path.glob("cache/tokens/*"))


def test_a_bad_row_is_refused_whatever_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    task(tmp_path / "mood")
    splits_of(options(tmp_path), tokenizer)
    kept_files = kept(tmp_path)
    file = tmp_path / "mood" / "test.jsonl"
    file.write_text(file.read_text().replace('"label": 1', '"label": 7', 1))
    for _ in range(2):
        with pytest.raises(DataError, match=r"test\.jsonl:2: field 'label' is 7"):
            prepare(["mood"], options(tmp_path), tokenizer, splits=("train",), seed=0)
    assert kept(tmp_path) == kept_files


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task(tmp_path / "mood")
    load = rows.load

    def overtaken(*arguments: Any, **options: Any) -> rows.Splits:
        more_rows(tmp_path, None)
        return load(*arguments, **options)

    monkeypatch.setattr(rows, "load", overtaken)
    splits_of(options(tmp_path), tokenizer)
    assert not (tmp_path / "cache").exists()


def test_data_sets_of_the_hub_are_told_apart_by_their_rows(
    tmp_path: Path, tokenizer: Any, num_made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[str] = []
    label = [0]

    def hub(name: str, config: str, *, split: str, cache_dir: str) -> Any:
        asked.append(split)
        return datasets.Dataset.from_list(
            [{"sentence1": "a", "sentence2": f"the cat w{70 + i}", "label": label[0], "idx": i} for i in range(40)]
        )

    monkeypatch.setattr("datasets.load_dataset", hub)
    data = DataConfig(cache=tmp_path)
    attempts = [splits_of(data, tokenizer, name="rte") for _ in range(2)]
    assert_same(attempts[1], attempts[0])
    assert (len(num_made), asked) == (3, ["train", "validation"] * 2)  # opened once each time, also by the one that reads rows
    label[0] = 1
    changed = splits_of(data, tokenizer, name="rte")
    assert (len(num_made), {example.label for example in changed["train"].examples}) == (6, {1})


def test_files_used_longest_ago_make_room(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task(tmp_path / "mood")
    splits_of(options(tmp_path), tokenizer)
    first = kept(tmp_path)
    now = time.time()
    for age, file in enumerate(first):
        os.utime(file, (now - 1000 * (age + 1),) * 2)
    left, young = (tmp_path / "cache" / "tokens" / f"x.safetensors.tmp-{name}" for name in ("old", "young"))
    for leftover, age in ((left, 7200), (young, 60)):
        leftover.write_bytes(b"half")
        os.utime(leftover, (now - age,) * 2)
    splits_of(options(tmp_path), tokenizer)  # all three are used, in the order train, validation, test
    train, validation, test = (next(file for file in first if f"-{split}-" in file.name) for split in SPLITS)
    assert train.stat().st_mtime_ns <= validation.stat().st_mtime_ns <= test.stat().st_mtime_ns
    for age, file in enumerate((test, validation, train)):
        os.utime(file, (now - 1000 * (age + 1),) * 2)
    monkeypatch.setattr(token_cache, "MAX_BYTES", sum(file.stat().st_size for file in first))
    splits_of(options(tmp_path, max_train_rows=10), tokenizer)
    assert train not in kept(tmp_path)
    assert {validation, test} < set(kept(tmp_path))
    assert not left.exists()
    assert young.exists()
    monkeypatch.setattr(token_cache, "MAX_BYTES", 1)
    splits_of(options(tmp_path, max_train_rows=9), tokenizer)
    (newest,) = (file for file in kept(tmp_path) if file != young)
    assert newest.name.startswith("mood-train-")


def _many_times(folder: Path, tokenizer: Any, start: Any, results: Any, *, removes: bool) -> None:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bpt_dist").addHandler(handler)
    start.wait(30)
    hashes = set()
    for round_ in range(60):
        hashes.add(tuple(split.content_hash for split in splits_of(options(folder), tokenizer).values()))
        if removes and round_ % 5 == 4:
            for file in kept(folder):
                file.unlink(missing_ok=True)
    results.put((hashes, messages))


def test_two_processes_write_and_remove_at_once(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    task(tmp_path / "mood")
    with monkeypatch.context() as without:
        without.setattr(prepared, "LEAST_BYTES", 1 << 60)
        expected = tuple(split.content_hash for split in splits_of(options(tmp_path), tokenizer).values())
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_many_times, args=(tmp_path, tokenizer, start, results), kwargs={"removes": removes})
        for removes in (False, True)
    ]
    for worker in workers:
        worker.start()
    try:
        outcomes = [results.get(timeout=60) for _ in workers]
    finally:
        for worker in workers:
            worker.join(10)
            if worker.is_alive():
                worker.kill()
    assert outcomes == [({expected}, [])] * 2
    assert not list((tmp_path / "cache" / "tokens").glob("*.tmp-*"))
