"""The order of the tokens in a pass without padding: texts of equal lengths side by side, one group after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbones.grid import Grid
from bpt_dist.backbones.transfer import send, send_together

ALIGNED = 16  # numbers: torch's kernels for attention copy a bias whose rows begin elsewhere
Rows = Sequence[tuple[int, int]]  # of each group of tokens: number of sequences, positions of each


class Group(NamedTuple):
    """Texts with the same numbers of encoder positions S (prompt included) and decoder positions U."""

    texts: tuple[int, ...]
    num_encoder: int
    num_decoder: int


def aligned(bias: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
    """Return a bias whose rows begin where the kernels of a GPU want them; on a CPU the bias itself."""
    missing = -bias.shape[-1] % ALIGNED
    return functional.pad(bias, (0, missing))[..., : bias.shape[-1]] if missing and bias.is_cuda else bias


class Padding:
    """How packed tokens become rows of one length, and back: attention then reads all texts of a pass in one call.

    `at` are the places of the tokens in the rows; `into` is the token at each place, any where `visible` is 0.
    """

    def __init__(
        self, shape: tuple[int, int], at: Int[Tensor, " tokens"], into: Int[Tensor, " places"], visible: Int[Tensor, " places"]
    ) -> None:
        self.shape, self._at, self._into, self._visible = shape, at, into, visible

    def padded(self, tokens: Float[Tensor, "tokens ..."]) -> Float[Tensor, "rows length ..."]:
        """Return the tokens in their rows; elsewhere are other tokens, which nobody may read."""
        return _take(tokens, self._into, self._at, None).unflatten(0, self.shape)

    def packed(self, rows: Float[Tensor, "rows length ..."]) -> Float[Tensor, "tokens ..."]:
        """Return the tokens of rows."""
        return _take(rows.flatten(0, 1), self._at, self._into, self._visible)

    @functools.cached_property
    def mask(self) -> Float[Tensor, "rows length"]:
        """Return 0 for tokens and -inf for padding, which is added to the scores of keys."""
        hidden = self._visible.view(self.shape) == 0
        return torch.zeros(self.shape, device=hidden.device).masked_fill(hidden, -torch.inf)


class _Take(torch.autograd.Function):
    """Rows of a tensor in another order; the gradient is taken in the opposite order, which no row of it enters twice.

    Plain indexing would add gradients up by index: on a GPU by atomics, or sorted where results must repeat.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, counts: Tensor | None) -> Tensor:
        ctx.back, ctx.counts = back, counts
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].index_select(0, ctx.back)
        if ctx.counts is not None:
            grad = grad.mul_(ctx.counts.view(-1, *[1] * (grad.dim() - 1)))
        return grad, None, None, None


def _take(
    x: Float[Tensor, "n ..."], index: Int[Tensor, " k"], back: Int[Tensor, " n"], counts: Int[Tensor, " n"] | None
) -> Float[Tensor, "k ..."]:
    """Return `x[index]`; row n of the gradient is that of row `back[n]` of the result, times `counts[n]` (0 or 1)."""
    taken: Tensor = _Take.apply(x, index, back, counts)  # type: ignore[no-untyped-call]
    return taken


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

    @property
    def padding(self) -> Padding | None:
        """Return how attention pads the encoder's tokens, where it reads all texts in one call."""
        return None

    def send(self, tensors: Sequence[Int[Tensor, "..."]], device: torch.device) -> list[Int[Tensor, "..."]]:
        """Return integer tensors of the host on the device."""
        return send_together(tensors, device)

    def encoder_tokens(self, inputs: Float[Tensor, "m N L D"]) -> Float[Tensor, "tokens D"]:
        """Return the tokens that are no padding: the first S of each row."""
        places = send(self._places(inputs.shape[2], self.encoder_rows), inputs.device)
        return inputs.flatten(0, 2).index_select(0, places)

    def decoder_tokens(self, padded: Int[Tensor, "N U"]) -> Int[Tensor, " decoder_tokens"]:
        """Return the ids of each text's decoder positions, for every particle."""
        places = send(self._places(padded.shape[1], self.decoder_rows), padded.device)
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
        order = send(self.order().argsort(), rows.device)
        return rows[order].view(self.num_particles, self.num_texts, *rows.shape[1:])

    def order(self) -> Int[Tensor, " rows"]:
        """Return the place of each sequence of this layout among all, particle by particle and text by text."""
        texts = [text for group in self.groups for _ in range(self.num_particles) for text in group.texts]
        particles = [m for group in self.groups for m in range(self.num_particles) for _ in group.texts]
        return torch.tensor(particles) * self.num_texts + torch.tensor(texts)

    def _grid(self, length: int, rows: list[tuple[int, int]], device: torch.device) -> Grid:
        return Grid(self.num_particles * self.num_texts, length, lambda: send(self._places(length, rows), device))

    def _unpacked(self, values: Tensor, length: int, rows: list[tuple[int, int]]) -> Tensor:
        full = values.new_zeros(self.num_particles * self.num_texts * length, *values.shape[1:])
        full = full.index_copy(0, send(self._places(length, rows), values.device), values)
        return full.view(self.num_particles, self.num_texts, length, *values.shape[1:])

    def _places(self, padded: int, rows: list[tuple[int, int]]) -> Int[Tensor, " tokens"]:
        """Return the places of this layout's tokens in rows [m, N] of `padded` positions each, flattened."""
        first = torch.arange(self.num_particles)[:, None, None] * self.num_texts
        places = []
        for group, (_, length) in zip(self.groups, rows, strict=True):
            of_rows = (first + torch.tensor(group.texts)[None, :, None]) * padded
            places.append((of_rows + torch.arange(length)).flatten())
        return torch.cat(places)


