"""Multiply-adds that a pass through a frozen T5 needs (each counts two), to the inputs only: no weight gets a gradient.

    per row, S = P + T encoder and U decoder positions, I = heads x d_kv,      forward              backward
    encoder projections and feed-forward                                       2 S Ne (4DI + fDF)   x 1
    encoder attention                                                          4 Ne S S I           x 2
    decoder projections of its own positions, feed-forward                     2 U Nd (6DI + fDF)   x 1
    decoder self-attention                                                     4 Nd U U I           x 2
    cross-attention with keys and values                                       4 Nd S D I + 4 Nd U S I       x 1, x 2
    cross-attention without: queries folded into W_k, results into W_v         4 Nd U D I + 4 Nd U S heads D x 1, x 2
    head                                                                       2 U D V              x 1

f = 2, or 3 for a gated feed-forward. The decoder's first self-attention and its first queries depend on no prompt, so nothing goes
back through them. Elementwise work (norms, softmax, bias) is not counted, as nobody counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bpt_dist.backbone_shapes import T5Shape


class Flops(NamedTuple):
    """Floating-point operations of a forward and of the backward pass to the inputs."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.forward + self.backward


def row_flops(shape: T5Shape, num_encoder: int, num_decoder: int, *, keys: bool) -> Flops:
    """Return the FLOPs of one row of `num_encoder` = P + T and `num_decoder` positions; `keys` says how cross-attention is done."""
    config = shape.config
    width, inner, vocabulary = config.d_model, config.d_ff, config.vocab_size
    heads, inside = config.num_heads, config.num_heads * config.d_kv
    feed = (3 if config.is_gated_act else 2) * width * inner
    encoder_blocks, decoder_blocks = shape.num_blocks
    s, u = num_encoder, num_decoder

    encoder_linear = 2 * s * encoder_blocks * (4 * width * inside + feed)
    encoder_attention = 4 * encoder_blocks * s * s * inside
    self_linear, self_attention = 2 * u * 4 * width * inside, 4 * u * u * inside  # of one block
    queries, output = 2 * u * width * inside, 2 * u * width * inside
    if keys:
        folded, projected, product = 0, 4 * s * width * inside, 2 * u * s * inside
    else:
        folded, projected, product = 2 * u * width * inside, 2 * u * width * inside, 2 * u * s * heads * width
    block = self_linear + self_attention + queries + folded + projected + 2 * product + output + 2 * u * feed
    head = 2 * u * width * vocabulary
    forward = encoder_linear + encoder_attention + decoder_blocks * block + head
    # Products of two activations go back to both; those of the first block's self-attention and queries to nothing.
    first = self_linear + 2 * self_attention + queries + folded + product
    backward = encoder_linear + 2 * encoder_attention + head - first
    backward += decoder_blocks * (block + self_attention + 2 * product)
    return Flops(forward, backward)


def useful_flops(shape: T5Shape, num_prompt: int, lengths: Sequence[tuple[int, int]], num_particles: int) -> int:
    """Return what one step needs at the real lengths, by the cheaper way of cross-attention: what utilisation is measured by."""
    ways = [
        [row_flops(shape, num_prompt + source, target, keys=keys).total for keys in (True, False)] for source, target in lengths
    ]
    return num_particles * sum(map(min, ways))
