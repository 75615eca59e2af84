"""Where packed tokens are in the rows of the stock pass: what is inserted may want its x and y in these rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bpt_dist.backbones.insertion import Change, is_for_each_token


class Grid:
    """The places of packed tokens in the rows [rows, length] of the stock pass, which are particle-major.

    `make_places` is called when a change does not act on each token alone for the first time.
    """

    def __init__(self, num_rows: int, length: int, make_places: Callable[[], Int[Tensor, " tokens"]]) -> None:
        self.num_rows, self.length, self._make_places = num_rows, length, make_places

    @functools.cached_property
    def places(self) -> Int[Tensor, " tokens"]:
        """Return the place of each token in the flattened rows."""
        return self._make_places()

    def changed(self, change: Change, x: Float[Tensor, "*tokens i"], y: Float[Tensor, "*tokens o"]) -> Float[Tensor, "*tokens o"]:
        """Return what takes the place of y."""
        shape = y.shape[:-1]
        if len(shape) > 1:
            return self.changed(change, x.flatten(0, -2), y.flatten(0, -2)).unflatten(0, shape)
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
