"""The configuration of a T5 from what a checkpoint's config.json says: one rule for training, planning and export.

Two facts decide the logits and are written in several ways:

- Decoder outputs are multiplied by d_model^-0.5 in T5 1.0, whose head is the table of word embeddings. T5 1.1 has a head of its own
  and does not scale: its config.json has `tie_word_embeddings: false`, or `scale_decoder_outputs: false` as transformers 5 writes.
- mT5 has a head of its own and never scales. transformers 5 writes `tie_word_embeddings: true` for every mT5, so that key is not
  read there.

Of everything else only what shapes the network is read: settings of text generation in config.json change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MT5Config, T5Config
from transformers.activations import ACT2FN

from bpt_dist.backbones.checkpoint import CONFIG, Checkpoint, first_line
from bpt_dist.backbones.families import kind_of

FAMILIES: dict[str, type[T5Config] | type[MT5Config]] = {"t5": T5Config, "mt5": MT5Config}
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets",
         "relative_attention_max_distance")  # fmt: skip
OTHERS = ("dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj", "dense_act_fn", "is_gated_act",
          "pad_token_id", "eos_token_id", "decoder_start_token_id")  # fmt: skip

READ = {*SIZES, *OTHERS, *T5Config.attribute_map, "tie_word_embeddings", "scale_decoder_outputs"}


def read_config(checkpoint: Checkpoint) -> T5Config:
    """Return the configuration of a checkpoint of the T5 family.

    Raises ConfigError for another family, quantised weights, an adapter beside them and values no T5 can have; OSError for a
    config.json that cannot be had.
    """
    kind = kind_of(checkpoint)
    if kind not in FAMILIES:
        raise checkpoint.error(
            f"is a {kind!r} model, and what is asked for here is known of T5 models only; give one whose {CONFIG} has model_type "
            "t5 or mt5"
        )
    return config_of(checkpoint, kind, checkpoint.config())


def config_of(checkpoint: Checkpoint, kind: str, facts: Mapping[str, Any]) -> T5Config:
    """Return the T5 that `facts`, a config.json of model_type `kind`, describes; raises ConfigError for values no T5 can have."""
    try:
        given: Any = FAMILIES[kind].from_dict({key: value for key, value in facts.items() if key in READ})
        values: dict[str, Any] = {name: getattr(given, name, None) for name in (*SIZES, *OTHERS)}
        scaled = kind == "t5" and bool(given.scale_decoder_outputs)
        config = T5Config(**values | {"tie_word_embeddings": scaled})
        if config.dense_act_fn not in ACT2FN:
            raise ValueError(f"feed_forward_proj: there is no activation {config.dense_act_fn!r}")
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise checkpoint.error(f"has a {CONFIG} that describes no T5 ({first_line(error)}); fix it or copy it again") from error
    for name in SIZES:
        if getattr(config, name) < 1:
            raise checkpoint.error(f"has a {CONFIG} with {name}: {getattr(config, name)}, expected 1 or more; copy it again")
    return config


def complete_tokens(config: T5Config, tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Settle which tokens begin, end and pad a target, in `config`: what it leaves open comes from the tokenizer.

    The tokenizer's end token is what targets are trained to end with, so it always ends a generated text.
    Raises ConfigError for a token the vocabulary does not have.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if config.decoder_start_token_id is None:
        config.decoder_start_token_id = config.pad_token_id
    named = {"pad_token_id": [config.pad_token_id], "decoder_start_token_id": [config.decoder_start_token_id], "eos_token_id": ends}
    for name, ids in named.items():
        good = all(type(token) is int and 0 <= token < config.vocab_size for token in ids)
        if not ids or not good:
            raise checkpoint.error(f"has {name} {ids} of {config.vocab_size} tokens; fix it in {CONFIG}")
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
