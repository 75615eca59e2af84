"""From the tensors of a GGUF to the parameters of the model in `transformers`: names, and what llama.cpp did to the values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bpt_dist.commands.convert.header import Header, gguf_package
from bpt_dist.commands.convert.settings import ROPE_FACTORS
from bpt_dist.errors import ConfigError

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

Change = Callable[[np.ndarray], np.ndarray]
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA3_INNER = {
    **INNER, "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
ROTATED_IN_PAIRS = ("llama", "mistral", "smollm3")
"""llama.cpp rotates neighbours and reorders the rows of queries and keys for it; `transformers` rotates halves."""
BYTES = 4  # of a number in single precision, in which everything is stored


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, and the tensor of the file that it comes from."""

    name: str
    shape: tuple[int, ...]
    tensor: ReaderTensor
    change: Change | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in single precision."""
        return BYTES * math.prod(self.shape)

    def values(self) -> np.ndarray:
        """Return its values: dequantised by `gguf`, then put as `transformers` wants them."""
        numbers = gguf_package().dequantize(self.tensor.data, self.tensor.tensor_type)
        return numbers if self.change is None else self.change(numbers)


def parameters(header: Header, settings: Mapping[str, Any]) -> list[Parameter]:
    """Return the parameters in the order of the file. Raises ConfigError for a tensor that no parameter is made from."""
    found, strange = [], []
    for name, tensor in header.tensors.items():
        target = parameter_name(name, settings["model_type"])
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if target is not None:
            found.append(Parameter(target, shape, tensor, _change(name, settings)))
        elif name != ROPE_FACTORS:
            strange.append(name)
    if strange:
        listed = ", ".join(strange[:3]) + ("" if len(strange) <= 3 else f" and {len(strange) - 3} more")  # noqa: PLR2004
        raise ConfigError(f"{header.name}: holds tensors that {header.architecture} has not ({listed}); give a model without them")
    return found


def parameter_name(name: str, model_type: str) -> str | None:
    """Return what `transformers` calls a tensor of a GGUF, None for one that the family has not."""
    if name in OUTER:
        return OUTER[name]
    match = BLOCK.fullmatch(name)
    inner = (GEMMA3_INNER if model_type == "gemma3_text" else INNER).get(match[2]) if match else None
    return f"model.layers.{match[1]}.{inner}.{match[3]}" if match and inner else None


def _change(name: str, settings: Mapping[str, Any]) -> Change | None:
    """Return what undoes llama.cpp's change of a tensor, None where it made none."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    if settings["model_type"] in ROTATED_IN_PAIRS and part in ("attn_q", "attn_k"):
        heads = settings["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        return lambda rows: halves_from_pairs(rows, heads)
    if settings["model_type"] == "gemma3_text" and part.endswith("norm"):
        return lambda weights: weights - np.float32(1)  # Gemma adds 1 when it runs, llama.cpp when it stores
    return None


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head with those of the first members of all pairs first, those of the second members then."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def refuse_misfit(header: Header, found: list[Parameter], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError unless the parameters are exactly those of the model, of the same shapes: nothing is left at random."""
    shapes = {parameter.name: parameter.shape for parameter in found}
    for kind, names in (("lacks", expected.keys() - shapes.keys()), ("has too many:", shapes.keys() - expected.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + ("" if len(names) <= 3 else f" and {len(names) - 3} more")  # noqa: PLR2004
            raise ConfigError(f"{header.name}: {kind} {listed}; give the file of a whole {header.architecture} model")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ConfigError(
                f"{header.name}: {name} is {list(shape)} and its settings ask for {list(expected[name])}; give a file whose "
                "settings are its own"
            )
