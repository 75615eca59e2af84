"""Attention of a pass that reads each prompt once: a text sees its own tokens and the prompt that is before it.

transformers' modules call it in the place of their own attention. Everything else of the model (rotations, norms, projections,
soft caps, layers without positions) stays theirs, so whatever fits their interface needs no code here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bpt_dist.backbones.attention import Attention
from bpt_dist.backbones.decoder.layout import Group, Layout
from bpt_dist.backbones.prefixes import Prefix
from bpt_dist.backbones.transfer import send

NAME = "bpt_dist_shared_prompts"
Kept = dict[int, list[tuple[Tensor, Tensor]]]  # keys and values [rows, positions, heads, d] of each group, by layer


class Reader(Protocol):
    """What computes the attention of a layer, given the tokens of the whole pass."""

    def attend(
        self, layer: int, q: Float[Tensor, "t H d"], k: Float[Tensor, "t G d"], v: Float[Tensor, "t G d"], window: int | None
    ) -> Float[Tensor, "t H d"]:
        """Return what every token reads; queries are scaled already, G heads of keys serve H heads of queries."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, scaling: float, reader: Reader, **options: Any
) -> tuple[Tensor, None]:
    """Answer transformers' call: [1, heads, tokens, d] in, [1, tokens, heads, d] out."""
    q, k, v = (states[0].transpose(0, 1) for states in (query * scaling, key, value))
    return reader.attend(module.layer_idx, q, k, v, options.get("sliding_window"))[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


@contextmanager
def our_attention(config: Any) -> Iterator[None]:
    """Let the modules of a model compute attention by a reader; masks are then made by nobody else."""
    usual = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


class PromptsAndTexts:
    """Reads all prompts and texts of a layout; with `keep`, remembers keys and values for tokens that come later.

    `prefixes` are those of the layout's prompts where they were read before. What is read of prompts now is in `read_prefixes`
    with `keep_prefixes`.
    """

    def __init__(
        self,
        layout: Layout,
        attention: Attention,
        *,
        keep: bool = False,
        prefixes: Sequence[Prefix] | None = None,
        keep_prefixes: bool = False,
    ) -> None:
        self.layout, self.attention, self.prefixes = layout, attention, prefixes
        self.kept: Kept | None = {} if keep else None
        self.read_prefixes: list[Prefix] | None = [[] for _ in range(layout.num_prompts)] if keep_prefixes else None
        self._biases: dict[tuple[Group, int | None], Tensor] = {}
        self._choices: dict[Group, Int[Tensor, " n"]] = {}

    def attend(
        self, layer: int, q: Float[Tensor, "t H d"], k: Float[Tensor, "t G d"], v: Float[Tensor, "t G d"], window: int | None
    ) -> Float[Tensor, "t H d"]:
        """Return what every token of the layout reads."""
        layout, read = self.layout, []
        if self.prefixes is not None:
            prefix = [torch.stack(states, dim=1) for states in zip(*(of_prompt[layer] for of_prompt in self.prefixes), strict=True)]
        else:
            shape = (layout.num_particles, layout.num_prompts, layout.prompt_length)
            asked, *prefix = (states[: layout.num_prefix].view(*shape, *states.shape[1:]) for states in (q, k, v))
            if layout.num_prefix:
                alone = self._bias(Group((), layout.prompt_length), window, q)
                asked, keys, values = (part.flatten(0, 1) for part in (asked, *prefix))
                read.append(grouped_attention(self.attention, asked, keys, values, alone).flatten(0, 1))
            for number, of_prompt in enumerate(self.read_prefixes or ()):
                of_prompt.append((prefix[0][:, number].clone(), prefix[1][:, number].clone()))
        for group, part in layout.parts():
            rows = (layout.num_particles, len(group.texts), group.length)
            own = [states[part].view(*rows, *states.shape[1:]) for states in (q, k, v)]
            keys, values = (self._behind(*pair, group).flatten(0, 1) for pair in zip(prefix, own[1:], strict=True))
            asked = own[0].flatten(0, 1)
            read.append(grouped_attention(self.attention, asked, keys, values, self._bias(group, window, q)).flatten(0, 1))
            if self.kept is not None:
                self.kept.setdefault(layer, []).append((keys, values))
        return torch.cat(read)

    def _behind(self, prefix: Float[Tensor, "m S P G d"], own: Float[Tensor, "m n S2 G d"], group: Group) -> Tensor:
        """Return the states of each text behind those of its prompt [m, n, P + own, G, d]."""
        if self.layout.num_prompts == 1:
            return torch.cat([prefix.expand(-1, len(group.texts), -1, -1, -1), own], dim=2)
        if group not in self._choices:
            choice = torch.tensor([self.layout.choice[text] for text in group.texts])
            self._choices[group] = send(choice, prefix.device)
        return torch.cat([prefix[:, self._choices[group]], own], dim=2)

    def _bias(self, group: Group, window: int | None, like: Tensor) -> Float[Tensor, "own keys"]:
        """Return 0 where a token sees another and -inf elsewhere; a group without texts is the prompts themselves."""
        key = (group, window)
        if key not in self._biases:
            layout = self.layout if group.texts else Layout((1, 0, 0), (), (), ())
            seen = send(layout.visible(group, window), like.device)
            self._biases[key] = like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return self._biases[key]


class NextTokens:
    """Reads one further token of every sequence that goes on, behind all that was kept."""

    def __init__(self, kept: Kept, attention: Attention) -> None:
        self.kept, self.attention = kept, attention

    def attend(
        self, layer: int, q: Float[Tensor, "t H d"], k: Float[Tensor, "t G d"], v: Float[Tensor, "t G d"], window: int | None
    ) -> Float[Tensor, "t H d"]:
        """Return what the token of each sequence reads, and keep its keys and values."""
        read, begin = [], 0
        for number, before in enumerate(self.kept[layer]):
            part = slice(begin, begin + len(before[0]))
            begin = part.stop
            keys, values = (torch.cat([old, new[part, None]], dim=1) for old, new in zip(before, (k, v), strict=True))
            self.kept[layer][number] = (keys, values)
            first = max(0, keys.shape[1] - window) if window is not None else 0
            bias = q.new_zeros(1, keys.shape[1] - first)
            read.append(grouped_attention(self.attention, q[part, None], keys[:, first:], values[:, first:], bias)[:, 0])
        return torch.cat(read)

    def drop(self, continues: list[Tensor]) -> None:
        """Forget the sequences that have ended; `continues` says for each group which go on, groups without any leave."""
        for layer, groups in self.kept.items():
            pairs = zip(groups, continues, strict=True)
            self.kept[layer] = [(keys[keep], values[keep]) for (keys, values), keep in pairs if keep.any()]


def grouped_attention(
    attention: Attention,
    q: Float[Tensor, "r S H d"],
    k: Float[Tensor, "r K G d"],
    v: Float[Tensor, "r K G d"],
    bias: Float[Tensor, "S K"],
) -> Float[Tensor, "r S H d"]:
    """Return softmax(q k^T + bias) v where consecutive heads of queries share a head of keys and values.

    Queries that share keys are put below each other, so keys and values are not repeated.
    """
    num_rows, length, num_heads, width = q.shape
    sharing = num_heads // k.shape[2]
    q = q.view(num_rows, length, -1, sharing, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    read = attention(q, k.transpose(1, 2), v.transpose(1, 2), bias.repeat(sharing, 1)[None, None])
    return read.unflatten(2, (sharing, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)
