"""The stacks of a frozen T5 on tokens without padding: plain tensor code, differentiable with respect to its inputs only.

What the weights being frozen allows: products of a layer keep nothing for a gradient of its weight; q, k and v (and the two halves
of a gated feed-forward) are one product; the decoder attends to the encoder's states without projecting them to keys and values:
for each head, (q W_k) . E instead of q . (E W_k), and (softmax(.) E) W_v instead of softmax(.) (E W_v). The few positions of the
decoder take the projections that all positions of the encoder would take, which saves an eighth of all arithmetic.

Hidden states between the layers stay float32 whatever the weights are; products and attention are made in the type of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.attention import Attention
from bpt_dist.backbones.t5.layout import Layout

Rows = Sequence[tuple[int, int]]  # of each group of tokens: number of sequences, positions of each


class _Norm(torch.autograd.Function):
    """x / rms(x) * gain; keeps one tensor for the backward pass, and x may be changed in place afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        # One pass over x and no temporary, unlike the mean of squares.
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed = x * scale
        kept = normed.to(dtype)
        ctx.save_for_backward(kept, scale, gain)
        # In float32 `kept` is `normed` itself.
        return normed * gain if kept is normed else normed.mul_(gain).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, gain = ctx.saved_tensors
        grad = grads[0] * gain
        inner = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, inner, value=-1).mul_(scale), None, None, None


def norm(x: Float[Tensor, "*rows D"], layer: Any, dtype: torch.dtype) -> Float[Tensor, "*rows D"]:
    """Return T5's layer norm (Zhang & Sennrich 2019: no mean is subtracted) of float32 x in `dtype`, computed in float32."""
    normed: Tensor = _Norm.apply(x, layer.weight.float(), layer.variance_epsilon, dtype)  # type: ignore[no-untyped-call]
    return normed


