"""The tokenizer of the miniature world: a T5 unigram vocabulary of whole words, with letters to spell anything else."""

from __future__ import annotations

import string
from pathlib import Path

from transformers import T5Tokenizer

from bpt_dist.tasks.mini import lexicon as lx

NUM_SENTINELS = 16
WORD_SCORE, PIECE_SCORE, LETTER_SCORE = -4.0, -6.0, -12.0


def words() -> tuple[str, ...]:
    """Return every word that is one piece, in the order of the lexicon."""
    nouns = [noun for category, members in lx.NOUNS.items() for noun in (category, *members)]
    verbs = [verb for members in (*lx.VERBS.values(), *lx.PREDICATES.values()) for verb in members]
    opinions = [word for members in lx.OPINIONS.values() for word in members]
    tables = (
        nouns, verbs, opinions, lx.AMBIGUOUS, lx.COLOURS, lx.PLACES, lx.SINGULAR, lx.PLURAL, lx.DEGREES, lx.NEGATIONS,
        lx.FUNCTION_WORDS, lx.FIELDS, *lx.LABEL_WORDS, *lx.SWITCHES.values(), ("mini",),
    )  # fmt: skip
    return tuple(dict.fromkeys(word for table in tables for word in table))


def vocabulary() -> list[tuple[str, float]]:
    """Return the pieces with their scores: pad 0, eos 1, unk 2, words, parts of words, letters, sentinels last."""
    letters = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
    pieces = {f"▁{word}": WORD_SCORE for word in words()}
    pieces |= {syllable: PIECE_SCORE for syllable in (*lx.SYLLABLES, "s", ".", "?", "_")}
    for letter in ("▁", *letters):
        pieces.setdefault(letter, LETTER_SCORE)
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(NUM_SENTINELS))]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items(), *sentinels]


def build() -> T5Tokenizer:
    """Return the tokenizer; needs no file and no network."""
    return T5Tokenizer(vocab=vocabulary(), extra_ids=NUM_SENTINELS, model_max_length=512)


def save(folder: Path) -> None:
    """Write the files `AutoTokenizer.from_pretrained(folder)` reads."""
    build().save_pretrained(folder)
