"""Changes of a stored T5, as checkpoints in the world have them: each returns what a refusal may name, None where it must load."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from stored_t5 import StoredT5

TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A mutation changes a stored T5 and returns what a refusal may name, or None where there is nothing to refuse.
Mutation = Callable[[StoredT5, random.Random], "list[str] | None"]


def drop(t5: StoredT5, draw: random.Random) -> list[str] | None:
    names = draw.sample(sorted(t5.tensors), draw.randint(1, 3))
    for name in names:
        del t5.tensors[name]
    return names


def rename(t5: StoredT5, draw: random.Random) -> list[str] | None:
    name = draw.choice(sorted(t5.tensors))
    t5.tensors[f"{name}.{draw.choice(['old', 'ema', '0'])}"] = t5.tensors.pop(name)
    return [name]


def swap_blocks_for_layers(t5: StoredT5, draw: random.Random) -> list[str] | None:
    stack = draw.choice(["encoder", "decoder"])
    t5.tensors = {name.replace(f"{stack}.block.", f"{stack}.layers."): tensor for name, tensor in t5.tensors.items()}
    return [f"{stack}.block", f"{stack}.layers"]


def prefix(t5: StoredT5, draw: random.Random) -> list[str] | None:
    added = draw.choice(["model.", "module.", "transformer.", "base_model.model.", "t5.net."])
    t5.tensors = {f"{added}{name}": tensor for name, tensor in t5.tensors.items()}
    return [repr(added)]


def reshape(t5: StoredT5, draw: random.Random) -> list[str] | None:
    name = draw.choice(sorted(t5.tensors))
    tensor = t5.tensors[name]
    changes = [tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor.flatten()[None], tensor[None]]
    t5.tensors[name] = draw.choice(changes).clone()
    return [name]


def other_size(t5: StoredT5, draw: random.Random) -> list[str] | None:
    key = draw.choice(["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
                       "relative_attention_num_buckets"])  # fmt: skip
    t5.config[key] = draw.choice([max(1, t5.config[key] - 1), t5.config[key] + 1, 2 * t5.config[key]])
    return ["shape", "lacks", "no place for", "pieces", "eos_token_id"]


def other_feed_forward(t5: StoredT5, _draw: random.Random) -> list[str] | None:
    gated = not t5.config["is_gated_act"]
    t5.config |= {"is_gated_act": gated, "feed_forward_proj": "gated-gelu" if gated else "relu"}
    return ["DenseReluDense"]


def broken_config(t5: StoredT5, draw: random.Random) -> list[str] | None:
    key = draw.choice(["d_model", "num_layers", "vocab_size", "layer_norm_epsilon", "num_heads"])
    t5.config[key] = draw.choice(["many", [3], {"a": 1}])
    return [key]


def other_dtype(t5: StoredT5, draw: random.Random) -> list[str] | None:
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float64])
    t5.tensors = {name: tensor.to(dtype) if draw.random() < 0.7 else tensor for name, tensor in t5.tensors.items()}
    return None


def integers(t5: StoredT5, draw: random.Random) -> list[str] | None:
    name = draw.choice(sorted(t5.tensors))
    t5.tensors[name] = t5.tensors[name].to(draw.choice([torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn]))
    return [name]


def extra(t5: StoredT5, draw: random.Random) -> list[str] | None:
    place = f"encoder.block.0.layer.0.SelfAttention.{draw.choice('qkvo')}"
    name = draw.choice([f"{place}.lora_B.weight", f"{place}.weight_scale", f"{place}.bias", "classifier.dense.weight", "step"])
    t5.tensors[name] = torch.zeros(2, 2)
    return [name]


def known_extra(t5: StoredT5, _draw: random.Random) -> list[str] | None:
    t5.tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
    return None


def copies_of_the_table(t5: StoredT5, draw: random.Random) -> list[str] | None:
    for name in draw.sample(TABLES[1:], draw.randint(1, 2)):
        t5.tensors[name] = t5.tensors["shared.weight"].clone()
    if draw.random() < 0.5:
        del t5.tensors["shared.weight"]
    return None


def other_table(t5: StoredT5, draw: random.Random) -> list[str] | None:
    name = draw.choice(TABLES[1:])
    t5.tensors[name] = t5.tensors["shared.weight"] + 1
    return [name]


def other_head(t5: StoredT5, _draw: random.Random) -> list[str] | None:
    has_head = "lm_head.weight" in t5.tensors
    t5.tensors["lm_head.weight"] = t5.tensors["shared.weight"] + 1
    return None if has_head else ["lm_head.weight"]


def other_tie(t5: StoredT5, _draw: random.Random) -> list[str] | None:
    t5.config["tie_word_embeddings"] = "lm_head.weight" in t5.tensors
    t5.config.pop("scale_decoder_outputs", None)
    return None if t5.config["model_type"] == "mt5" else ["lm_head.weight"]


def adapter_beside(t5: StoredT5, draw: random.Random) -> list[str] | None:
    t5.files["adapter_model.safetensors"] = save({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)})
    if draw.random() < 0.3:
        return None
    t5.files["adapter_config.json"] = json.dumps({"peft_type": "LORA", "r": 2}).encode()
    return ["adapter_config.json"]


def generation_beside(t5: StoredT5, draw: random.Random) -> list[str] | None:
    settings: list[dict[str, Any]] = [{"num_beams": 3}, {"min_length": 7}, {"repetition_penalty": 2.0}, {"eos_token_id": [1, 7]},
                                      {"forced_bos_token_id": 9}, {"do_sample": True, "temperature": 5.0}]  # fmt: skip
    setting = draw.choice(settings)
    if draw.random() < 0.5:
        t5.files["generation_config.json"] = json.dumps(setting).encode()
    else:
        t5.config |= setting
    return None


def shards(t5: StoredT5, draw: random.Random) -> list[str] | None:
    t5.split(draw.randint(1, 4))
    return None


def damaged_shards(t5: StoredT5, draw: random.Random) -> list[str] | None:
    t5.split(3)
    file = draw.choice(sorted(t5.shards))
    kind = draw.choice(["empty", "torn", "tensor left out", "second set", "stray"])
    content = save({name: t5.tensors[name] for name in t5.shards[file]})
    if kind == "second set":
        t5.files["model.safetensors"] = save(t5.tensors)
        return ["two sets of weights"]
    if kind == "stray":
        t5.files["model-00001-of-00009.safetensors"] = content
        return ["model-00001-of-00009.safetensors"]
    if kind == "tensor left out":
        t5.files[file] = save({name: t5.tensors[name] for name in t5.shards[file][1:]})
        return [t5.shards[file][0]]
    t5.files[file] = content[: len(content) // 3] if kind == "torn" else b""
    return [file]


def stale_index(t5: StoredT5, _draw: random.Random) -> list[str] | None:
    locations = dict.fromkeys(t5.tensors, "model-00001-of-00001.safetensors")
    t5.files["model.safetensors.index.json"] = json.dumps({"weight_map": locations}).encode()
    return ["model.safetensors.index.json"]


def torn(t5: StoredT5, draw: random.Random) -> list[str] | None:
    content = save(t5.tensors)
    t5.files["model.safetensors"] = content[: draw.randint(0, len(content) - 1)]
    return ["model.safetensors"]


MUTATIONS: list[Mutation] = [
    drop, rename, swap_blocks_for_layers, prefix, reshape, other_size,
    other_feed_forward, broken_config, other_dtype, integers, extra, known_extra,
    copies_of_the_table, other_table, other_head, other_tie, adapter_beside, generation_beside,
    shards, damaged_shards, stale_index, torn,
]  # fmt: skip
# With sizes that fit by chance, or kinds that both exist, loading is right as well; what was loaded is compared all the same.
MAY_FIT = (drop, other_size)
