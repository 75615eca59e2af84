"""The configuration of a decoder-only model from a checkpoint's config.json, and the tokens that begin and end its texts."""

from __future__ import annotations

from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from bpt_dist.backbones.checkpoint import CONFIG, Checkpoint, first_line
from bpt_dist.backbones.families import kind_of

# The classes of transformers, by model_type: configuration and model.
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"), "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"), "mistral": ("MistralConfig", "MistralForCausalLM"),
}  # fmt: skip
# Families whose texts begin with `bos`, also where a converted tokenizer has lost the rule that puts it there.
WANT_START = ("gemma3_text",)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings")  # fmt: skip
# Rotations that depend on the length of the whole sequence: a prompt's states then depend on the text behind it.
ROTATIONS_BY_LENGTH = ("dynamic", "longrope")


def read_config(checkpoint: Checkpoint) -> Any:
    """Return the configuration of a decoder-only checkpoint.

    Raises ConfigError for another family and for values no such model can have; OSError for a config.json that cannot be had.
    """
    kind, facts = kind_of(checkpoint), checkpoint.config()
    try:
        config = getattr(transformers, CLASSES[kind][0]).from_dict(facts)
        sizes = {name: getattr(config, name) for name in SIZES}
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise checkpoint.error(
            f"has a {CONFIG} that describes no {kind!r} model ({first_line(error)}); fix it or copy it again"
        ) from error
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise checkpoint.error(f"has a {CONFIG} with {name}: {size}, expected 1 or more; copy it again")
    return config


def model_class(config: Any) -> Any:
    """Return the class of transformers for a configuration."""
    return getattr(transformers, CLASSES[config.model_type][1])


def complete_tokens(config: Any, tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Settle which tokens end and pad a generated text, in `config`; a missing pad token is replaced by an end token.

    The tokenizer's end token is what targets are trained to end with, so it always ends a generated text.
    Raises ConfigError for a token the vocabulary does not have.
    """
    stored = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = sorted({end for end in (*stored, tokenizer.eos_token_id) if end is not None})
    if not ends or not all(type(end) is int and 0 <= end < config.vocab_size for end in ends):
        raise checkpoint.error(f"has eos_token_id {ends} of {config.vocab_size} tokens; fix it in {CONFIG}")
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    pads = [tokenizer.pad_token_id, config.pad_token_id, ends[0]]
    config.pad_token_id = next(pad for pad in pads if type(pad) is int and 0 <= pad < config.vocab_size)


def start_token(config: Any, tokenizer: Any, checkpoint: Checkpoint) -> int | None:
    """Return the token a text begins with: `bos` where the tokenizer puts it there, or where the family wants it."""
    start: int | None = tokenizer.bos_token_id
    is_put = start is not None and tokenizer("a").input_ids[:1] == [start]
    if not is_put and config.model_type not in WANT_START:
        return None
    if start is None:
        raise checkpoint.error(
            f"has a tokenizer without a bos token, with which every text of a {config.model_type!r} model begins; "
            "copy its tokenizer files again"
        )
    return start


def rotates_by_length(config: Any) -> bool:
    """Return whether the rotation of a position depends on how long the whole sequence is."""
    rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rotation.values() if isinstance(value, dict)]
    return any(part.get("rope_type", part.get("type")) in ROTATIONS_BY_LENGTH for part in (rotation, *nested))


def export_facts(config: Any) -> dict[str, Any]:
    """Return the configuration as an export records it, its sizes under the names that all families share."""
    return {
        **config.to_dict(),
        "task_type": "CAUSAL_LM",
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
    }
