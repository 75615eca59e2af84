"""Greedy decoding with the packed decoder, token by token; sequences that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpt_dist.packed_attention import plain_attention
from bpt_dist.packed_blocks import Decoder


def greedy(
    decoder: Decoder,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    memory: Sequence[Float[Tensor, "r S D"]],
    config: Any,
    max_new_tokens: int,
) -> Int[Tensor, "rows U"]:
    """Return the start token and what follows, at most `max_new_tokens`, for the sequences of each group in `memory`.

    What comes after the end token is padding, as transformers' `generate` fills it.
    """
    num_rows, device = sum(map(len, memory)), memory[0].device
    found = torch.full((num_rows, max_new_tokens + 1), config.pad_token_id, device=device)
    found[:, 0] = config.decoder_start_token_id
    alive, states = torch.arange(num_rows, device=device), list(memory)
    cache = Cache(decoder)
    steps = 0
    while steps < max_new_tokens and len(alive):
        decoded = cache.step(embed(found[alive, steps]), states)
        steps += 1
        found[alive, steps] = logits(decoded).argmax(-1)
        goes_on = found[alive, steps] != config.eos_token_id
        if not goes_on.all():
            parts = goes_on.split([len(part) for part in states])
            states = [part[keep] for part, keep in zip(states, parts, strict=True) if keep.any()]
            alive = alive[goes_on]
            cache.keep(goes_on)
    return found[:, : steps + 1]


class Cache:
    """The decoder with the keys and values of what it has read, one token a sequence and step."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.kept: list[Tensor | None] = [None] * len(decoder.stack.block)  # of each block, [2, rows, H, t, d]

    def step(self, tokens: Float[Tensor, "rows D"], memory: Sequence[Float[Tensor, "r S D"]]) -> Float[Tensor, "rows D"]:
        """Return the last hidden state of each sequence's next token."""
        decoder, hidden = self.decoder, tokens
        rows = [(len(states), 1) for states in memory]
        for number, before in enumerate(self.kept):
            projected = decoder.project(number, hidden)
            new = projected[:, 1:].permute(1, 0, 2, 3)[:, :, :, None]
            kept = new if before is None else torch.cat([before, new], dim=3)
            self.kept[number] = kept
            bias = decoder.bias(kept.shape[3])[:, :, -1:]
            read = plain_attention(projected[:, 0, :, None], kept[0], kept[1], bias).flatten(1)
            hidden = decoder.feed_forward(number, decoder.attend_memory(number, decoder.out(number, hidden, read), memory, rows))
        return decoder.last(hidden)

    def keep(self, goes_on: Tensor) -> None:
        """Forget the sequences that have ended."""
        self.kept = [None if kept is None else kept[:, goes_on] for kept in self.kept]
