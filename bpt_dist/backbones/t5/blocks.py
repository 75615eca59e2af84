"""The stacks of a frozen T5 on tokens without padding: plain tensor code, differentiable with respect to its inputs only.

What the weights being frozen allows: products of a layer keep nothing for a gradient of its weight; q, k and v (and the two halves
of a gated feed-forward) are one product; the decoder attends to the encoder's states without projecting them to keys and values:
for each head, (q W_k) . E instead of q . (E W_k), and (softmax(.) E) W_v instead of softmax(.) (E W_v). The few positions of the
decoder take the projections that all positions of the encoder would take, which saves an eighth of all arithmetic.

Each block computes inside the `forward` of its module, where its weights are whole also if the T5 is partitioned. If a backward
pass will follow, its result is a new tensor: what enters a block is not changed in place, because hooks and recomputation keep it.
What a method has inserted into the modules acts at the same places here.

Hidden states between the layers stay float32 whatever the weights are; products and attention are made in the type of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpt_dist.backbones.attention import Attention
from bpt_dist.backbones.grid import Grid
from bpt_dist.backbones.insertion import Change
from bpt_dist.backbones.mixin import mix_in
from bpt_dist.backbones.t5.frozen import FrozenLinear, Runs, norm, product
from bpt_dist.backbones.t5.layout import Padding, Rows, aligned

Changes = Mapping[nn.Module, Sequence[Change]]
MakeBiases = Callable[[], Sequence[Tensor]]  # the position biases of all groups; called while the first block is whole


class Memory:
    """The encoder's states, of each group of sequences [r, S, D]; with `keep`, also keys and values once they were made.

    `mask` [r, 1, S] is added to the scores of a group with `padding`.
    """

    def __init__(
        self, encoded: Float[Tensor, "tokens D"], rows: Rows, grid: Grid, padding: Padding | None = None, *, keep: bool = False
    ) -> None:
        self.tokens, self.rows, self.grid, self.padding = encoded, rows, grid, padding
        self.mask = None if padding is None else padding.mask.to(encoded.dtype)[:, None]
        self.groups = self.cut(encoded)
        self.kept: dict[nn.Module, list[Float[Tensor, "r S H d"]]] | None = {} if keep else None

    def cut(self, tokens: Float[Tensor, "tokens i"]) -> list[Float[Tensor, "r S i"]]:
        """Return what belongs to each group."""
        if self.padding is not None:
            return [self.padding.padded(tokens)]
        parts = tokens.split([rows * length for rows, length in self.rows])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.rows, strict=True)]

    def drop(self, continues: Sequence[Tensor]) -> None:
        """Forget the sequences that have ended; groups without any leave."""
        self.groups = _going_on(self.groups, continues)
        for module, groups in (self.kept or {}).items():
            assert self.kept is not None
            self.kept[module] = _going_on(groups, continues)


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts; those of one part as they are."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _going_on(groups: Sequence[Tensor], continues: Sequence[Tensor]) -> list[Tensor]:
    return [part[keep] for part, keep in zip(groups, continues, strict=True) if keep.any()]


class Stack:
    """What encoder and decoder have in common; `changes` are what is inserted at their modules."""

    def __init__(self, stack: Any, attention: Attention, changes: Changes) -> None:
        config = stack.config
        self.stack, self.attention, self.changes = stack, attention, changes
        self.num_heads, self.head_width, self.width = config.num_heads, config.d_kv, config.d_model
        self.dtype = stack.block[0].layer[0].SelfAttention.q.weight.dtype
        self._longest: Tensor | None = None  # position bias
        mix_in(Runs, *stack.block, stack.final_layer_norm)
        attends = [block.layer[0].SelfAttention for block in stack.block]
        self.projections = [FrozenLinear(attend.q, attend.k, attend.v) for attend in attends]
        self.outputs = [FrozenLinear(attend.o) for attend in attends]
        feeds = [block.layer[-1].DenseReluDense for block in stack.block]
        self.inner = [FrozenLinear(*((feed.wi_0, feed.wi_1) if hasattr(feed, "wi_0") else (feed.wi,))) for feed in feeds]
        self.outer = [FrozenLinear(feed.wo) for feed in feeds]

    def bias(self, length: int) -> Float[Tensor, "1 H S S"]:
        """Return the position bias of a length: a part of that of the longest text so far, as the weights are frozen.

        Only inside the first block, which holds the weights of it.
        """
        if self._longest is None or self._longest.shape[-1] < length:
            with torch.no_grad():
                self._longest = self._make_bias(length)
        return self._longest[:, :, :length, :length].contiguous()

    def _make_bias(self, length: int) -> Float[Tensor, "1 H S S"]:
        bias: Tensor = self.stack.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return bias

    def biases(self, rows: Rows, padding: Padding | None = None) -> MakeBiases:
        """Return what makes the position biases of groups, once a pass; with `padding`, nobody sees what is padded."""
        if padding is not None:
            return functools.cache(lambda: [self.bias(rows[0][1]) + padding.mask[:, None, None].to(self.dtype)])
        return functools.cache(lambda: [aligned(self.bias(length)) for _, length in rows])

    def project(
        self, number: int, hidden: Float[Tensor, "tokens D"], grid: Grid
    ) -> tuple[Tensor | None, Float[Tensor, "tokens 3 H d"]]:
        """Return the normed states, for changes, and queries, keys and values of every token for a block's self-attention."""
        layer = self.stack.block[number].layer[0]
        states = self.normed(layer.layer_norm, hidden, grid)
        projected = self.projections[number](states)
        attend = layer.SelfAttention
        if self.is_changed(attend.q, attend.k, attend.v):
            parts = zip((attend.q, attend.k, attend.v), projected.chunk(3, dim=-1), strict=True)
            projected = torch.cat([self.changed(module, states, part, grid) for module, part in parts], dim=-1)
        return states if self.changes else None, projected.view(-1, 3, self.num_heads, self.head_width)

    def attend(
        self,
        number: int,
        hidden: Float[Tensor, "tokens D"],
        rows: Rows,
        biases: Sequence[Tensor],
        grid: Grid,
        padding: Padding | None = None,
    ) -> Tensor:
        """Return `hidden` plus the self-attention of a block, as `out` does; with `padding`, all rows are read in one call."""
        states, projected = self.project(number, hidden, grid)
        parts = [projected] if len(rows) == 1 else projected.split([n * length for n, length in rows])
        if padding is not None:
            parts = [padding.padded(projected)]
        found = []
        for part, shape, bias in zip(parts, rows, biases, strict=True):
            q, k, v = part.view(*shape, 3, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)
            read = self.attention(q, k, v, bias).transpose(1, 2).flatten(2)
            found.append(read.flatten(0, 1) if padding is None else padding.packed(read))
        return self.out(number, hidden, states, joined_rows(found), grid)

    def out(self, number: int, hidden: Tensor, states: Tensor | None, read: Float[Tensor, "tokens I"], grid: Grid) -> Tensor:
        """Return `hidden` plus the output projection of what the heads of a block's self-attention have read.

        It is a new tensor where a backward pass will follow, because hooks and recomputation keep what enters a block.
        """
        layer = self.stack.block[number].layer[0]
        found = self.changed(layer.SelfAttention.o, read, self.outputs[number](read), grid)
        found = self.changed(layer.SelfAttention, states, found, grid)
        return self.changed(layer, hidden, hidden + found if torch.is_grad_enabled() else self.plus(hidden, found), grid)

    def feed_forward(self, number: int, hidden: Float[Tensor, "tokens D"], grid: Grid) -> Tensor:
        """Return `hidden`, changed in place unless something is inserted, plus the feed-forward layer of a block."""
        layer = self.stack.block[number].layer[-1]
        feed, normed = layer.DenseReluDense, self.normed(layer.layer_norm, hidden, grid)
        inner = self.inner[number](normed)
        states = normed if self.changes else None
        del normed  # the largest moment of a pass without gradients is here
        if hasattr(feed, "wi_0"):
            gate, linear = inner.chunk(2, dim=-1)
            gate, linear = self.changed(feed.wi_0, states, gate, grid), self.changed(feed.wi_1, states, linear, grid)
            inner = feed.act(gate) * linear
        else:
            inner = self.changed(feed.wi, states, inner, grid)
            in_place = isinstance(feed.act, nn.ReLU) and not self.changes
            inner = inner.relu_() if in_place else feed.act(inner)
        inner = inner.to(feed.wo.weight.dtype)
        found = self.changed(feed, states, self.changed(feed.wo, inner, self.outer[number](inner), grid), grid)
        return self.changed(layer, hidden, self.plus(hidden, found), grid)

    def last(self, hidden: Float[Tensor, "tokens D"], grid: Grid) -> Float[Tensor, "tokens D"]:
        """Return the last hidden states of the stack."""
        layer = self.stack.final_layer_norm
        states: Tensor = layer(hidden, run=partial(self.normed, layer, grid=grid))
        return states

    def normed(self, layer: Any, hidden: Float[Tensor, "tokens D"], grid: Grid) -> Float[Tensor, "tokens D"]:
        """Return the layer norm of hidden states, in the type of the weights."""
        return self.changed(layer, hidden, norm(hidden, layer, self.dtype), grid)

    def plus(self, hidden: Tensor, found: Tensor) -> Tensor:
        """Return the sum, in place where nothing has kept the hidden states: no change, and no norm of a GPU."""
        is_kept = self.changes or (hidden.is_cuda and torch.is_grad_enabled())
        return hidden + found if is_kept else hidden.add_(found)

    def is_changed(self, *modules: nn.Module) -> bool:
        """Return whether something is inserted at one of the modules."""
        return any(module in self.changes for module in modules)

    def changed(self, module: nn.Module, x: Tensor | None, y: Float[Tensor, "tokens o"], grid: Grid) -> Float[Tensor, "tokens o"]:
        """Return what the changes inserted at a module make of its output."""
        for change in self.changes.get(module, ()):
            assert x is not None
            y = grid.changed(change, x, y)
        return y


