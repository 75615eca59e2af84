"""Texts of different prompts in one pass of a decoder-only model: prompts may differ in length, and texts in what is behind them.

Texts whose prompts are equally long, and whose label words make trees of one form, have a layout of their own. The tokens of all
layouts go through the model together: only attention is computed layout by layout. Nothing is padded, and a prompt is read once,
or not at all where its prefix was kept. What is inserted may depend on a token only, not on the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpt_dist.backbones.attention import Attention
from bpt_dist.backbones.base import places_of_equal
from bpt_dist.backbones.candidates import Tree, along_each
from bpt_dist.backbones.decoder.attention import NextTokens, PromptsAndTexts
from bpt_dist.backbones.decoder.layout import ONLY_EACH_TOKEN, Layout
from bpt_dist.backbones.decoder.packed import PackedDecoder
from bpt_dist.backbones.prefixes import Prefix, Prefixes


@dataclass(frozen=True)
class Block:
    """Texts of one layout: which of the pass they are, and their tokens."""

    texts: list[int]
    layout: Layout
    tokens: Float[Tensor, "tokens D"]
    prefixes: list[Prefix] | None

    def order(self) -> list[tuple[int, int]]:
        """Return particle and text (of this block) of every sequence in the order of the layout."""
        layout = self.layout
        return [(m, text) for group in layout.groups for m in range(layout.num_particles) for text in group.texts]


class JoinedReader:
    """Computes the attention of a pass whose tokens belong to several layouts, one after the other."""

    def __init__(self, readers: Sequence[PromptsAndTexts], sizes: Sequence[int]) -> None:
        self.readers, self.sizes = readers, list(sizes)

    def attend(
        self, layer: int, q: Float[Tensor, "t H d"], k: Float[Tensor, "t G d"], v: Float[Tensor, "t G d"], window: int | None
    ) -> Float[Tensor, "t H d"]:
        """Return what every token reads."""
        parts = zip(self.readers, *(states.split(self.sizes) for states in (q, k, v)), strict=True)
        return torch.cat([reader.attend(layer, *of_layout, window) for reader, *of_layout in parts])

    def next_tokens(self, attention: Attention) -> NextTokens:
        """Return the reader of one further token of every sequence."""
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for reader in self.readers:
            for layer, groups in (reader.kept or {}).items():
                kept.setdefault(layer, []).extend(groups)
        return NextTokens(kept, attention)


class MixedDecoder:
    """Ranking and generation where each text has prompts and candidates of its own, by the weights of a `PackedDecoder`.

    `prefixes` keeps what is read of prompts from one pass to the next.
    """

    def __init__(self, packed: PackedDecoder, prefixes: Prefixes | None = None) -> None:
        self.packed, self.prefixes = packed, prefixes

    def rank(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        prompts: Sequence[Float[Tensor, "m _P D"]],
        candidates: Sequence[Int[Tensor, "_C _U"]],
    ) -> list[Float[Tensor, "m _C"]]:
        """Return the log-likelihood (summed over tokens) of each text's candidates under each of its prompts."""
        known = {id(of_text): Tree.of(of_text.tolist(), 0) for of_text in candidates}
        trees = [known[id(of_text)] for of_text in candidates]
        blocks = self._blocks(ids, mask, prompts, trees)
        states, _ = self._run(blocks, keep=False)
        places, owners, begin = [], [], 0
        for block in blocks:
            starts = begin + block.layout.first + torch.tensor(block.layout.num_source) - 1
            for place, text in enumerate(block.texts):
                nodes = torch.arange(len(trees[text].tokens))
                places.append((starts[:, place, None] + nodes).flatten())
                owners += [text] * len(starts)
            begin += len(block.tokens)
        of_nodes = states[torch.cat(places).to(states.device)]
        own, size = [trees[text] for text in owners], self.packed.model.config.vocab_size
        sums = along_each(own, of_nodes, lambda some: self.packed.logits(of_nodes[some], ONLY_EACH_TOKEN), size)
        found: dict[int, list[Tensor]] = {}
        for text, of_row in zip(owners, sums, strict=True):
            found.setdefault(text, []).append(of_row)
        return [torch.stack(found[text]) for text in range(len(prompts))]

    def generate(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        prompts: Sequence[Float[Tensor, "m _P D"]],
        max_new_tokens: Sequence[int],
    ) -> Int[Tensor, "N U"]:
        """Return the ids that the prompts of each text write together, at most so many of its own; the rest is padding."""
        blocks = self._blocks(ids, mask, prompts, None)
        states, reader = self._run(blocks, keep=True)
        starts, positions, owners, limits = [], [], [], []
        num_rows: list[int] = []
        begin = 0
        for block in blocks:
            layout = block.layout
            for particle, text in block.order():
                num_source = layout.num_source[text]
                starts.append(begin + int(layout.first[particle, text]) + num_source - 1)
                positions.append(layout.prompt_length + num_source)
                owners.append(block.texts[text])
                limits.append(max_new_tokens[block.texts[text]])
            num_rows += layout.num_rows
            begin += len(block.tokens)
        device = states.device
        at, position, limit = (torch.tensor(values, device=device) for values in (starts, positions, limits))
        written = self.packed.write(
            states[at], position, reader.next_tokens(self.packed.attention), num_rows, max(max_new_tokens), len(prompts[0]), limit
        )
        found = torch.empty(len(prompts), written.shape[1], dtype=torch.long, device=device)
        found[torch.tensor(owners, device=device)] = written  # the prompts of a text write the same
        return found

    def _blocks(
        self,
        ids: Int[Tensor, "N T"],
        mask: Int[Tensor, "N T"],
        prompts: Sequence[Float[Tensor, "m _P D"]],
        trees: Sequence[Tree] | None,
    ) -> list[Block]:
        """Return the layouts of a pass with their tokens; behind each source are the nodes of its tree but the root."""
        packed, lengths = self.packed, mask.sum(1).tolist()
        forms = [() for _ in prompts] if trees is None else [tuple(tree.parents) for tree in trees]
        kept = self._prefixes(list({id(prompt): prompt for prompt in prompts}.values()))
        blocks = []
        for texts in places_of_equal([(prompt.shape[1], form) for prompt, form in zip(prompts, forms, strict=True)]):
            own = [prompts[text] for text in texts]
            numbers: dict[int, int] = {}
            choice = [numbers.setdefault(id(prompt), len(numbers)) for prompt in own]
            known = {id(prompt): prompt for prompt in own}
            longest = max(lengths[text] for text in texts)
            embeds = packed.embed(ids[texts, :longest])
            shared = torch.stack([known[key] for key in numbers], dim=1).to(embeds)
            behind, tree, num_behind = embeds[:, :0], None, 0
            if trees is not None:
                tree = trees[texts[0]]  # of the others only the form is the same: their tokens are their own
                num_behind = len(tree.tokens) - 1
                nodes = torch.tensor([trees[text].tokens[1:] for text in texts], dtype=torch.long, device=ids.device)
                behind = packed.embed(nodes)
            num_source = [lengths[text] for text in texts]
            m, s, p = shared.shape[:3]
            layout = Layout((m, s, p), choice, num_source, [num_behind] * len(texts), tree, reads_prompts=kept is None)
            of_block = None if kept is None else [kept[key] for key in numbers]
            blocks.append(Block(texts, layout, layout.pack(shared, embeds.expand(m, -1, -1, -1), behind), of_block))
        return blocks

    def _prefixes(self, prompts: Sequence[Float[Tensor, "m _P D"]]) -> dict[int, Prefix] | None:
        """Return the prefixes of different prompts by their identity, or None where they are read together with the texts."""
        if self.prefixes is None:
            return None
        found = self.prefixes.of(prompts, self._prefix_bytes, self._read_prefixes)
        return None if found is None else {id(prompt): prefix for prompt, prefix in zip(prompts, found, strict=True)}

    def _prefix_bytes(self, prompt: Float[Tensor, "m P D"]) -> int:
        config = self.packed.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        of_position = 2 * config.num_hidden_layers * config.num_key_value_heads * width * self.packed.model.dtype.itemsize
        return int(prompt.shape[0] * prompt.shape[1] * of_position)

    def _read_prefixes(self, prompts: Sequence[Float[Tensor, "m _P D"]]) -> list[Prefix]:
        """Return the keys and values of prompts by one pass in which no text is read."""
        groups = places_of_equal([prompt.shape[1] for prompt in prompts])
        together = [torch.stack([prompts[place] for place in places], dim=1) for places in groups]
        layouts = [Layout((*of_length.shape[:3],), (), (), ()) for of_length in together]
        readers = [PromptsAndTexts(layout, self.packed.attention, keep_prefixes=True) for layout in layouts]
        tokens = torch.cat([of_length.flatten(0, 2) for of_length in together])
        positions = torch.cat([layout.positions() for layout in layouts])
        self.packed.run(tokens, positions, JoinedReader(readers, [layout.num_prefix for layout in layouts]), ONLY_EACH_TOKEN)
        found: dict[int, Prefix] = {}
        for places, reader in zip(groups, readers, strict=True):
            found |= dict(zip(places, reader.read_prefixes or (), strict=True))
        return [found[place] for place in range(len(prompts))]

    def _run(self, blocks: Sequence[Block], *, keep: bool) -> tuple[Float[Tensor, "tokens D"], JoinedReader]:
        """Return the last hidden states of all tokens, by one call of the model."""
        readers = [PromptsAndTexts(one.layout, self.packed.attention, keep=keep, prefixes=one.prefixes) for one in blocks]
        reader: Any = JoinedReader(readers, [len(block.tokens) for block in blocks])
        positions = torch.cat([block.layout.positions() for block in blocks])
        tokens = torch.cat([block.tokens for block in blocks])
        return self.packed.run(tokens, positions, reader, ONLY_EACH_TOKEN), reader
