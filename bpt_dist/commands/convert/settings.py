"""From the keys of a GGUF to the configuration of `transformers`. A key that would change the model and is not known is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bpt_dist.commands.convert.header import Header
from bpt_dist.errors import ConfigError

FITTING = "llama (Llama, SmolLM2, Mistral), qwen2, qwen3, gemma3, smollm3"
ROPE_BASE = 10000.0  # what llama.cpp takes where the file names none
ROUNDING = 1e-5  # relative; the factors are stored in single precision
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3.1 to 3.3 stretch positions by these; a GGUF holds the factors that follow from them, not the numbers."""
ROPE_FACTORS = "rope_freqs.weight"
GEMMA3_27B_LAYERS = 62  # this one divides queries by another width; llama.cpp knows it by its layers, too

COMMON = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.causal", "rope.scaling.type", "expert_count", "expert_used_count",
)  # fmt: skip
OWN: dict[str, tuple[str, ...]] = {
    "llama": ("attention.sliding_window",),
    "qwen2": (),
    "qwen3": (),
    "smollm3": (),
    "gemma3": ("attention.sliding_window", "final_logit_softcapping", "rope.freq_base_swa", "rope.scaling.factor"),
}
"""Families -> the keys of their namespace that are read beside the COMMON ones."""


def model_settings(header: Header) -> dict[str, Any]:
    """Return the settings of the configuration, with `model_type`. Raises ConfigError for what is not converted."""
    family = _family(header)
    _refuse_unread(header, family)
    common = _common(header, family)
    own: dict[str, Callable[[Header, dict[str, Any]], dict[str, Any]]] = {
        "llama": _llama, "qwen2": _plain("qwen2"), "qwen3": _plain("qwen3"), "smollm3": _plain("smollm3"), "gemma3": _gemma3,
    }  # fmt: skip
    return common | own[family](header, common)


def _family(header: Header) -> str:
    family = header.architecture
    if family not in OWN:
        named = f"is of the architecture {family}" if family else "names no architecture"
        raise ConfigError(f"{header.name}: {named}, which is not converted; give a model of {FITTING}")
    if header.get(f"{family}.expert_count", 0) or any("_exps." in name for name in header.tensors):
        raise ConfigError(f"{header.name}: is a mixture of experts, which is not converted; give a dense model")
    return family


def _refuse_unread(header: Header, family: str) -> None:
    known = {f"{family}.{key}" for key in (*COMMON, *OWN[family])}
    unread = [key for key in header.keys() if key.startswith(f"{family}.") and key not in known]  # noqa: SIM118  (no mapping)
    scaling = header.get(f"{family}.rope.scaling.type", "none")
    if scaling not in ("none", "linear" if family == "gemma3" else "none"):
        unread.append(f"{family}.rope.scaling.type = {scaling}")
    if unread:
        raise ConfigError(f"{header.name}: has settings that are not converted ({', '.join(unread)}); give a model without them")


def _common(header: Header, family: str) -> dict[str, Any]:
    def needed(key: str) -> Any:
        return _number(header, f"{family}.{key}")

    heads, width = needed("attention.head_count"), needed("embedding_length")
    head_width = _head_width(header, family, width // heads if heads > 0 else 0)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{header.name}: lacks token_embd.weight, the word embeddings; give the file of the whole model")
    return {
        "hidden_size": width,
        "num_hidden_layers": needed("block_count"),
        "intermediate_size": needed("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(header, f"{family}.attention.head_count_kv", heads),
        "head_dim": head_width,
        "rms_norm_eps": needed("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": needed("context_length"),
        "vocab_size": int(embedding.shape[-1]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(header.get(f"{family}.rope.freq_base", ROPE_BASE))},
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{f"{name}_token_id": header.get(f"tokenizer.ggml.{key}_token_id") for name, key in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    }  # fmt: skip


def _number(header: Header, key: str, default: Any = None) -> Any:
    value = header.get(key, default)
    if value is None:
        raise ConfigError(f"{header.name}: lacks {key}, without which there is no model; give another file of it")
    if not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"{header.name}: {key} is no number above 0 ({str(value)[:60]}); give a model of equal layers")
    return value


def _head_width(header: Header, family: str, default: int) -> int:
    """Return the width of a head; raises ConfigError where values have another, or only a part of it is rotated."""
    width = int(_number(header, f"{family}.attention.key_length", header.get(f"{family}.rope.dimension_count", default)))
    for key in ("attention.value_length", "rope.dimension_count"):
        other = header.get(f"{family}.{key}", width)
        if other != width:
            raise ConfigError(f"{header.name}: {family}.{key} is {other}, not the {width} of a head; give another model")
    return width


def _plain(model_type: str) -> Callable[[Header, dict[str, Any]], dict[str, Any]]:
    """Return the settings of a family that has no more of its own."""
    return lambda header, common: {"model_type": model_type} | ({"attention_bias": False} if model_type == "qwen3" else {})


def _llama(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"rope_parameters": common["rope_parameters"] | _stretched_positions(header, common)}
    window = header.get("llama.attention.sliding_window")
    if window:
        return {"model_type": "mistral", "sliding_window": int(window)} | own
    biased = {part: f"blk.0.{tensor}.bias" in header.tensors for part, tensor in (("attention", "attn_q"), ("mlp", "ffn_up"))}
    return {"model_type": "llama"} | {f"{part}_bias": has for part, has in biased.items()} | own


def _stretched_positions(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    """Return the rope settings that give the factors in the file; raises ConfigError where Llama 3's rule does not give them."""
    stored = header.tensors.get(ROPE_FACTORS)
    if stored is None:
        return {}
    factors = np.asarray(stored.data, dtype=np.float64).ravel()
    settings = {"rope_type": "llama3", "factor": round(float(factors.max(initial=0)), 6), **LLAMA3}
    expected = llama3_factors(settings, common["rope_parameters"]["rope_theta"], common["head_dim"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=ROUNDING):
        raise ConfigError(f"{header.name}: stretches positions ({ROPE_FACTORS}) by another rule than Llama 3's; give another model")
    return settings


def llama3_factors(settings: dict[str, Any], base: float, head_width: int) -> np.ndarray:
    """Return what Llama 3 divides each rotation frequency by: 1 for short waves, `factor` for long ones, smooth between."""
    length, low, high = (settings[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    waves = 2 * math.pi * base ** (np.arange(0, head_width, 2) / head_width)
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / settings["factor"] + smooth)
    return np.where(waves < length / high, 1.0, np.where(waves > length / low, settings["factor"], between))


def _gemma3(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    theta = common["rope_parameters"]["rope_theta"] if "gemma3.rope.freq_base" in header else 1e6
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if header.get("gemma3.rope.scaling.type") == "linear":
        whole |= {"rope_type": "linear", "factor": float(_number(header, "gemma3.rope.scaling.factor"))}
    near = {"rope_type": "default", "rope_theta": float(header.get("gemma3.rope.freq_base_swa", ROPE_BASE))}
    width = common["hidden_size"] // common["num_attention_heads"]
    return {
        "model_type": "gemma3_text",
        "sliding_window": int(_number(header, "gemma3.attention.sliding_window")),
        "rope_parameters": {"full_attention": whole, "sliding_attention": near},
        "query_pre_attn_scalar": width if common["num_hidden_layers"] == GEMMA3_27B_LAYERS else common["head_dim"],
        "final_logit_softcapping": header.get("gemma3.final_logit_softcapping"),
    }
