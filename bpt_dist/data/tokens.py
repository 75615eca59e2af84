"""Text to token ids, in the form a family of models reads. Text of a data set never becomes a special token.

`split_special_tokens=True` is not enough for T5: `</s>`, `<pad>` and `<extra_id_0>` are also pieces of its unigram
model, which matches them in plain text. The pieces are therefore renamed in a copy of the tokenizer; what comes out
equals SentencePiece's own encoding of the same text. Ordinary tokens that were added to a tokenizer, such as `{` or `<sep>`,
are no special ones: the copy keeps them and gives them the ids of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bpt_dist.errors import ConfigError
from bpt_dist.tasks.spec import Protocol, TaskSpec
from bpt_dist.tasks.text_to_text import ENCODED, Example, TextForm

log = logging.getLogger(__name__)
PAD_ID = 0  # every T5 pads with 0; `plain_encoder` refuses a tokenizer that does not
SENTINEL = re.compile(r"\u2581?<extra_id_\d+>")  # special in every T5, also where a tokenizer lists them as ordinary tokens


@dataclass(frozen=True)
class TokenisedTask:
    """The examples of one task and split as ids; and what was cut to fit.

    Targets end with the end token, and so do sources, unless the target continues them in one sequence (`TextForm`).

    Rows are in memory where they were just made, and else in the mapped file of the token cache.
    """

    name: str
    source_ids: Sequence[np.ndarray]
    target_ids: Sequence[np.ndarray]
    row_ids: Sequence[str]
    label_ids: tuple[np.ndarray, ...]
    num_truncated_sources: int
    num_truncated_targets: int

    def __len__(self) -> int:
        return len(self.row_ids)


def tokenise(
    spec: TaskSpec,
    examples: Sequence[Example],
    tokenizer: Any,
    max_source_length: int | None = None,
    *,
    max_target_length: int | None = None,
    protocol: Protocol = "fixed",
    form: TextForm = ENCODED,
) -> TokenisedTask:
    """Return the examples as token ids, counting what was cut.

    Lengths include the tokens a text begins or ends with and default to the task's own; a closed set of label words is never cut.
    `label_ids` holds the ids of `spec.words(protocol)`, encoded like targets, for ranking. Raises ConfigError if the tokenizer
    does not know a label word or cannot tell two of them apart.
    """
    encoder = plain_encoder(tokenizer, form)
    end = int(tokenizer.eos_token_id)
    words = encode_answers(encoder, spec.words(protocol), end, form)
    _check_label_words(spec, spec.words(protocol), words, tokenizer, encoder)
    num_source = max_source_length or spec.max_source_length
    num_target = max_target_length or _longest_target(spec, words)
    sources, cut_sources = _cut(encode_sources(encoder, [example.source for example in examples], end, form), num_source, form)
    targets, cut_targets = _cut(encode_answers(encoder, [example.target for example in examples], end, form), num_target)
    row_ids = tuple(example.row_id for example in examples)
    tokens = TokenisedTask(spec.name, sources, targets, row_ids, words, cut_sources, cut_targets)
    _report_cuts(tokens, num_source, num_target)
    return tokens


def before_answer(encoder: PlainEncoder, form: TextForm) -> str:
    """Return what an answer needs before it to become the tokens it has behind the text: a blank, or nothing.

    Engines of the SentencePiece kind put the blank before a text themselves, and those that split at blanks know none.
    """
    if not form.continues:
        return ""
    first, alone, behind = (encoder.ids(encoder.engine.encode(text, add_special_tokens=False)) for text in ("a", "b", "a b"))
    return "" if behind == first + alone else " "


def encode_answers(encoder: PlainEncoder, answers: Sequence[str], end: int, form: TextForm) -> tuple[np.ndarray, ...]:
    """Return the ids of targets or label words in the form of the model, each followed by the end token."""
    lead = before_answer(encoder, form)
    return encode(encoder, [lead + answer for answer in answers], end)


def encode_sources(encoder: PlainEncoder, texts: Sequence[str], end: int, form: TextForm) -> tuple[np.ndarray, ...]:
    """Return the ids of source texts in the form of the model, not cut: with their start token or their end token."""
    if not form.continues:
        return encode(encoder, texts, end)
    start = [] if form.start is None else [form.start]
    encodings = encoder.engine.encode_batch(list(texts), add_special_tokens=False)
    return tuple(np.asarray([*start, *encoder.ids(encoding)], dtype=np.int32) for encoding in encodings)


def cut_source(ids: np.ndarray, limit: int, form: TextForm) -> np.ndarray:
    """Return at most `limit` ids of a source text; an end token stays the last."""
    if len(ids) <= limit:
        return ids
    return ids[:limit] if form.continues else np.append(ids[: limit - 1], ids[-1])


def _check_label_words(
    spec: TaskSpec, words: Sequence[str], label_ids: Sequence[np.ndarray], tokenizer: Any, encoder: PlainEncoder
) -> None:
    """Raise ConfigError naming label words without ids, with unknown pieces, or with the ids of another word."""
    remedy = "choose words the tokenizer of the backbone knows and tells apart, or add them to it as ordinary tokens"
    problems: list[str] = []
    first_word: dict[bytes, str] = {}
    for word, ids in zip(words, label_ids, strict=True):
        pieces = " ".join(map(str, tokenizer.convert_ids_to_tokens(ids[:-1].tolist())))
        other = first_word.setdefault(ids.tobytes(), word)
        if len(ids) == 1:
            problems.append(f"{word!r} has no tokens")
        elif encoder.unknown_id in ids[:-1]:
            problems.append(f"{word!r} becomes {pieces!r}, which has unknown pieces")
        elif other != word:
            problems.append(f"{word!r} and {other!r} have the same tokens {pieces!r}")
    if problems:
        raise ConfigError(f"task {spec.name!r}: label_words: {'; '.join(problems)}; {remedy}")


def report_cuts(spec: TaskSpec, tokens: TokenisedTask, max_source_length: int | None = None) -> None:
    """Warn of what was cut when `tokens` were made, as `tokenise` does."""
    _report_cuts(tokens, max_source_length or spec.max_source_length, _longest_target(spec, tokens.label_ids))


def _longest_target(spec: TaskSpec, words: Sequence[np.ndarray]) -> int:
    return max(map(len, words), default=spec.max_target_length)


def _report_cuts(tokens: TokenisedTask, num_source: int, num_target: int) -> None:
    cuts = (("sources", tokens.num_truncated_sources, num_source), ("targets", tokens.num_truncated_targets, num_target))
    for what, num_cut, limit in cuts:
        if num_cut:
            log.warning("task %r: %d of %d %s were cut to %d tokens", tokens.name, num_cut, len(tokens), what, limit)


@dataclass(frozen=True)
class PlainEncoder:
    """A copy of a tokenizer's engine that knows no special token but the unknown one."""

    engine: Any
    tokenizer_ids: Mapping[int, int]  # ids of the tokenizer by those of the engine, where they differ
    unknown_id: int | None
    splits_words: bool  # False where the engine knows a word as a whole or not at all

    def ids(self, encoding: Any) -> list[int]:
        """Return the ids the tokenizer gives to the pieces of an encoding of the engine."""
        ids: list[int] = encoding.ids
        return [self.tokenizer_ids.get(index, index) for index in ids] if self.tokenizer_ids else ids


