"""The families of models this project prompts, by what `config.json` calls them, and why another model is none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bpt_dist.backbones.checkpoint import CONFIG, Checkpoint
from bpt_dist.errors import ConfigError

ENCODER_DECODERS = ("t5", "mt5")
DECODERS = ("llama", "qwen2", "qwen3", "gemma3_text", "smollm3", "mistral")
# Keys of config.json that show what a model is.
SENSES = ("vision_config", "audio_config", "text_config", "image_token_id")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
WITHOUT_DECODER = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def kind_of(checkpoint: Checkpoint) -> str:
    """Return the model_type of a checkpoint, one of the families above.

    Raises ConfigError for any other model and for quantised weights; OSError for a config.json that cannot be had.
    """
    facts = checkpoint.config()
    kind = facts.get("model_type")
    if kind not in (*ENCODER_DECODERS, *DECODERS):
        raise unsupported(checkpoint, facts)
    if facts.get("quantization_config") is not None:
        raise checkpoint.error(
            f"has quantised weights (quantization_config in {CONFIG}), which are not read; "
            "give the checkpoint they were made from, or dequantise and save it"
        )
    if facts.get("use_bidirectional_attention"):
        raise checkpoint.error(
            f"reads a text in both directions (use_bidirectional_attention in {CONFIG}), so it is an encoder without a decoder; "
            "give a model that generates text"
        )
    return str(kind)


def unsupported(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> ConfigError:
    """Return the error for a model of no known family, with what shows that it is none."""
    kind, names = facts.get("model_type"), (*ENCODER_DECODERS, *DECODERS)
    architectures = " ".join(map(str, facts.get("architectures") or ()))
    what = ""
    if any(facts.get(key) is not None for key in SENSES):
        what = ", which reads more than text"
    elif any((facts.get(key) or 0) > 1 for key in EXPERTS):
        what = ", a mixture of experts"
    elif any(name in architectures for name in WITHOUT_DECODER):
        what = ", an encoder without a decoder"
    return ConfigError(
        f"backbone.path: {checkpoint.path} is a {kind!r} model{what}; this project prompts text models of certain families only; "
        f"choose one whose {CONFIG} has model_type {', '.join(names[:-1])} or {names[-1]}"
    )
