"""Text to token ids. Text of a data set never becomes a special token, whatever it says.

`split_special_tokens=True` is not enough for T5: `</s>`, `<pad>` and `<extra_id_0>` are also pieces of its unigram
model, which matches them in plain text. The pieces are therefore renamed in a copy of the tokenizer; what comes out
equals SentencePiece's own encoding of the same text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bpt_dist.data.spec import Protocol, TaskSpec
from bpt_dist.data.text_to_text import Example
from bpt_dist.errors import ConfigError

log = logging.getLogger(__name__)
PAD_ID = 0  # every T5 pads with 0; `plain_encoder` holds the tokenizer to it


@dataclass(frozen=True)
class TokenisedTask:
    """The examples of one task and split as ids, each ending with the end token; and what was cut to fit."""

    name: str
    source_ids: tuple[np.ndarray, ...]
    target_ids: tuple[np.ndarray, ...]
    row_ids: tuple[str, ...]
    label_ids: tuple[np.ndarray, ...]
    num_truncated_sources: int
    num_truncated_targets: int

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def truncated_share(self) -> float:
        """Return the share of examples whose source lost text, 0 to 1."""
        return self.num_truncated_sources / len(self) if len(self) else 0.0


def tokenise(
    spec: TaskSpec,
    examples: Sequence[Example],
    tokenizer: Any,
    max_source_length: int | None = None,
    *,
    max_target_length: int | None = None,
    protocol: Protocol = "fixed",
) -> TokenisedTask:
    """Return the examples as token ids, counting what was cut.

    Lengths include the end token and default to the task's own; a closed set of label words is never cut.
    `label_ids` holds the ids of `spec.words(protocol)`, encoded like targets, for ranking.
    """
    encoder = plain_encoder(tokenizer)
    end = int(tokenizer.eos_token_id)
    words = encode(encoder, spec.words(protocol), end)
    num_source = max_source_length or spec.max_source_length
    num_target = max_target_length or _longest_target(spec, words)
    sources, cut_sources = _cut(encode(encoder, [example.source for example in examples], end), num_source)
    targets, cut_targets = _cut(encode(encoder, [example.target for example in examples], end), num_target)
    row_ids = tuple(example.row_id for example in examples)
    found = TokenisedTask(spec.name, sources, targets, row_ids, words, cut_sources, cut_targets)
    _report_cuts(found, num_source, num_target)
    return found


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


@lru_cache(maxsize=2)
def encoder_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of all that decides which ids a text gets: pieces with their scores, normalisation, the end token."""
    state = plain_encoder(tokenizer).to_str()
    return hashlib.sha256(f"{int(tokenizer.eos_token_id)} {state}".encode()).hexdigest()


@lru_cache(maxsize=2)
def plain_encoder(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer's engine that knows no special token but the unknown one.

    Raises ConfigError for a tokenizer without such an engine, without an end token, or that pads with another id.
    """
    engine = getattr(tokenizer, "backend_tokenizer", None)
    if engine is None or tokenizer.eos_token_id is None or tokenizer.pad_token_id != PAD_ID:
        raise ConfigError(
            f"backbone.path: its tokenizer ({type(tokenizer).__name__}) must be a fast one (tokenizer.json) "
            f"with an end token and pad id {PAD_ID}"
        )
    state = json.loads(engine.to_str())
    specials = {token["content"] for token in state["added_tokens"]} | set(tokenizer.all_special_tokens)
    state.update(added_tokens=[], post_processor=None, padding=None, truncation=None)
    _hide(state["model"], specials)
    return type(engine).from_str(json.dumps(state))


def _hide(model: dict[str, Any], specials: set[str]) -> None:
    """Rename special pieces to texts no input can contain: blanks never survive the splitting into words."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [[_hidden(piece, specials), score] for piece, score in vocabulary]
        return
    unknown = model.get("unk_token")
    model["vocab"] = {_hidden(piece, specials): index for piece, index in vocabulary.items()}
    if unknown is not None:
        model["unk_token"] = _hidden(unknown, specials)


def _hidden(piece: str, specials: set[str]) -> str:
    return f"\x00 {piece} \x00" if piece in specials else piece


def encode(encoder: Any, texts: Sequence[str], end: int) -> tuple[np.ndarray, ...]:
    """Return the ids of texts, none of them special, each followed by the end token."""
    found = encoder.encode_batch(list(texts), add_special_tokens=False)
    return tuple(np.asarray([*each.ids, end], dtype=np.int32) for each in found)


def _cut(sequences: Sequence[np.ndarray], limit: int) -> tuple[tuple[np.ndarray, ...], int]:
    """Return the sequences with at most `limit` ids, the end token kept last, and how many were longer."""
    cut = tuple(ids if len(ids) <= limit else np.append(ids[: limit - 1], ids[-1]) for ids in sequences)
    return cut, sum(len(ids) > limit for ids in sequences)
