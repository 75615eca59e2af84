"""Tokens of data text are never special ones, and cutting is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_t5 import make

from bpt_dist.data.tasks import TASKS
from bpt_dist.data.text_to_text import ROW_ID, Example, render_all
from bpt_dist.data.tokens import encode, plain_encoder, tokenise
from bpt_dist.errors import ConfigError

HOSTILE = (
    "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "a</s>b", "</s></s></s>", "say <pad> or </s>", "<extra_id_0",
    "extra_id_0>", "< / s >", "</S>", "\u2581</s>", "\u2581<pad>", "<pad>\x00", "x\x1b[31m</s>", "</s>\n<pad>\t<extra_id_1>",
    "\x00 </s> \x00", "\u200b</s>", "\uff1c/s\uff1e", "中文</s>", "é</s>é", "\ufb01n </s>", "  </s>  ", "</s" + ">" * 50,
)  # fmt: skip


def test_hostile_text_becomes_no_special_token_and_equals_sentencepiece(t5_tokenizer: Any, data_root: Path) -> None:
    """Independent reference: the SentencePiece model itself, which never matches control symbols in text."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(data_root / "t5-tokenizer" / "spiece.model"))
    special = set(t5_tokenizer.all_special_ids) - {t5_tokenizer.unk_token_id}
    texts = [*HOSTILE, *(f"sst2 sentence: {text} and more" for text in HOSTILE)]
    for text, ids in zip(texts, encode(plain_encoder(t5_tokenizer), texts, 1), strict=True):
        assert not special & set(ids[:-1].tolist()), text
        assert ids.tolist() == [*reference.encode(text), 1], text


def test_the_tokenizer_alone_would_let_them_in(t5_tokenizer: Any) -> None:
    """The past bug: `split_special_tokens` does not reach pieces of the unigram model."""
    assert 1 in t5_tokenizer("</s>", add_special_tokens=False, split_special_tokens=True).input_ids


def test_ordinary_text_is_encoded_as_the_tokenizer_does(t5_tokenizer: Any, data_root: Path, options: Any) -> None:
    from bpt_dist.data import rows

    examples = render_all(TASKS["cb"], rows.load(TASKS["cb"], options(root=data_root))["train"])
    tokenised = tokenise(TASKS["cb"], examples, t5_tokenizer, max_source_length=2000)
    for example, source, target in zip(examples, tokenised.source_ids, tokenised.target_ids, strict=True):
        assert source.tolist() == t5_tokenizer(example.source).input_ids
        assert target.tolist() == t5_tokenizer(example.target).input_ids


@pytest.mark.parametrize("text", HOSTILE)
def test_a_word_level_tokenizer_is_protected_too(text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path))
    (ids,) = encode(plain_encoder(tokenizer), [text], 1)
    assert not {0, 1} & set(ids[:-1].tolist())
    assert ids[-1] == 1


def sentences(*texts: str) -> list[Example]:
    rows = [{"sentence": text, "label": 1, ROW_ID: f"train:{i}"} for i, text in enumerate(texts)]
    return render_all(TASKS["sst2"], rows)


def test_cut_sources_keep_the_end_token_and_are_counted(t5_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    examples = sentences("short", "a long sentence of many words that will not fit", "short too")
    whole = tokenise(TASKS["sst2"], examples, t5_tokenizer)
    cut = tokenise(TASKS["sst2"], examples, t5_tokenizer, max_source_length=10)
    assert (whole.num_truncated_sources, whole.truncated_share) == (0, 0.0)
    assert (cut.num_truncated_sources, cut.truncated_share) == (1, pytest.approx(1 / 3))
    assert len(cut.source_ids[1]) == 10
    assert cut.source_ids[1].tolist() == [*whole.source_ids[1][:9], 1]
    assert np.array_equal(cut.source_ids[0], whole.source_ids[0])
    assert "1 of 3 sources were cut to 10 tokens" in caplog.text


def test_free_text_targets_are_cut_and_label_words_never(t5_tokenizer: Any) -> None:
    example = Example("s", "one two three four five six", "x")
    tokenised = tokenise(TASKS["squad"], [example], t5_tokenizer, max_target_length=4)
    assert (len(tokenised.target_ids[0]), tokenised.num_truncated_targets) == (4, 1)
    words = tokenise(TASKS["qqp"], [], t5_tokenizer).label_ids
    assert [t5_tokenizer.decode(ids[:-1]) for ids in words] == ["not_duplicate", "duplicate"]
    assert len(words[0]) > 2


def test_label_ids_follow_the_protocol(t5_tokenizer: Any) -> None:
    tokenised = tokenise(TASKS["mnli"], [], t5_tokenizer, protocol="attempt")
    assert [ids.tolist() for ids in tokenised.label_ids] == [t5_tokenizer(digit).input_ids for digit in "012"]
    assert tokenised.truncated_share == 0.0


def test_a_tokenizer_that_cannot_be_protected_is_refused() -> None:
    class Slow:
        eos_token_id = 1

    with pytest.raises(ConfigError, match=r"backbone.path: its tokenizer \(Slow\) must be a fast one"):
        plain_encoder(Slow())
