"""The script that made the shipped backbone: it runs, repeats itself, and writes a folder that loads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from bpt_dist.tasks.mini import lexicon, pretrain, skills, tokenizer, world


def test_a_few_steps_write_a_folder_that_loads_and_the_log(tmp_path: Path) -> None:
    pretrain.main(["--out", str(tmp_path / "backbone"), "--steps", "2", "--examples", "2"])
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "backbone", local_files_only=True)
    pieces = AutoTokenizer.from_pretrained(tmp_path / "backbone", local_files_only=True)
    assert model.config.vocab_size == len(pieces)
    records = [json.loads(line) for line in (tmp_path / "pretrain_log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2
    assert set(records[-1]["cluttered"]) == {skill.title for skill in skills.SKILLS}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = pretrain.Recipe(seed=1, steps=2, batch_size=4)
    first, _ = pretrain.train(recipe, tmp_path / "a.jsonl", num_examples=2)
    second, _ = pretrain.train(recipe, tmp_path / "b.jsonl", num_examples=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_matching_heads_look_for_the_same_word_elsewhere() -> None:
    """The mean logit of a word against itself is the constant of the recipe, against another word about zero."""
    torch.manual_seed(0)
    model = pretrain.new_model(pretrain.Recipe(), 300)
    attention = model.encoder.block[0].layer[0].SelfAttention
    hidden = torch.nn.functional.normalize(torch.randn(200, model.config.d_model), dim=-1) * model.config.d_model**0.5
    query, key = (layer(hidden)[:, : model.config.d_kv] for layer in (attention.q, attention.k))
    logits = query @ key.T
    assert logits.diagonal().mean().item() == pytest.approx(pretrain.SAME_WORD_LOGIT, rel=0.15)
    assert logits.fill_diagonal_(0.0).mean().abs().item() < 0.1


def test_instructions_fit_into_a_prompt_and_are_answered_with_a_word_of_their_class() -> None:
    rng = random.Random(0)
    for skill in skills.SKILLS:
        for _ in range(50):
            text, answer = skills.instruct(rng, skill)
            instruction = text[: min(text.index(fields[0]) for fields in skill.kind if fields[0] in text)].split()
            assert len(instruction) <= skills.MAX_INSTRUCTION + 1  # and a name
            assert set(skill.name.split()) <= set(instruction)
            if skill.num_labels:
                assert any(answer in words for words in lexicon.LABEL_WORDS[: skill.num_labels])


def test_answer_words_belong_to_one_class_and_tasks_use_them_so() -> None:
    words = [word for row in lexicon.LABEL_WORDS for word in row]
    assert len(words) == len(set(words))
    for task in world.ALL_TASKS.values():
        assert all(word in lexicon.LABEL_WORDS[index] for index, word in enumerate(task.label_words))


def test_distractors_cannot_be_meant() -> None:
    """An instruction that fitted the fields as well would make the answer ambiguous."""
    rng = random.Random(0)
    for skill in skills.SKILLS:
        fitting = {other.name for other in skills.SKILLS if other.kind is skill.kind}
        for words in (words for _ in range(50) for words in skills.distractors(rng, skill)):
            assert " ".join(words).removesuffix(" ;") not in fitting


def test_span_corruption_hides_words_that_its_answer_gives_back() -> None:
    rng = random.Random(0)
    for _ in range(200):
        source, answer = skills.corrupted(rng)
        spans, current = {}, ""
        for word in answer.split():
            if word.startswith("<extra_id_"):
                current = word
                spans[current] = []
            else:
                spans[current].append(word)
        assert all(spans.values())
        assert [word for word in source.split() if word.startswith("<extra_id_")] == list(spans)


def test_pretraining_texts_have_no_unknown_pieces() -> None:
    rng, pieces = random.Random(0), tokenizer.build()
    pairs = [skills.instructed(rng, progress=1.0, clutter=1.0) for _ in range(500)]
    pairs += [skills.corrupted(rng) for _ in range(500)]
    for text, answer in pairs:
        assert pieces.unk_token_id not in pieces(text).input_ids + pieces(answer).input_ids


def test_skills_are_introduced_one_by_one() -> None:
    """At the start only the first skill is asked for; half-way its share has fallen, and late skills are still unknown."""
    rng = random.Random(0)
    first = {skills.instructed(rng, progress=0.0, clutter=0.0)[0].split()[0] for _ in range(100)}
    halfway = {skills.instructed(rng, progress=0.5, clutter=0.0)[0].split()[0] for _ in range(400)}
    assert first == {"polarity"}
    assert {"polarity", "restate"} <= halfway
    assert not {"fill", "mention"} & halfway
