"""The T5 without its weights: its shapes, and what one row costs, counted on torch's meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from bpt_dist.backbones.base import DTYPES
from bpt_dist.backbones.shapes import Counted, ModelShape, RowCost, Weightless, begin_weightless, count_pass, known_config
from bpt_dist.backbones.t5.config import read_config
from bpt_dist.backbones.t5.model import PromptedT5, T5Backbone

# d_model, d_kv, heads, d_ff, layers of the published checkpoints: a plan needs no download.
_SHAPES = {
    "t5-small": (512, 64, 8, 2048, 6), "t5-base": (768, 64, 12, 3072, 12), "t5-large": (1024, 64, 16, 4096, 24),
    "t5-3b": (1024, 128, 32, 16384, 24), "t5-11b": (1024, 128, 128, 65536, 24),
    "t5-v1_1-small": (512, 64, 6, 1024, 8), "t5-v1_1-base": (768, 64, 12, 2048, 12), "t5-v1_1-large": (1024, 64, 16, 2816, 24),
    "t5-v1_1-xl": (2048, 64, 32, 5120, 24), "t5-v1_1-xxl": (4096, 64, 64, 10240, 24),
    "mt5-small": (512, 64, 6, 1024, 8), "mt5-base": (768, 64, 12, 2048, 12), "mt5-large": (1024, 64, 16, 2816, 24),
    "mt5-xl": (2048, 64, 32, 5120, 24), "mt5-xxl": (4096, 64, 64, 10240, 24),
}  # fmt: skip
_COUNTED: dict[tuple[str, str, int, int, int, bool], tuple[Counted, Counted, Counted]] = {}


@dataclass
class T5Shape(ModelShape):
    """A T5 of which only the configuration is known."""

    config: T5Config
    noun: ClassVar[str] = "T5"
    lookups: ClassVar[int] = 2  # of encoder and decoder

    @property
    def facts(self) -> dict[str, Any]:
        """The configuration as an export records it."""
        return self.config.to_dict()

    @property
    def feed_forward(self) -> tuple[int, int]:
        """The width of the model, and that inside its feed-forward layers."""
        return self.config.d_model, self.config.d_ff

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Return the encoder's and the decoder's number of blocks."""
        return int(self.config.num_layers), int(self.config.num_decoder_layers or self.config.num_layers)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the table of word embeddings."""
        # transformers 5 builds every T5 with a tied head; only this setting shows that a checkpoint has its own (`t5/config.py`).
        return bool(self.config.scale_decoder_outputs)

    def model(self, num_encoder: int | None = None, num_decoder: int | None = None) -> T5ForConditionalGeneration:
        """Return this T5 on the meta device, with all its blocks or as many as given."""
        config = copy.deepcopy(self.config)
        config.num_layers, config.num_decoder_layers = num_encoder or config.num_layers, num_decoder or config.num_decoder_layers
        config._attn_implementation = "eager"  # every matrix multiplication in sight of the counter
        with torch.device("meta"):
            model: Any = T5ForConditionalGeneration(config)
        return model.to(DTYPES[self.dtype]).eval()

    @cached_property
    def num_parameters(self) -> int:
        """Return how many numbers the checkpoint holds."""
        own_head = 0 if self.is_tied else self.config.vocab_size * self.config.d_model
        return sum(parameter.numel() for parameter in self.model().parameters()) + own_head

    def backbone(self) -> ShapeBackbone:
        """Return a replacement for the T5 while a method creates its tensors."""
        return ShapeBackbone(self)

    def row_cost(
        self, num_prompt: int, num_source: int, num_target: int, *, trains_weights: bool = False, recomputed: bool = False
    ) -> RowCost:
        """Return the cost of one row, counted from a real forward and backward pass on the meta device.

        Blocks are alike, so passes through T5s of one and two blocks give the whole: the sums are exact. `recomputed` blocks are
        run forward twice, and all but one of each stack keep their input only.
        """
        if recomputed:
            return self._recomputed_cost(num_prompt, num_source, num_target, trains_weights)
        one, wider, deeper = self._counts(num_prompt, num_source, num_target, trains_weights)
        encoder, decoder = (number - 1 for number in self.num_blocks)
        return RowCost(*(a + encoder * (b - a) + decoder * (c - a) for a, b, c in zip(one, wider, deeper, strict=True)))

    def prediction_bytes(self, num_prompt: int, num_source: int, num_nodes: int, attention: str, kind: str = "cpu") -> int:
        """Return the bytes that a pass without gradients has at once for each text of so many tokens behind its prompt.

        The encoder's positions decide, in the layer of a block that takes most, whatever `num_nodes` of candidates there are.
        Hidden states are float32: those that came in, and those that are added to.
        """
        config, size, num_positions = self.config, self.item_bytes, num_prompt + num_source
        width, inner, heads = config.d_model, config.d_ff, config.num_heads * config.d_kv
        # Queries, keys and values, what was read of them twice (by group and joined), and what is added.
        # A CPU adds a term in bf16 to float32 through a copy of it in float32.
        added = width * (1 if kind == "cuda" or size == torch.float32.itemsize else 1 + torch.float32.itemsize // size)
        attended = 5 * heads + added
        if attention == "eager":
            # Scores and their softmax, beside queries, keys and values in the order of the heads.
            attended = max(attended, 5 * heads + 2 * config.num_heads * num_positions)
        # Both halves, and what `gelu_new` needs for one of them: a product and two terms of its sum.
        fed = max(5 * inner, 3 * inner + added) if config.is_gated_act else inner + added
        return num_positions * (2 * width * torch.float32.itemsize + size * max(attended, fed))

    def _recomputed_cost(self, num_prompt: int, num_source: int, num_target: int, trains_weights: bool) -> RowCost:
        kept = self.row_cost(num_prompt, num_source, num_target, trains_weights=trains_weights)
        one, wider, deeper = self._counts(num_prompt, num_source, num_target, trains_weights)
        encoder, decoder = self.num_blocks
        again = encoder * (wider[0] - one[0]) + decoder * (deeper[0] - one[0])
        inputs = (encoder - 1) * (num_prompt + num_source) + (decoder - 1) * num_target
        activations = one[2] + inputs * self.config.d_model * self.item_bytes
        return RowCost(kept.forward_flops, kept.backward_flops + again, activations)

    def _counts(self, num_prompt: int, num_source: int, num_target: int, trains_weights: bool) -> tuple[Counted, Counted, Counted]:
        """Return what T5s of (encoder, decoder) blocks (1, 1), (2, 1) and (1, 2) take; runs that are alike are counted once."""
        key = (self.config.to_json_string(), self.dtype, num_prompt, num_source, num_target, trains_weights)
        if key not in _COUNTED:
            one, wider, deeper = (self._count(*key[2:], *blocks) for blocks in ((1, 1), (2, 1), (1, 2)))
            _COUNTED[key] = one, wider, deeper
        return _COUNTED[key]

    def _count(
        self, num_prompt: int, num_source: int, num_target: int, trains_weights: bool, num_encoder: int, num_decoder: int
    ) -> Counted:
        model = self.model(num_encoder, num_decoder).requires_grad_(trains_weights)
        width, meta = self.config.d_model, torch.device("meta")
        prompt = torch.zeros(1, num_prompt, width, device=meta, requires_grad=True)
        text = torch.zeros(1, num_source, width, device=meta, dtype=model.dtype)
        targets = torch.zeros(1, num_target, device=meta, dtype=torch.long)

        def logits() -> Tensor:
            inputs = torch.cat([prompt.to(model.dtype), text], dim=1)
            found: Tensor = model(inputs_embeds=inputs, decoder_input_ids=targets, use_cache=False).logits
            return found

        return count_pass(model, logits)


class ShapeBackbone(Weightless, T5Backbone):
    """A replacement for the T5 while a method creates its tensors."""

    def __init__(self, shape: T5Shape) -> None:
        begin_weightless(self, PromptedT5(shape.model().requires_grad_(False)), shape.config.vocab_size)


def shape_of(path: str, *, revision: str | None = None, dtype: str = "fp32", ask_hub: bool = True) -> T5Shape:
    """Return the shape of a T5, by `known_config`; raises ConfigError for another family, and where nothing knows it."""
    return T5Shape(known_config(path, revision, read=read_config, published=published, ask_hub=ask_hub), dtype)


def published(name: str) -> T5Config | None:
    """Return the configuration of a published checkpoint by its name; LM-adapted ones have the shapes of version 1.1."""
    name = name.replace("t5-base-lm-adapt", "t5-v1_1-base").replace("t5-large-lm-adapt", "t5-v1_1-large")
    name = name.replace("t5-small-lm-adapt", "t5-v1_1-small").replace("t5-xl-lm-adapt", "t5-v1_1-xl")
    if name not in _SHAPES:
        return None
    width, head, num_heads, inner, layers = _SHAPES[name]
    newer = "v1_1" in name or name.startswith("mt5")
    num_pieces = 250112 if name.startswith("mt5") else 32128
    facts: dict[str, Any] = {
        "vocab_size": num_pieces, "d_model": width, "d_kv": head, "num_heads": num_heads, "d_ff": inner, "num_layers": layers,
        "num_decoder_layers": layers, "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu" if newer else "relu", "tie_word_embeddings": not newer,
    }  # fmt: skip
    return T5Config(**facts)