class PaddedLayout(Layout):
    """The same tokens as one group, particle by particle and text by text: for a device that wants few kernels.

    Linear layers read the encoder's tokens without padding, attention pads them to the longest text. The few positions of the
    decoder are padded everywhere. `length` is that of the inputs' rows. Nothing is on the device before `send`.
    """

    def __init__(self, num_particles: int, encoder_lengths: Sequence[int], decoder_lengths: Sequence[int], length: int) -> None:
        self.num_particles, self.num_texts, self.length = num_particles, len(encoder_lengths), length
        longest = -(-max(encoder_lengths) // ALIGNED) * ALIGNED
        self.groups = [Group(tuple(range(self.num_texts)), longest, max(decoder_lengths))]
        self._num_read = torch.tensor(encoder_lengths).repeat(num_particles)[:, None]
        self._indices: list[Tensor] = []

    @property
    def padding(self) -> Padding:
        """Return how attention pads the encoder's tokens."""
        at, into, visible, *_ = self._indices
        return Padding(self.encoder_rows[0], at, into, visible)

    def send(self, tensors: Sequence[Int[Tensor, "..."]], device: torch.device) -> list[Int[Tensor, "..."]]:
        """Return integer tensors of the host on the device; the indices of this layout go with them."""
        indices = [*self._in_rows_of(self.groups[0].num_encoder), *self._in_rows_of(self.length)]
        sent = send_together([*indices, *tensors], device)
        self._indices = sent[: len(indices)]
        return sent[len(indices) :]

    def encoder_tokens(self, inputs: Float[Tensor, "m N L D"]) -> Float[Tensor, "tokens D"]:
        """Return the tokens that are no padding."""
        *_, at, into, visible = self._indices
        return _take(inputs.flatten(0, 2), at, into, visible)

    def decoder_tokens(self, padded: Int[Tensor, "N U"]) -> Int[Tensor, " decoder_tokens"]:
        """Return the ids of all decoder positions, for every particle."""
        return padded[:, : self.groups[0].num_decoder].repeat(self.num_particles, 1).flatten()

    def unpacked_encoder(self, values: Float[Tensor, "tokens D"], length: int) -> Float[Tensor, "m N L D"]:
        """Return values of encoder tokens in the inputs' rows, 0 on padding."""
        *_, at, into, visible = self._indices
        rows = _take(values, into, at, None) * visible[:, None]
        return rows.view(self.num_particles, self.num_texts, length, -1)

    def unpacked_decoder(self, values: Shaped[Tensor, "decoder_tokens ..."], length: int) -> Shaped[Tensor, "m N U ..."]:
        """Return values of decoder tokens in rows of one `length`; on padding they mean nothing."""
        rows = values.view(self.num_particles, self.num_texts, -1, *values.shape[1:])
        missing = length - rows.shape[2]
        return rows if not missing else functional.pad(rows, (*[0, 0] * (values.dim() - 1), 0, missing))

    def in_order(self, rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "m N ..."]:
        """Return one value a sequence: they are in this order."""
        return rows.view(self.num_particles, self.num_texts, *rows.shape[1:])

    def encoder_grid(self, length: int, device: torch.device) -> Grid:
        """Return where encoder tokens are in the inputs' rows."""
        return Grid(len(self._num_read), length, lambda: self._indices[3])

    def decoder_grid(self, device: torch.device) -> Grid:
        """Return where decoder tokens are: everywhere."""
        num_rows, length = self.decoder_rows[0]
        return Grid(num_rows, length, lambda: torch.arange(num_rows * length, device=device))

    def _in_rows_of(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places of the tokens in rows of a length, the token at each place, and 1 where there is one."""
        visible = (torch.arange(length) < self._num_read).flatten()
        return visible.nonzero().flatten(), (visible.cumsum(0) - 1).clamp_min_(0), visible.long()
