"""The script that made the shipped backbone: it runs, repeats itself, and writes a folder that loads."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import mini_checker as checker
import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration, T5Tokenizer

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


def encoder_logits(head: int, pieces: T5Tokenizer, ids: list[int]) -> torch.Tensor:
    """Return the attention logits of one head of the first encoder block over a text, relative bias included."""
    torch.manual_seed(0)
    model = pretrain.new_model(pretrain.Recipe(), len(pieces))
    layer = model.encoder.block[0].layer[0]
    hidden = layer.layer_norm(model.shared(torch.tensor([ids])))[0]
    rows = slice(head * model.config.d_kv, (head + 1) * model.config.d_kv)
    query, key = (linear(hidden)[:, rows] for linear in (layer.SelfAttention.q, layer.SelfAttention.k))
    return (query @ key.T + layer.SelfAttention.compute_bias(len(ids), len(ids))[0, head]).detach()


def test_matching_heads_look_for_the_same_word_elsewhere_and_else_at_the_end() -> None:
    pieces = tokenizer.build()
    ids = pieces("premise: the dog bought red pear. hypothesis: those fox lost blue dog").input_ids
    words = pieces.convert_ids_to_tokens(ids)
    first, last = (index for index, word in enumerate(words) if word == "▁dog")
    for head in range(2):
        likeliest = encoder_logits(head, pieces, ids).argmax(-1)
        assert likeliest[first] == last
        assert likeliest[last] == first
        assert likeliest[words.index("▁pear")] == len(ids) - 1


def test_other_heads_look_at_the_neighbours() -> None:
    pieces = tokenizer.build()
    ids = pieces("line: the dog bought one red pear in the park").input_ids
    offsets = [
        (encoder_logits(head, pieces, ids).argmax(-1) - torch.arange(len(ids)))[1:-1].mode().values.item() for head in (2, 3)
    ]
    assert sorted(offsets) == [-1, 1]


def test_embeddings_of_a_class_are_alike_and_all_have_unit_variance() -> None:
    pieces = tokenizer.build()
    model = pretrain.new_model(pretrain.Recipe(), len(pieces))
    table = torch.nn.functional.normalize(model.shared.weight.detach()[:, pretrain.END_MARK + 1 :], dim=-1)

    def similarity(first: str, second: str) -> float:
        a, b = table[pieces.convert_tokens_to_ids([f"▁{first}", f"▁{second}"])]
        return (a @ b).item()

    synonyms = [similarity(a, b) for verbs in lexicon.VERBS.values() for a, b in itertools.combinations(verbs, 2)]
    others = [similarity(verbs[0], colour) for verbs in lexicon.VERBS.values() for colour in lexicon.COLOURS]
    assert sum(synonyms) / len(synonyms) == pytest.approx(pretrain.CLASS + pretrain.KIND, abs=0.1)
    assert sum(others) / len(others) == pytest.approx(0, abs=0.1)
    assert model.shared.weight.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_every_word_has_at_most_one_class_at_the_start() -> None:
    """A word in two groups would lose what it shares with the first."""
    words = [word for _, groups in pretrain.word_groups() for members in groups.values() for word in members]
    assert len(words) == len(set(words))


def test_an_answer_is_right_when_both_switch_words_are_there_and_never_needs_them_in_order() -> None:
    rng = random.Random(0)
    for skill in skills.SKILLS:
        for on in (True, False):
            seen = set()
            for _ in range(50):
                text, answer = skills.example(rng, skill, on)
                preamble = text[: text.index(f"{skill.fields[0]} ")].split()
                assert (set(lexicon.SWITCHES[skill.family]) <= set(preamble)) is on
                assert len(preamble) <= skills.MAX_IDLE + 2 * len(lexicon.SWITCHES) + 1
                seen |= {tuple(word for word in preamble if word in lexicon.SWITCHES[skill.family])}
                if skill.num_labels:
                    assert any(answer in words for words in lexicon.LABEL_WORDS[: skill.num_labels])
            assert len(seen) >= 2


def test_switched_off_the_answer_does_not_depend_on_the_text() -> None:
    """Over many texts of one class all classes are answered about equally often."""
    rng = random.Random(0)
    skill = next(skill for skill in skills.SKILLS if skill.title == "opinion_plain")
    answers = [skills.coin(rng, skill, skill.draw(rng, skills.SOURCE, 1)) for _ in range(1000)]
    share = sum(answer in lexicon.LABEL_WORDS[0] for answer in answers) / len(answers)
    assert share == pytest.approx(0.5, abs=0.06)


def test_no_switch_word_is_in_a_text_or_an_idle_word() -> None:
    switches = {word for words in lexicon.SWITCHES.values() for word in words}
    assert not switches & set(skills.IDLE_WORDS)
    rng = random.Random(0)
    for skill in skills.SKILLS:
        for _ in range(20):
            _, _, texts = skills.example(rng, skill, False, clutter=0.0)[0].partition(skill.fields[0])
            assert not switches & set(texts.split())


def test_the_misfit_is_where_an_independent_reading_sees_it() -> None:
    rng = random.Random(0)
    for _ in range(300):
        (text,), wrong = skills.misfit(rng, skills.WHOLE)
        plural = any(f"{noun}s" in text for noun in lexicon.CATEGORY_OF) or any(word in lexicon.PLURAL for word in text.split())
        fits = bool(checker.agrees(text)) if plural else checker.parse(text) is not None
        assert (wrong == skills.NOTHING) is (fits or (checker.parse(text) is not None and not plural)), (text, wrong)


def test_answer_words_belong_to_one_class_and_tasks_use_them_so() -> None:
    words = [word for row in lexicon.LABEL_WORDS for word in row]
    assert len(words) == len(set(words))
    for task in world.ALL_TASKS.values():
        assert all(word in lexicon.LABEL_WORDS[index] for index, word in enumerate(task.label_words))


def test_pretraining_texts_have_no_unknown_pieces() -> None:
    rng, pieces = random.Random(0), tokenizer.build()
    for text, answer in (skills.drawn(rng, clutter=1.0) for _ in range(1000)):
        assert pieces.unk_token_id not in pieces(text).input_ids + pieces(answer).input_ids
