"""Tokens of data text are never special ones, added ordinary tokens are used, and cutting is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rendered import render_all
from tiny_t5 import make

from bpt_dist.data.tokens import encode, plain_encoder, tokenise
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.text_to_text import ROW_ID, Example

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


ADDED = ("{", "}", "<", "~", "<sep>", "wide  gap", "\n", "caf\u00e9", "\u4e2d\u6587")
TEXTS_WITH_ADDED = (
    "{", "}", "a {b} c", "{}", "if x < y then { z } ~", "<sep>", "one<sep>two", "one <sep> two", "a wide  gap here", "a\nb",
    "un caf\u00e9 noir", "\u4e2d\u6587", "x\u4e2d\u6587x", "  {  ", "{" * 20, "no added token at all",
)  # fmt: skip


def with_added(tokenizer: Any, tmp_path: Path, tokens: tuple[Any, ...] = ADDED) -> Any:
    """Return the tokenizer with added ordinary tokens, as its files give it back."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "plain")
    changed = AutoTokenizer.from_pretrained(tmp_path / "plain")
    changed.add_tokens(list(tokens))
    changed.save_pretrained(tmp_path / "added")
    return AutoTokenizer.from_pretrained(tmp_path / "added")


def test_added_ordinary_tokens_are_encoded_as_the_tokenizer_does(t5_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_added(t5_tokenizer, tmp_path)
    encoded = encode(plain_encoder(tokenizer), TEXTS_WITH_ADDED, 1)
    for text, ids in zip(TEXTS_WITH_ADDED, encoded, strict=True):
        assert ids.tolist() == tokenizer(text).input_ids, text
    assert set(tokenizer.convert_tokens_to_ids(list(ADDED))) <= {int(i) for ids in encoded for i in ids}


@pytest.mark.parametrize("options", [{"single_word": True}, {"lstrip": True}, {"rstrip": True}, {"normalized": False}])
def test_the_way_an_added_token_matches_is_kept(options: dict[str, bool], t5_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AddedToken

    tokenizer = with_added(t5_tokenizer, tmp_path, (AddedToken("{", **options), AddedToken("TAG", **options)))
    texts = ("{", "a {b", "a { b", "a{b", "TAG", "aTAGb", "a TAG b")
    for text, ids in zip(texts, encode(plain_encoder(tokenizer), texts, 1), strict=True):
        assert ids.tolist() == tokenizer(text).input_ids, text


def test_added_tokens_behind_special_ones_keep_their_ids(tmp_path: Path) -> None:
    """Special tokens beyond the vocabulary take ids; without them an engine counts on from its vocabulary."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(make(tmp_path / "t5"))
    plain.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    tokenizer = with_added(plain, tmp_path, ("{", "zebra"))
    assert tokenizer.convert_tokens_to_ids("{") == 130
    texts = ("{", "the zebra sat {", "the cat")
    for text, ids in zip(texts, encode(plain_encoder(tokenizer), texts, 1), strict=True):
        assert ids.tolist() == tokenizer(text).input_ids, text
    (ids,) = encode(plain_encoder(tokenizer), ["{ <extra_id_0> </s> <extra_id_1>"], 1)
    assert not {0, 128, 129} & set(ids.tolist())


def test_special_text_stays_text_beside_added_tokens(t5_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_added(t5_tokenizer, tmp_path)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    texts = [*HOSTILE, *(f"{{{text}}} <sep>{text}" for text in HOSTILE)]
    for text, ids in zip(texts, encode(plain_encoder(tokenizer), texts, 1), strict=True):
        assert not special & set(ids[:-1].tolist()), text


def test_sentinels_listed_as_ordinary_tokens_stay_text(t5_tokenizer: Any, tmp_path: Path) -> None:
    """Some checkpoints list <extra_id_0> as an ordinary token, and mT5 has it as the piece of a word."""
    tokenizer = with_added(t5_tokenizer, tmp_path)
    state = json.loads((tmp_path / "added" / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and not token["content"].startswith("<extra_id_")
    settings = json.loads((tmp_path / "added" / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if "special_tokens" not in key and key != "extra_ids"}
    (tmp_path / "added" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "added" / "tokenizer.json").write_text(json.dumps(state))
    from transformers import PreTrainedTokenizerFast

    changed = PreTrainedTokenizerFast.from_pretrained(tmp_path / "added")
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert sentinel not in changed.all_special_ids
    (ids,) = encode(plain_encoder(changed), ["a <extra_id_0> b <extra_id_1>"], 1)
    assert sentinel not in ids


def own_words(*words: str) -> TaskSpec:
    return replace(TASKS["sst2"].with_folder(Path("x")), name="own", label_words=words, label_values=tuple(range(len(words))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("\u8d1f\u9762", "\u6b63\u9762"), "'\u8d1f\u9762' becomes '\u2581 <unk>', which has unknown pieces"),
        (("good", "bad {"), "'bad {' becomes"),
        (("very  good", "very good"), "'very good' and 'very  good' have the same tokens"),
        (("\uff47ood", "good"), "'good' and '\uff47ood' have the same tokens"),  # NFKC
        (("e\u0301t\u00e9", "\u00e9t\u00e9"), "have the same tokens"),
        (("good", "\u200b"), "has no tokens"),
    ],
)  # fmt: skip
def test_label_words_that_cannot_be_told_apart_are_refused(words: tuple[str, ...], message: str, t5_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"task 'own': label_words: ") as error:
        tokenise(own_words(*words), [], t5_tokenizer)
    assert message in str(error.value)
    assert "choose words" in str(error.value)


def test_label_words_that_differ_in_case_alone_are_refused_where_the_tokenizer_drops_it(t5_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lower = AutoTokenizer.from_pretrained(make(tmp_path))
    with pytest.raises(ConfigError, match="'Good' and 'good' have the same tokens 'good'"):
        tokenise(own_words("good", "Good"), [], lower)
    assert len(tokenise(own_words("good", "Good"), [], t5_tokenizer).label_ids) == 2


def test_added_label_words_are_accepted(t5_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_added(t5_tokenizer, tmp_path)
    words = tokenise(own_words("{", "}", "\u4e2d\u6587"), [], tokenizer).label_ids
    assert [ids.tolist() for ids in words] == [tokenizer(word).input_ids for word in ("{", "}", "\u4e2d\u6587")]


def sentences(*texts: str) -> list[Example]:
    rows = [{"sentence": text, "label": 1, ROW_ID: f"train:{i}"} for i, text in enumerate(texts)]
    return render_all(TASKS["sst2"], rows)


def test_cut_sources_keep_the_end_token_and_are_counted(t5_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    examples = sentences("short", "a long sentence of many words that will not fit", "short too")
    whole = tokenise(TASKS["sst2"], examples, t5_tokenizer)
    cut = tokenise(TASKS["sst2"], examples, t5_tokenizer, max_source_length=10)
    assert whole.num_truncated_sources == 0
    assert cut.num_truncated_sources == 1
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


def test_a_tokenizer_that_cannot_be_protected_is_refused() -> None:
    class Slow:
        eos_token_id = 1

    with pytest.raises(ConfigError, match=r"backbone.path: its tokenizer \(Slow\) must be a fast one"):
        plain_encoder(Slow())