class Encoder(Stack):
    """The encoder."""

    def __call__(
        self, tokens: Float[Tensor, "tokens D"], rows: Rows, grid: Grid, padding: Padding | None = None
    ) -> Float[Tensor, "tokens D"]:
        """Return the last hidden states."""
        hidden, biases = tokens, self.biases(rows, padding)
        for number, block in enumerate(self.stack.block):
            hidden = block(hidden, run=partial(self._block, number, rows, biases, grid, padding))
        return self.last(hidden, grid)

    def _block(self, number: int, rows: Rows, biases: MakeBiases, grid: Grid, padding: Padding | None, hidden: Tensor) -> Tensor:
        return self.feed_forward(number, self.attend(number, hidden, rows, biases(), grid, padding), grid)


class Decoder(Stack):
    """The decoder."""

    def __init__(self, stack: Any, attention: Attention, changes: Changes) -> None:
        super().__init__(stack, attention, changes)
        crosses = [block.layer[1].EncDecAttention for block in stack.block]
        self.queries, self.cross_outputs = ([FrozenLinear(getattr(attend, name)) for attend in crosses] for name in ("q", "o"))

    def _make_bias(self, length: int) -> Float[Tensor, "1 H U U"]:
        """Return the position bias, -inf on later positions."""
        bias = super()._make_bias(length)
        later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(later, -torch.inf)

    def __call__(
        self,
        tokens: Float[Tensor, "decoder_tokens D"],
        memory: Memory,
        rows: Rows,
        grid: Grid,
        biases: MakeBiases | None = None,
    ) -> Float[Tensor, "decoder_tokens D"]:
        """Return the last hidden states; `biases` of the groups say who sees whom where positions are not one after the other."""
        biases, hidden = biases or self.biases(rows), tokens
        for number, block in enumerate(self.stack.block):
            hidden = block(hidden, run=partial(self._block, number, memory, rows, biases, grid))
        return self.last(hidden, grid)

    def _block(self, number: int, memory: Memory, rows: Rows, biases: MakeBiases, grid: Grid, hidden: Tensor) -> Tensor:
        hidden = self.attend(number, hidden, rows, biases(), grid)
        return self.feed_forward(number, self.attend_memory(number, hidden, memory, rows, grid), grid)

    def attend_memory(self, number: int, hidden: Tensor, memory: Memory, rows: Rows, grid: Grid) -> Tensor:
        """Return `hidden`, changed in place unless something is inserted, plus the cross-attention of a block."""
        layer = self.stack.block[number].layer[1]
        attend = layer.EncDecAttention
        states = self.normed(layer.layer_norm, hidden, grid)
        queries = self.changed(attend.q, states, self.queries[number](states), grid).view(-1, self.num_heads, self.head_width)
        read = self.read(attend, queries, memory, rows).reshape(len(hidden), -1)
        found = self.changed(attend.o, read, self.cross_outputs[number](read), grid)
        found = self.changed(attend, states, found, grid)
        return self.changed(layer, hidden, self.plus(hidden, found), grid)

    def read(self, attend: Any, queries: Float[Tensor, "tokens H d"], memory: Memory, rows: Rows) -> Float[Tensor, "tokens H d"]:
        """Return what queries read of the encoder's states, or of their keys or values where those are cheaper or changed.

        Without keys, queries are taken to the width of the states; without values, the mean states are taken to the heads.
        """
        heads = (self.num_heads, self.head_width, self.width)
        makes_keys = self.makes_keys(rows)
        keys = self.of_memory(attend.k, memory) if makes_keys or self.is_changed(attend.k) else None
        values = self.of_memory(attend.v, memory) if makes_keys or self.is_changed(attend.v) else None
        if keys is None:
            queries = product(queries.transpose(0, 1), lambda: attend.k.weight.view(heads)).transpose(0, 1)  # [tokens, H, D]
        found = []
        parts = [queries] if len(rows) == 1 else queries.split([n * length for n, length in rows])
        for place, (states, of_group, (num_rows, length)) in enumerate(zip(memory.groups, parts, rows, strict=True)):
            asked = of_group.reshape(num_rows, length * self.num_heads, -1)
            if keys is None:
                scores = asked @ states.mT if memory.mask is None else torch.baddbmm(memory.mask, asked, states.mT)
                weights = scores.softmax(-1)
            else:
                by_head = asked.view(num_rows, length, self.num_heads, -1).transpose(1, 2)
                scores = by_head @ keys[place].permute(0, 2, 3, 1)  # [r, H, U, S]
                scores = scores if memory.mask is None else scores + memory.mask[:, None]
                weights = scores.softmax(-1).transpose(1, 2).flatten(1, 2)
            if values is None:
                found.append((weights @ states).view(-1, self.num_heads, self.width))
            else:
                by_head = weights.unflatten(1, (length, self.num_heads)).transpose(1, 2)
                found.append((by_head @ values[place].transpose(1, 2)).transpose(1, 2).flatten(0, 1))
        read = joined_rows(found)
        if values is None:
            read = product(read.transpose(0, 1), lambda: attend.v.weight.view(heads).mT).transpose(0, 1)
        return read

    def makes_keys(self, rows: Rows) -> bool:
        """Return whether keys and values cost less than their absence: a text has more positions than a head is wide."""
        return max(length for _, length in rows) > self.head_width

    def of_memory(self, module: Any, memory: Memory) -> list[Float[Tensor, "r S H d"]]:
        """Return the keys or values that a linear layer makes of the encoder's states, with what is inserted at it."""
        if memory.kept is not None and module in memory.kept:
            return memory.kept[module]
        made = self.changed(module, memory.tokens, product(memory.tokens, lambda: module.weight.mT), memory.grid)
        groups = [part.unflatten(-1, (self.num_heads, -1)) for part in memory.cut(made)]
        if memory.kept is not None:
            memory.kept[module] = groups
        return groups