def joined(layers: Sequence[Any]) -> Float[Tensor, "outputs inputs"]:
    """Return the weights of linear layers below each other; the layers become views of them, so there is no second copy."""
    first = layers[0]
    size = sum(layer.weight.numel() for layer in layers)
    storage = first.weight.untyped_storage()
    together = first.weight.data_ptr() == storage.data_ptr() and all(
        layer.weight.untyped_storage().data_ptr() == storage.data_ptr() for layer in layers
    )
    if not together or storage.nbytes() != size * first.weight.element_size():
        weights = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, weights.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part
    return first.weight.detach().as_strided((size // first.weight.shape[1], first.weight.shape[1]), first.weight.stride())


class Stack:
    """What encoder and decoder have in common."""

    def __init__(self, stack: Any, attention: Attention) -> None:
        config = stack.config
        self.stack, self.attention = stack, attention
        self.num_heads, self.head_width, self.width = config.num_heads, config.d_kv, config.d_model
        self.dtype = stack.block[0].layer[0].SelfAttention.q.weight.dtype
        self._longest: Tensor | None = None  # position bias
        self.projections = [joined([attend.q, attend.k, attend.v]) for attend in (b.layer[0].SelfAttention for b in stack.block)]
        feeds = [block.layer[-1].DenseReluDense for block in stack.block]
        self.inner = [joined([feed.wi_0, feed.wi_1]) if hasattr(feed, "wi_0") else feed.wi.weight for feed in feeds]

    def bias(self, length: int) -> Float[Tensor, "1 H S S"]:
        """Return the position bias of a length: a part of that of the longest text so far, as the weights are frozen."""
        if self._longest is None or self._longest.shape[-1] < length:
            with torch.no_grad():
                self._longest = self._make_bias(length)
        return self._longest[:, :, :length, :length].contiguous()

    def _make_bias(self, length: int) -> Float[Tensor, "1 H S S"]:
        bias: Tensor = self.stack.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return bias

    def project(self, number: int, hidden: Float[Tensor, "tokens D"]) -> Float[Tensor, "tokens 3 H d"]:
        """Return queries, keys and values of every token for the self-attention of a block, by one product."""
        states = norm(hidden, self.stack.block[number].layer[0].layer_norm, self.dtype)
        return functional.linear(states, self.projections[number]).view(-1, 3, self.num_heads, self.head_width)

    def attend(self, number: int, hidden: Float[Tensor, "tokens D"], rows: Rows, biases: Sequence[Tensor]) -> Tensor:
        """Return `hidden` plus the self-attention of a block."""
        projected, read = self.project(number, hidden), []
        for part, shape, bias in zip(projected.split([n * length for n, length in rows]), rows, biases, strict=True):
            q, k, v = part.view(*shape, 3, self.num_heads, self.head_width).permute(2, 0, 3, 1, 4)
            read.append(self.attention(q, k, v, bias).transpose(1, 2).reshape(len(part), -1))
        return self.out(number, hidden, torch.cat(read))

    def out(self, number: int, hidden: Float[Tensor, "tokens D"], read: Float[Tensor, "tokens I"]) -> Tensor:
        """Return `hidden` plus the output projection of what the heads of a block's self-attention have read."""
        return hidden.add_(functional.linear(read, self.stack.block[number].layer[0].SelfAttention.o.weight))

    def feed_forward(self, number: int, hidden: Float[Tensor, "tokens D"]) -> Tensor:
        """Return `hidden` plus the feed-forward layer of a block."""
        layer = self.stack.block[number].layer[-1]
        feed, inner = layer.DenseReluDense, functional.linear(norm(hidden, layer.layer_norm, self.dtype), self.inner[number])
        if hasattr(feed, "wi_0"):
            gate, linear = inner.chunk(2, dim=-1)
            inner = feed.act(gate) * linear
        else:
            inner = inner.relu_() if isinstance(feed.act, nn.ReLU) else feed.act(inner)
        return hidden.add_(functional.linear(inner.to(feed.wo.weight.dtype), feed.wo.weight))

    def last(self, hidden: Float[Tensor, "tokens D"]) -> Float[Tensor, "tokens D"]:
        """Return the last hidden states of the stack."""
        return norm(hidden, self.stack.final_layer_norm, self.dtype)


class Encoder(Stack):
    """The encoder."""

    def __call__(self, tokens: Float[Tensor, "tokens D"], layout: Layout) -> Float[Tensor, "tokens D"]:
        """Return the last hidden states; the float32 `tokens` are changed in place."""
        rows, hidden = layout.encoder_rows, tokens
        biases = [self.bias(length) for _, length in rows]
        for number in range(len(self.stack.block)):
            hidden = self.feed_forward(number, self.attend(number, hidden, rows, biases))
        return self.last(hidden)


class Decoder(Stack):
    """The decoder; `memory` are the encoder's states of each group of sequences."""

    def _make_bias(self, length: int) -> Float[Tensor, "1 H U U"]:
        """Return the position bias, -inf on later positions."""
        bias = super()._make_bias(length)
        later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(later, -torch.inf)

    def __call__(
        self,
        tokens: Float[Tensor, "decoder_tokens D"],
        memory: Sequence[Float[Tensor, "r S D"]],
        rows: Rows,
        biases: Sequence[Float[Tensor, "_r H _U _U"]] | None = None,
    ) -> Float[Tensor, "decoder_tokens D"]:
        """Return the last hidden states; `biases` of the groups say who sees whom where positions are not one after the other."""
        biases = biases or [self.bias(length) for _, length in rows]
        hidden = tokens
        for number in range(len(self.stack.block)):
            hidden = self.attend(number, hidden, rows, biases)
            hidden = self.feed_forward(number, self.attend_memory(number, hidden, memory, rows))
        return self.last(hidden)

    def attend_memory(self, number: int, hidden: Tensor, memory: Sequence[Float[Tensor, "r S D"]], rows: Rows) -> Tensor:
        """Return `hidden` plus the cross-attention of a block, to the encoder's states as they are."""
        layer = self.stack.block[number].layer[1]
        attend, heads = layer.EncDecAttention, (self.num_heads, self.head_width)
        to_keys, to_values = (module.weight.view(*heads, self.width) for module in (attend.k, attend.v))
        queries = functional.linear(norm(hidden, layer.layer_norm, self.dtype), attend.q.weight).view(-1, *heads)
        queries = torch.bmm(queries.transpose(0, 1), to_keys).transpose(0, 1)  # [decoder_tokens, H, D]
        means = []
        groups = zip(memory, queries.split([n * length for n, length in rows]), rows, strict=True)
        for states, of_group, (num_rows, length) in groups:
            asked = of_group.reshape(num_rows, length * self.num_heads, self.width)
            weights = (asked @ states.mT).softmax(-1)
            means.append((weights @ states).view(-1, self.num_heads, self.width))
        read = torch.bmm(torch.cat(means).transpose(0, 1), to_values.mT).transpose(0, 1)
        return hidden.add_(functional.linear(read.reshape(len(hidden), -1), attend.o.weight))
