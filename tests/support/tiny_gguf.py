"""Tiny random models as GGUF files, written the way llama.cpp writes them; needs the package gguf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

F32 = gguf.GGMLQuantizationType.F32
CONTEXT = 64
# What `transformers` calls a part of a block -> what llama.cpp calls it.
PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GEMMA_PARTS = {**PARTS, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
# Family -> the architecture that a GGUF of it names, and settings of `transformers` beside those that all have.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"model_type": "llama", "tie_word_embeddings": True}),
    "llama, own head": ("llama", {"model_type": "llama", "tie_word_embeddings": False}),
    "llama, biases": ("llama", {"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"model_type": "llama", "rope_parameters": LLAMA3}),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16}),
    "smollm3": ("smollm3", {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", {"model_type": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 6, "head_dim": 256,
                          "query_pre_attn_scalar": 256}),
}  # fmt: skip


def pieces() -> tuple[list[str], list[int], list[str]]:
    """Return the pieces of a byte-level vocabulary, their types and merges; the last two pieces are control tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["t h", "th e", "Ġ th", "Ġth e", "i n", "Ġ Ġ", "1 2"]
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges), "<|start|>", "<|end|>"]
    return tokens, [1] * (len(tokens) - 2) + [3, 3], merges


def model_of(family: str, width: int = 32, **changes: Any) -> PreTrainedModel:
    """Return a random model of a family, whose norms and biases differ from their first values."""
    num_pieces = len(pieces()[0])
    settings = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": width // 4, "vocab_size": num_pieces,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "bos_token_id": num_pieces - 2,
        "eos_token_id": num_pieces - 1, "pad_token_id": num_pieces - 1,
        **FAMILIES[family][1],
        **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name and "gemma" not in settings["model_type"]))
    return model


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Return the parameters as llama.cpp stores them: its names, rotated rows in pairs, Gemma's norms with their 1."""
    config = model.config
    gemma = config.model_type == "gemma3_text"
    found = {}
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        array = value.numpy().copy()
        if stem in OUTER:
            target = OUTER[stem]
        else:
            _, _, block, part = stem.split(".", 3)
            target = f"blk.{block}.{(GEMMA_PARTS if gemma else PARTS)[part]}"
        if config.model_type in ("llama", "mistral", "smollm3") and target.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if target.endswith("q") else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        found[f"{target}.{suffix}"] = array + 1 if gemma and target.endswith("norm") else array
    if config.rope_parameters.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _rope_factors(config)
    return found


def _rope_factors(config: Any) -> np.ndarray:
    """Return the factors as llama.cpp computes them when it converts Llama 3.1."""
    rope, factors = config.rope_parameters, []
    for index in range(0, config.head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (index / config.head_dim)
        if wave < rope["original_max_position_embeddings"] / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wave > rope["original_max_position_embeddings"] / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write(
    path: Path,
    family: str = "llama",
    *,
    kind: gguf.GGMLQuantizationType = F32,
    keys: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    tokenizer: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Write a model of a family and return it. Matrices are stored as `kind`; `keys` are added or, with None, left out."""
    model = model_of(family)
    writer = gguf.GGUFWriter(path, FAMILIES[family][0], **options)
    tensors = tensors_of(model)
    change(tensors)
    for name, array in tensors.items():
        stored = kind if array.ndim > 1 else F32
        writer.add_tensor(name, array if stored == F32 else gguf.quantize(array, stored), raw_dtype=stored)
    facts = settings_of(model, FAMILIES[family][0]) | (vocabulary(model) if tokenizer else {}) | dict(keys or {})
    for key, value in facts.items():
        _add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def settings_of(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """Return the keys that llama.cpp writes of a configuration."""
    config = model.config
    gemma = architecture == "gemma3"
    rope = config.rope_parameters["full_attention"] if gemma else config.rope_parameters
    window = getattr(config, "sliding_window", None) if architecture in ("gemma3", "llama") else None
    own = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "rope.freq_base": float(rope["rope_theta"]),
        "attention.sliding_window": window,
    }  # fmt: skip
    return {"general.name": "Tiny", "general.license": "apache-2.0"} | {
        f"{architecture}.{key}": value for key, value in own.items()
    }


def vocabulary(model: PreTrainedModel) -> dict[str, Any]:
    """Return the keys of a byte-level tokenizer."""
    tokens, types, merges = pieces()
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": model.config.bos_token_id,
        "tokenizer.ggml.eos_token_id": model.config.eos_token_id, "tokenizer.ggml.padding_token_id": model.config.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
