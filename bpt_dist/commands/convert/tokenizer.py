"""The tokenizer that a GGUF describes, as `transformers` rebuilds it, with the two points that it leaves out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bpt_dist.commands.convert.header import Header
from bpt_dist.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
LLAMA3_SPLITS = ("llama3", "llama-v3", "llama-bpe")
SPLITS = (*LLAMA3_SPLITS, "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "gpt-2", "smollm")
"""`tokenizer.ggml.pre` of byte-level vocabularies: how texts are cut before pieces are merged."""


def build_tokenizer(header: Header, file: Path, *, num_rows: int, max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the GGUF `file`. Raises ConfigError where it has none, or one that would cut texts differently."""
    kind, split = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre", "default")
    if kind is None or not header.length("tokenizer.ggml.tokens"):
        raise ConfigError(f"{header.name}: has no tokenizer; give a GGUF file with one")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise ConfigError(
            f"{header.name}: its tokenizer is of the kind {kind}, not {BYTE_LEVEL} or {SENTENCEPIECE}; give another model"
        )
    if kind == BYTE_LEVEL and split not in SPLITS:
        raise ConfigError(
            f"{header.name}: its tokenizer cuts texts by a rule that is not converted (tokenizer.ggml.pre = {split}); give a file "
            f"with one of {', '.join(SPLITS)}"
        )
    tokenizer = _rebuilt(header, file)
    _drop_strangers(tokenizer, header.length("tokenizer.ggml.tokens"))
    if len(tokenizer) > num_rows:
        raise ConfigError(
            f"{header.name}: its tokenizer has {len(tokenizer)} pieces and its word embeddings {num_rows} rows; give a file in "
            "which they belong together"
        )
    _complete(tokenizer, split if kind == BYTE_LEVEL else None)
    tokenizer.model_max_length = max_length
    return tokenizer


def _rebuilt(header: Header, file: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    split = header.get("tokenizer.ggml.pre")
    # llama.cpp puts the begin token before texts of these vocabularies also where the file says nothing.
    implied = {"add_bos_token": True} if split in LLAMA3_SPLITS and "tokenizer.ggml.add_bos_token" not in header else {}
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
        for name, value in implied.items():
            setattr(tokenizer, name, value)
    except Exception as error:  # tokenizers raises plain Exception
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(f"{header.name}: its tokenizer cannot be rebuilt ({reason}); give another file of the model") from error
    return tokenizer


def _drop_strangers(tokenizer: PreTrainedTokenizerFast, num_pieces: int) -> None:
    """Remove pieces that the file has not: `transformers` gives byte-level vocabularies GPT-2's unknown piece if they have none."""
    from tokenizers import Tokenizer

    if len(tokenizer) > num_pieces:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < num_pieces]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _complete(tokenizer: PreTrainedTokenizerFast, split: str | None) -> None:
    """Set what `transformers` leaves out when it reads a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    if split == "smollm":  # every digit is a piece of its own, and blanks before it stay together
        digits = pre_tokenizers.Digits(individual_digits=True)
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, cut])
    if split in LLAMA3_SPLITS:  # a word that the vocabulary has is not merged from letters
        tokenizer.backend_tokenizer.model.ignore_merges = True
