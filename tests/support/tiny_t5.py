"""A tiny random T5 with a word-level tokenizer, as a folder: built in the test, no network, loads in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import MT5Config, MT5ForConditionalGeneration, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = (
    "sentence premise hypothesis question text : the a cat dog bird sat ran flew on mat yes no maybe good bad true false "
    "entailment neutral contradiction positive negative not is was red blue green one two three "
    "not_entailment 0 1 2 3 4"
).split()


def make(
    folder: Path, *, tied: bool = True, width: int = 32, layers: int = 2, seed: int = 0, gated: bool = False, mt5: bool = False
) -> Path:
    """Write config, weights and tokenizer of a T5 (or mT5) with vocabulary 128 into `folder` and return it."""
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), 128)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = (MT5Config if mt5 else T5Config)(
        vocab_size=128,
        d_model=width,
        d_kv=width // 4,
        num_heads=4,
        d_ff=2 * width,
        num_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
        **({"feed_forward_proj": "gated-gelu"} if gated or mt5 else {}),
    )
    model = (MT5ForConditionalGeneration if mt5 else T5ForConditionalGeneration)(config)
    if not tied:  # transformers ties T5 whatever the flag says; a really untied head needs its own tensor
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    model.save_pretrained(folder)
    return folder
