"""Texts whose answer goes on in the same sequence: what is read is what the tokenizer makes of text, blank and answer together."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_decoder
import tiny_t5
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bpt_dist.data.tokens import encoder_hash, tokenise
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.text_to_text import ENCODED, Example, TextForm

WORDS = ("not good", "not", "good")
SPEC = TaskSpec(name="mood", summary="", kind="classification", metrics=("accuracy",), label_words=WORDS)
TEXTS = ("mood sentence: the cat sat on a <|end|> mat", "mood sentence: a bird, flew")
EXAMPLES = [Example(text, word, f"train:{number}", number) for number, (text, word) in enumerate(zip(TEXTS, WORDS, strict=False))]
CORPUS = [" ".join([*TEXTS, *WORDS, *tiny_t5.WORDS])] * 3


def sentence_piece(scheme: str) -> Tokenizer:
    """As Llama 2 (a blank before the first word, too) and Gemma (none)."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|begin|>", "<|end|>", "<unk>"]))
    return raw


TOKENIZERS = {
    "byte level": lambda: tiny_decoder.byte_level([*TEXTS, *WORDS]),
    "blank before the first word": lambda: sentence_piece("first"),
    "no blank before": lambda: sentence_piece("never"),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    raw = TOKENIZERS[request.param]()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin|>", eos_token="<|end|>")


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()


@pytest.mark.parametrize("start", [None, 0])
def test_source_and_target_together_are_one_text(tokenizer: Any, start: int | None) -> None:
    tokens = tokenise(SPEC, EXAMPLES, tokenizer, 100, form=TextForm(continues=True, start=start))
    end = tokenizer.eos_token_id
    for example, source, target in zip(EXAMPLES, tokens.source_ids, tokens.target_ids, strict=True):
        begin = 0 if start is None else 1
        assert source[:begin].tolist() == [start] * begin
        assert end not in source[begin:]  # also where the text itself writes the name of the token
        assert target[-1] == end
        assert text_of(tokenizer, [*source[begin:], *target[:-1]]) == f"{example.source} {example.target}"
    plain = EXAMPLES[1]
    own = tokenizer(f"{plain.source} {plain.target}", add_special_tokens=False).input_ids
    assert [*tokens.source_ids[1][0 if start is None else 1 :], *tokens.target_ids[1][:-1]] == own


def test_label_words_are_what_targets_are(tokenizer: Any) -> None:
    tokens = tokenise(SPEC, EXAMPLES, tokenizer, 100, form=TextForm(continues=True))
    assert [ids.tolist() for ids in tokens.label_ids[:2]] == [ids.tolist() for ids in tokens.target_ids]
    longer, shorter = tokens.label_ids[0].tolist(), tokens.label_ids[1].tolist()
    assert longer[: len(shorter) - 1] == shorter[:-1]  # they begin alike and are told apart by all their tokens
    assert len({ids.tobytes() for ids in tokens.label_ids}) == len(WORDS)


def test_a_text_that_is_cut_keeps_its_start(tokenizer: Any) -> None:
    whole, cut = (tokenise(SPEC, EXAMPLES, tokenizer, limit, form=TextForm(continues=True, start=0)) for limit in (100, 4))
    assert cut.num_truncated_sources == 2
    assert [ids.tolist() for ids in cut.source_ids] == [ids[:4].tolist() for ids in whole.source_ids]


def test_the_form_is_part_of_what_shapes_tokens(tokenizer: Any) -> None:
    forms = (TextForm(continues=True), TextForm(continues=True, start=0), TextForm(continues=True, start=1))
    assert len({encoder_hash(tokenizer, form) for form in forms}) == len(forms)


def test_only_an_encoder_needs_the_pad_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is None
    with pytest.raises(ConfigError, match="with an end token and pad id 0"):
        tokenise(SPEC, EXAMPLES, tokenizer, 100, form=ENCODED)