class Cache:
    """The decoder with the keys and values of what it has read, one token a sequence and step."""

    def __init__(self, decoder: Decoder, attention: Attention) -> None:
        self.decoder, self.attention = decoder, attention
        self.kept: list[Tensor | None] = [None] * len(decoder.stack.block)  # of each block, [2, rows, H, t, d]

    def step(self, tokens: Float[Tensor, "rows D"], memory: Memory, grid: Grid) -> Float[Tensor, "rows D"]:
        """Return the last hidden state of each sequence's next token."""
        hidden = tokens
        for number, block in enumerate(self.decoder.stack.block):
            hidden = block(hidden, run=partial(self._block, number, memory, grid))
        return self.decoder.last(hidden, grid)

    def _block(self, number: int, memory: Memory, grid: Grid, hidden: Tensor) -> Tensor:
        decoder, before = self.decoder, self.kept[number]
        states, projected = decoder.project(number, hidden, grid)
        new = projected[:, 1:].permute(1, 0, 2, 3)[:, :, :, None]
        kept = new if before is None else torch.cat([before, new], dim=3)
        self.kept[number] = kept
        bias = decoder.bias(kept.shape[3])[:, :, -1:]
        read = self.attention(projected[:, 0, :, None], kept[0], kept[1], bias).flatten(1)
        hidden = decoder.out(number, hidden, states, read, grid)
        hidden = decoder.attend_memory(number, hidden, memory, [(len(states), 1) for states in memory.groups], grid)
        return decoder.feed_forward(number, hidden, grid)

    def keep(self, continues: Tensor) -> None:
        """Forget the sequences that have ended."""
        self.kept = [None if kept is None else kept[:, continues] for kept in self.kept]
