"""The order of the tokens in a pass without padding: texts of equal lengths side by side, one group after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bpt_dist.backbones.insertion import Change, is_for_each_token

Rows = Sequence[tuple[int, int]]  # of each group of tokens: number of sequences, positions of each


class Group(NamedTuple):
    """Texts with the same numbers of encoder positions S (prompt included) and decoder positions U."""

    texts: tuple[int, ...]
    num_encoder: int
    num_decoder: int


class Grid:
    """The places of packed tokens in the rows [rows, length] of the stock pass, which are particle-major.

    What is inserted may want its x and y in these rows. `make_places` is called when that is so for the first time.
    """

    def __init__(self, num_rows: int, length: int, make_places: Callable[[], Int[Tensor, " tokens"]]) -> None:
        self.num_rows, self.length, self._make_places = num_rows, length, make_places

    @functools.cached_property
    def places(self) -> Int[Tensor, " tokens"]:
        """Return the place of each token in the flattened rows."""
        return self._make_places()

    def changed(self, change: Change, x: Float[Tensor, "tokens i"], y: Float[Tensor, "tokens o"]) -> Float[Tensor, "tokens o"]:
        """Return what takes the place of y."""
        if is_for_each_token(change):
            return change(x[None], y[None])[0]
        rows = change(self.unpacked(x), self.unpacked(y))
        return rows.flatten(0, 1).index_select(0, self.places)

    def unpacked(self, tokens: Shaped[Tensor, "tokens ..."]) -> Shaped[Tensor, "rows length ..."]:
        """Return the tokens in their rows, 0 elsewhere."""
        full = tokens.new_zeros(self.num_rows * self.length, *tokens.shape[1:])
        return full.index_copy(0, self.places, tokens).view(self.num_rows, self.length, *tokens.shape[1:])

    def mask(self) -> Int[Tensor, "rows length"]:
        """Return 1 where there is a token."""
        return self.unpacked(torch.ones_like(self.places))

    def part(self, tokens: slice) -> Grid:
        """Return the grid of some of the tokens."""
        return Grid(self.num_rows, self.length, lambda: self.places[tokens])


class Layout:
    """The tokens of m particles x N texts in one row: group by group, in a group particle by particle and text by text."""

    def __init__(self, num_particles: int, encoder_lengths: Sequence[int], decoder_lengths: Sequence[int]) -> None:
        self.num_particles, self.num_texts = num_particles, len(encoder_lengths)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for text, shape in enumerate(zip(encoder_lengths, decoder_lengths, strict=True)):
            by_shape.setdefault(shape, []).append(text)
        self.groups = [Group(tuple(texts), *shape) for shape, texts in sorted(by_shape.items())]

    @property
    def num_rows(self) -> list[int]:
        """Return how many sequences (particles x texts) each group has."""
        return [self.num_particles * len(group.texts) for group in self.groups]

    @property
    def encoder_rows(self) -> list[tuple[int, int]]:
        """Return the number of sequences and their encoder positions S of each group."""
        return [(rows, group.num_encoder) for rows, group in zip(self.num_rows, self.groups, strict=True)]

    @property
    def decoder_rows(self) -> list[tuple[int, int]]:
        """Return the number of sequences and their decoder positions U of each group."""
        return [(rows, group.num_decoder) for rows, group in zip(self.num_rows, self.groups, strict=True)]

    def encoder_tokens(self, inputs: Float[Tensor, "m N L D"]) -> Float[Tensor, "tokens D"]:
        """Return the tokens that are no padding: the first S of each row."""
        places = self._places(inputs.shape[2], self.encoder_rows).to(inputs.device)
        return inputs.flatten(0, 2).index_select(0, places)

    def decoder_tokens(self, padded: Int[Tensor, "N U"]) -> Int[Tensor, " decoder_tokens"]:
        """Return the ids of each text's decoder positions, for every particle."""
        places = self._places(padded.shape[1], self.decoder_rows).to(padded.device)
        return padded.flatten()[places % padded.numel()]

    def unpacked_encoder(self, values: Float[Tensor, "tokens D"], length: int) -> Float[Tensor, "m N L D"]:
        """Return values of encoder tokens in rows of one `length`, 0 on padding."""
        return self._unpacked(values, length, self.encoder_rows)

    def unpacked_decoder(self, values: Shaped[Tensor, "decoder_tokens ..."], length: int) -> Shaped[Tensor, "m N U ..."]:
        """Return values of decoder tokens in rows of one `length`, 0 on padding."""
        return self._unpacked(values, length, self.decoder_rows)

    def encoder_grid(self, length: int, device: torch.device) -> Grid:
        """Return where encoder tokens are in rows of one `length`."""
        return self._grid(length, self.encoder_rows, device)

    def decoder_grid(self, device: torch.device) -> Grid:
        """Return where decoder tokens are in rows as long as the longest."""
        return self._grid(max(length for _, length in self.decoder_rows), self.decoder_rows, device)

    def sums(self, values: Float[Tensor, " decoder_tokens"]) -> Float[Tensor, "m N"]:
        """Return the sum over each row's decoder tokens; rows of a group are equally long, so no padding takes part."""
        parts = values.split([rows * length for rows, length in self.decoder_rows])
        sums = [part.view(shape).sum(1) for part, shape in zip(parts, self.decoder_rows, strict=True)]
        return self.in_order(torch.cat(sums))

    def in_order(self, rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "m N ..."]:
        """Return one value a sequence, in the order of this layout, particle by particle and text by text."""
        order = self.order().argsort().to(rows.device)
        return rows[order].view(self.num_particles, self.num_texts, *rows.shape[1:])

    def order(self) -> Int[Tensor, " rows"]:
        """Return the place of each sequence of this layout among all, particle by particle and text by text."""
        texts = [text for group in self.groups for _ in range(self.num_particles) for text in group.texts]
        particles = [m for group in self.groups for m in range(self.num_particles) for _ in group.texts]
        return torch.tensor(particles) * self.num_texts + torch.tensor(texts)

    def _grid(self, length: int, rows: list[tuple[int, int]], device: torch.device) -> Grid:
        return Grid(self.num_particles * self.num_texts, length, lambda: self._places(length, rows).to(device))

    def _unpacked(self, values: Tensor, length: int, rows: list[tuple[int, int]]) -> Tensor:
        full = values.new_zeros(self.num_particles * self.num_texts * length, *values.shape[1:])
        full = full.index_copy(0, self._places(length, rows).to(values.device), values)
        return full.view(self.num_particles, self.num_texts, length, *values.shape[1:])

    def _places(self, padded: int, rows: list[tuple[int, int]]) -> Int[Tensor, " tokens"]:
        """Return the places of this layout's tokens in rows [m, N] of `padded` positions each, flattened."""
        first = torch.arange(self.num_particles)[:, None, None] * self.num_texts
        places = []
        for group, (_, length) in zip(self.groups, rows, strict=True):
            of_rows = (first + torch.tensor(group.texts)[None, :, None]) * padded
            places.append((of_rows + torch.arange(length)).flatten())
        return torch.cat(places)
