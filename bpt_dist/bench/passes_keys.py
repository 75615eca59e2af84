"""Our pass as it would be with keys and values over encoder tokens, to see what leaving them out is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbone import Backbone
from bpt_dist.packed import PackedT5
from bpt_dist.packed_attention import ATTENTIONS, expected, plain_attention
from bpt_dist.packed_blocks import Decoder, norm

Rows = Sequence[tuple[int, int]]


class DecoderWithKeys(Decoder):
    """The decoder, projecting every encoder token to a key and a value in each block."""

    def attend_memory(self, number: int, hidden: Tensor, memory: Sequence[Float[Tensor, "r S D"]], rows: Rows) -> Tensor:
        """Return `hidden` plus the cross-attention of a block."""
        layer = self.stack.block[number].layer[1]
        attend, found = layer.EncDecAttention, []
        queries = functional.linear(norm(hidden, layer.layer_norm, self.dtype), attend.q.weight)
        none = torch.zeros((), dtype=self.dtype, device=hidden.device)
        for states, asked, (num_rows, length) in zip(memory, queries.split([n * u for n, u in rows]), rows, strict=True):
            k, v = (self._heads(functional.linear(states, weight), num_rows) for weight in (attend.k.weight, attend.v.weight))
            read = plain_attention(self._heads(asked, num_rows), k, v, none)
            found.append(read.transpose(1, 2).reshape(num_rows * length, -1))
        return hidden.add_(functional.linear(torch.cat(found), attend.o.weight))

    def _heads(self, states: Tensor, num_rows: int) -> Float[Tensor, "r H n d"]:
        return states.view(num_rows, -1, self.num_heads, self.head_width).transpose(1, 2)


def pass_with_keys(backbone: Backbone) -> PackedT5:
    """Return our pass over these weights, with keys and values."""
    kind = expected(backbone.device, backbone.model.dtype)
    found = PackedT5(backbone.model, ATTENTIONS[kind])
    found.decoder = DecoderWithKeys(backbone.model.decoder, plain_attention)
    return found