@lru_cache(maxsize=2)
def encoder_hash(tokenizer: Any, form: TextForm = ENCODED) -> str:
    """Return the SHA-256 of all that decides which ids a text gets: pieces and scores, normalisation, end token, form."""
    encoder = plain_encoder(tokenizer, form)
    facts = [int(tokenizer.eos_token_id), encoder.unknown_id, sorted(encoder.tokenizer_ids.items()), encoder.engine.to_str(), form]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@lru_cache(maxsize=2)
def plain_encoder(tokenizer: Any, form: TextForm = ENCODED) -> PlainEncoder:
    """Return the encoder of data text of a fast tokenizer.

    Raises ConfigError for a tokenizer without an engine, without an end token, or that pads an encoder's texts with another id.
    """
    engine = getattr(tokenizer, "backend_tokenizer", None)
    # What pads a single sequence is never read.
    if engine is None or tokenizer.eos_token_id is None or (not form.continues and tokenizer.pad_token_id != PAD_ID):
        pad = "" if form.continues else f" and pad id {PAD_ID}"
        raise ConfigError(
            f"backbone.path: its tokenizer ({type(tokenizer).__name__}) must be a fast one (tokenizer.json) "
            f"with an end token{pad}; choose a backbone with one"
        )
    state = json.loads(engine.to_str())
    added = state["added_tokens"]
    specials = {token["content"] for token in added if token["special"]} | set(tokenizer.all_special_tokens)
    ordinary = [token for token in added if not _is_special(token["content"], specials)]
    state.update(added_tokens=ordinary, post_processor=None, padding=None, truncation=None)
    _hide(state["model"], specials)
    plain = type(engine).from_str(json.dumps(state))
    # Without the special tokens, added ones beyond the model's vocabulary get other ids.
    ids = {plain.token_to_id(token["content"]): token["id"] for token in ordinary}
    moved = {index: original for index, original in ids.items() if index != original}
    return PlainEncoder(plain, moved, tokenizer.unk_token_id, state["model"]["type"] in ("Unigram", "BPE"))


def _is_special(piece: str, specials: set[str]) -> bool:
    return piece in specials or SENTINEL.fullmatch(piece) is not None


def _hide(model: dict[str, Any], specials: set[str]) -> None:
    """Rename special pieces to texts that no input can contain: no word has blanks after the splitting into words."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[_hidden(piece, specials), score] for piece, score in vocabulary]
        return
    unknown = model.get("unk_token")
    model["vocab"] = {_hidden(piece, specials): index for piece, index in vocabulary.items()}
    if unknown is not None:
        model["unk_token"] = _hidden(unknown, specials)


def _hidden(piece: str, specials: set[str]) -> str:
    return f"\x00 {piece} \x00" if _is_special(piece, specials) else piece


def encode(encoder: PlainEncoder, texts: Sequence[str], end: int) -> tuple[np.ndarray, ...]:
    """Return the ids of texts, none of them special, each followed by the end token."""
    encodings = encoder.engine.encode_batch(list(texts), add_special_tokens=False)
    return tuple(np.asarray([*encoder.ids(encoding), end], dtype=np.int32) for encoding in encodings)


def unknown_spans(encoder: PlainEncoder, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Return, for each text, the places (start, end in characters) that become the unknown piece."""
    encodings = encoder.engine.encode_batch(list(texts), add_special_tokens=False)
    return [
        [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == encoder.unknown_id]
        for encoding in encodings
    ]


def _cut(sequences: Sequence[np.ndarray], limit: int, form: TextForm = ENCODED) -> tuple[tuple[np.ndarray, ...], int]:
    """Return the sequences with at most `limit` ids, an end token kept last, and how many were longer."""
    return tuple(cut_source(ids, limit, form) for ids in sequences), sum(len(ids) > limit for ids in sequences)
