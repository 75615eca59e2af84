"""A decoder-only model without its weights: its shapes, and what a prompt and a text cost, counted on torch's meta device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from bpt_dist.backbones.attention import plain_attention
from bpt_dist.backbones.base import DTYPES
from bpt_dist.backbones.candidates import MOST_LOGITS
from bpt_dist.backbones.decoder.attention import PromptsAndTexts
from bpt_dist.backbones.decoder.config import CLASSES, export_facts, model_class
from bpt_dist.backbones.decoder.layout import ONLY_EACH_TOKEN, Layout
from bpt_dist.backbones.decoder.model import DecoderBackbone, PromptedDecoder
from bpt_dist.backbones.decoder.packed import PackedDecoder, logits_of
from bpt_dist.backbones.shapes import Counted, ModelShape, RowCost, Weightless, begin_weightless, count_pass

# model_type, width, inner, layers, heads, key-value heads, head width, pieces of models that configurations of this project name:
# a plan needs neither a conversion nor a download.
_SHAPES = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49_152),
    "smollm2-360m": ("llama", 960, 2560, 32, 15, 5, 64, 49_152),
    "gemma3-270m": ("gemma3_text", 640, 2048, 18, 4, 1, 256, 262_144),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128_256),
}
_COUNTED: dict[Any, list[Counted]] = {}


@dataclass
class DecoderShape(ModelShape):
    """A decoder-only model of which only the configuration is known."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The configuration as an export records it."""
        return export_facts(self.config)

    @property
    def num_blocks(self) -> tuple[int]:
        """The number of layers of the one stack."""
        return (int(self.config.num_hidden_layers),)

    @property
    def feed_forward(self) -> tuple[int, int]:
        """The width of the model, and that inside its feed-forward layers."""
        return int(self.config.hidden_size), int(self.config.intermediate_size)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the table of word embeddings."""
        return bool(self.config.tie_word_embeddings)

    def model(self, num_layers: int | None = None) -> Any:
        """Return this model on the meta device, with all its layers or the first ones."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = num_layers or config.num_hidden_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        config._attn_implementation = "eager"  # every matrix multiplication in sight of the counter
        with torch.device("meta"):
            model = model_class(config)(config)
        return model.to(DTYPES[self.dtype]).eval()

    @cached_property
    def num_parameters(self) -> int:
        """How many numbers the checkpoint holds: a tied head is the table of word embeddings."""
        model = self.model()
        head = model.lm_head.weight
        tied = self.config.tie_word_embeddings and head is not model.model.embed_tokens.weight
        return sum(parameter.numel() for parameter in model.parameters()) - (head.numel() if tied else 0)

    def backbone(self) -> DecoderBackbone:
        """Return a replacement for the model while a method creates its tensors."""
        return WeightlessDecoder(self)

    def row_cost(
        self, num_prompt: int, num_source: int, num_target: int, *, trains_weights: bool = False, recomputed: bool = False
    ) -> RowCost:
        """Return the cost of one text with its prompt through transformers' modules; layers are alike, so two give the whole."""
        width, positions = self.feed_forward[0], num_prompt + num_source + num_target - 1

        def count(num_layers: int) -> Counted:
            model = self.model(num_layers).requires_grad_(trains_weights)
            rows = torch.zeros(1, positions, width, device="meta", requires_grad=True)
            return count_pass(model, lambda: _stock_logits(model, rows, num_target))

        one, two = self._counted(("row", positions, num_target, trains_weights), lambda: [count(1), count(2)])
        return self._whole(one, two, positions, recomputed=recomputed)

    def _whole(self, one: Counted, two: Counted, positions: int, *, recomputed: bool) -> RowCost:
        """Return the cost of a pass of so many positions from that of one layer and of two."""
        more = self.num_blocks[0] - 1
        kept = RowCost(*(a + more * (b - a) for a, b in zip(one, two, strict=True)))
        if not recomputed:
            return kept
        again, width = self.num_blocks[0] * (two[0] - one[0]), self.feed_forward[0]
        return RowCost(kept.forward_flops, kept.backward_flops + again, one[2] + more * positions * width * self.item_bytes)

    def shared_costs(
        self, num_prompt: int, num_source: int, num_target: int, *, recomputed: bool = False
    ) -> tuple[RowCost, RowCost]:
        """Return the cost of a prompt, once a pass, and of a text that reads it, from our own pass over one text and over two."""
        width, own = self.feed_forward[0], num_source + num_target - 1

        def count(num_layers: int, num_texts: int) -> Counted:
            model = self.model(num_layers).requires_grad_(False)
            layout = Layout((1, 1, num_prompt), [0] * num_texts, [num_source] * num_texts, [num_target - 1] * num_texts)
            tokens = torch.zeros(num_prompt + num_texts * own, width, device="meta", requires_grad=True)
            packed = PackedDecoder(model, plain_attention)

            def logits() -> Tensor:
                states = packed.run(tokens, layout.positions(), PromptsAndTexts(layout, plain_attention), ONLY_EACH_TOKEN)
                return logits_of(model, states[: num_texts * num_target])

            return count_pass(model, logits)

        key = ("shared", num_prompt, num_source, num_target)
        parts = self._counted(key, lambda: [count(layers, texts) for layers in (1, 2) for texts in (1, 2)])
        one, two = (astuple(self._whole(parts[n], parts[n + 2], num_prompt + (n + 1) * own, recomputed=recomputed)) for n in (0, 1))
        text = [b - a for a, b in zip(one, two, strict=True)]
        return RowCost(*(a - b for a, b in zip(one, text, strict=True))), RowCost(*text)

    def prediction_bytes(self, num_prompt: int, num_source: int, num_nodes: int, attention: str, kind: str = "cpu") -> int:
        """Return the bytes that a pass without gradients has at once for each text, in the part of it that takes most.

        There are the text as it was given with its prompt, its tokens in the row of the pass, what came into a layer and its norm.
        Beside them is either attention with the prompt's keys copied for each text, or both halves of the feed-forward and their
        product. In the end there are logits, and their logarithms, for all candidates.
        """
        config, (width, inner) = self.config, self.feed_forward
        own, size = num_source + num_nodes - 1, getattr(config, "head_dim", None) or width // config.num_attention_heads
        heads, groups = config.num_attention_heads * size, config.num_key_value_heads * size
        # Queries rotated, scaled and put in order; what is read, put in order, joined; keys and values, also behind the prompt's.
        attended = own * (6 * heads + 2 * groups) + (num_prompt + own) * 2 * groups
        if attention == "eager":
            attended += 2 * config.num_attention_heads * own * (num_prompt + own)
        given = (num_prompt + num_source) * width
        layer = self.item_bytes * (given + 3 * own * width + max(attended, 3 * own * inner))
        return int(max(layer, 2 * torch.float32.itemsize * min(num_nodes * config.vocab_size, MOST_LOGITS)))

    def _counted(self, key: tuple[Any, ...], count: Any) -> list[Counted]:
        """Return what was counted for such rows; rows that are alike are counted once."""
        full = (self.config.to_json_string(), self.dtype, *key)
        if full not in _COUNTED:
            _COUNTED[full] = count()
        return _COUNTED[full]


