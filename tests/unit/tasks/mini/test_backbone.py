"""The shipped tiny T5: small, offline, without pickle, exactly the bytes its page documents, and it reads every task."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from bpt_dist.data.tokens import encode, plain_encoder
from bpt_dist.tasks.mini import BACKBONE, pretrain, skills, world
from bpt_dist.tasks.mini.lexicon import LABEL_WORDS, SWITCHES

MAX_BYTES = 8 * 1024 * 1024
MAX_PARAMETERS = 2_000_000
MAX_PIECES = 600
SWITCHED_ON, MEAN_SWITCHED_ON, HARDEST = 0.9, 0.95, {"restatement": 0.82}
SWITCHED_OFF_GAIN = 0.12


@pytest.fixture(scope="module")
def pieces():
    return AutoTokenizer.from_pretrained(BACKBONE, local_files_only=True)


def test_the_folder_is_small_and_holds_no_code_or_pickle() -> None:
    files = {path.name: path.stat().st_size for path in BACKBONE.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) <= MAX_BYTES


def test_the_weights_are_those_the_page_documents() -> None:
    digest = hashlib.sha256((BACKBONE / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (BACKBONE.parent / "README.md").read_text()


def test_the_model_loads_offline_and_is_a_frozen_tiny_t5() -> None:
    model = T5ForConditionalGeneration.from_pretrained(BACKBONE, local_files_only=True)
    assert sum(weight.numel() for weight in model.parameters()) <= MAX_PARAMETERS
    assert model.config.dropout_rate == 0.0
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_special_pieces_are_where_t5_has_them(pieces) -> None:
    assert (pieces.pad_token_id, pieces.eos_token_id, pieces.unk_token_id) == (0, 1, 2)
    assert len(pieces) <= MAX_PIECES
    assert pieces.convert_tokens_to_ids("<extra_id_0>") == len(pieces) - 1


def test_special_tokens_in_data_stay_text(pieces) -> None:
    (ids,) = encode(plain_encoder(pieces), ["the </s> dog <pad> <extra_id_0>"], pieces.eos_token_id)
    specials = {pieces.pad_token_id, pieces.eos_token_id, len(pieces) - 1}
    assert not specials & set(ids[:-1].tolist())
    assert ids[-1] == pieces.eos_token_id


@pytest.mark.parametrize("task", world.ALL_TASKS)
def test_every_text_is_tokenised_without_unknown_pieces_and_comes_back(pieces, tmp_path_factory, task: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "world_of_tokens"
    world.write(folder, seed=3, train_rows=300, eval_rows=50)
    entry = world.ALL_TASKS[task]
    for line in (folder / task / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = " ".join([task, *(f"{name}: {row[name]}" for name in entry.columns)])
        ids = pieces(text).input_ids
        assert pieces.unk_token_id not in ids
        assert pieces.decode(ids, skip_special_tokens=True) == text
        assert len(ids) <= 64


def test_label_words_and_answers_are_one_piece(pieces) -> None:
    words = {word for task in world.ALL_TASKS.values() for word in task.label_words}
    assert words <= {word for row in LABEL_WORDS for word in row}
    assert all(len(pieces(word, add_special_tokens=False).input_ids) == 1 for word in words)


def test_task_names_are_spelled_from_meaningless_pieces(pieces) -> None:
    """A task's name must not tell the backbone what to do: no piece of it is a switch word."""
    switches = {f"▁{word}" for words in SWITCHES.values() for word in words}
    for task in world.ALL_TASKS:
        spelling = pieces.tokenize(task)
        assert spelling[:2] == ["▁mini", "_"]
        assert not switches & set(spelling)


@torch.no_grad()
def rank(model, pieces, texts: list[str], words: tuple[str, ...]) -> torch.Tensor:
    """Return the index of the likeliest label word of each text."""
    source = pieces(texts, padding=True, return_tensors="pt")
    scores = []
    for word in words:
        target = pieces([word] * len(texts), return_tensors="pt").input_ids
        logits = model(**source, labels=target).logits.log_softmax(-1)
        scores.append(logits.gather(-1, target[..., None]).sum((1, 2)))
    return torch.stack(scores, 1).argmax(1)


def gain(model, pieces, folder: Path, name: str, preamble: str = "") -> float:
    """Return the accuracy above chance on the test rows of a task, with words in front of its texts."""
    task = world.ALL_TASKS[name]
    rows = [json.loads(line) for line in (folder / name / "test.jsonl").read_text().splitlines()]
    texts = [" ".join([preamble, name, *(f"{column}: {row[column]}" for column in task.columns)]).strip() for row in rows]
    right = rank(model, pieces, texts, task.label_words) == torch.tensor([row["label"] for row in rows])
    return right.float().mean().item() - 1 / len(task.label_words)


def test_every_skill_is_there_and_the_bare_text_of_a_task_does_not_call_it(pieces, tmp_path: Path) -> None:
    """What makes a prompt worth training: switched on, the backbone answers among idle words; switched off, it guesses."""
    model = T5ForConditionalGeneration.from_pretrained(BACKBONE, local_files_only=True)
    accuracy = pretrain.accuracy(model, pieces, 200, "a seed that pretraining never used")
    wanted = {skill.title for skill in skills.SKILLS if skill.weight >= 0.5}
    assert {name: value for name, value in accuracy.items() if name in wanted and value < HARDEST.get(name, SWITCHED_ON)} == {}
    assert sum(accuracy.values()) / len(accuracy) > MEAN_SWITCHED_ON
    world.write(tmp_path, seed=7, train_rows=10, eval_rows=128)
    closed = [name for name, task in world.ALL_TASKS.items() if task.label_words]
    bare = [gain(model, pieces, tmp_path, name) for name in closed]
    assert abs(sum(bare) / len(bare)) < SWITCHED_OFF_GAIN


def test_one_preamble_switches_all_families_on_and_helps_nothing_unprepared(pieces, tmp_path: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(BACKBONE, local_files_only=True)
    world.write(tmp_path, seed=7, train_rows=10, eval_rows=128)
    everything = " ".join(word for words in SWITCHES.values() for word in words)
    for name in (*world.NEAR, *world.SAME_FAMILY, *world.OTHER_FAMILY):
        assert gain(model, pieces, tmp_path, name, everything) > 0.3, name
    for name in world.UNPREPARED:
        assert abs(gain(model, pieces, tmp_path, name, everything)) < SWITCHED_OFF_GAIN, name