def _stock_logits(model: Any, rows: Float[Tensor, "1 L D"], num_target: int) -> Float[Tensor, "1 U V"]:
    length = rows.shape[1]
    mask = rows.new_zeros(1, 1, length, length, dtype=model.dtype)  # given, because transformers asks for values to make one
    states = model.model(inputs_embeds=rows.to(model.dtype), attention_mask=mask, use_cache=False).last_hidden_state
    return logits_of(model, states[:, -num_target:])


class WeightlessDecoder(Weightless, DecoderBackbone):
    """A replacement for a decoder-only model while a method creates its tensors."""

    def __init__(self, shape: DecoderShape) -> None:
        begin_weightless(self, PromptedDecoder(shape.model().requires_grad_(False)), shape.config.vocab_size)
        self.packed = PackedDecoder(self.model, plain_attention, self)


def published(name: str) -> Any | None:
    """Return the configuration of a published model by its name, written as in this project's files or on the hub."""
    plain = name.lower().removesuffix("-instruct").removesuffix("-it").replace("gemma-3-", "gemma3-")
    if plain not in _SHAPES:
        return None
    kind, width, inner, layers, heads, groups, size, pieces = _SHAPES[plain]
    return getattr(transformers, CLASSES[kind][0])(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=size, vocab_size=pieces, tie_word_embeddings=True,
    )  # fmt: skip
