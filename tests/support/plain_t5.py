"""A T5 written from its paper in float64: one unpadded text at a time, no transformers, no hooks: a measure for methods."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bpt_dist.data.batches import Batch

LENGTHS, ANSWERS = (5, 9, 3, 7), (4, 2, 3, 1)


class PlainT5:
    """T5 version 1.0; a sub-class says where a method differs: `linear`, `norm` and `sublayer` are the places."""

    def __init__(self, folder: Path) -> None:
        self.weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}
        self.config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))

    # --- places -------------------------------------------------------------------------------------------------------

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return W x of the layer of that name."""
        weight = self.weights["shared.weight" if name == "lm_head" else f"{name}.weight"]
        return torch.stack([weight @ row for row in x])

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Return x over its root mean square, times the gain."""
        return self.weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + self.config.layer_norm_epsilon).sqrt()

    def sublayer(self, place: str, hidden: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        """Return what takes the place of a sub-layer's output, before it is added to the hidden state."""
        return output

    def encoded(self, states: Tensor) -> None:
        """See the last states of the encoder [T, D]."""

    # --- the forward pass ---------------------------------------------------------------------------------------------

    def logits(self, source_ids: Tensor, decoder_ids: Tensor) -> Tensor:
        """Return [U, V] for the source ids [T] and what the decoder has read [U]."""
        words = self.weights["shared.weight"]
        states = self.stack("encoder", words[source_ids], None)
        self.encoded(states)
        return self.linear("lm_head", self.stack("decoder", words[decoder_ids], states) * self.config.d_model**-0.5)

    def stack(self, stack: str, hidden: Tensor, states: Tensor | None) -> Tensor:
        """Return the last hidden states [T, D] of encoder or decoder for its input embeddings."""
        causal = stack == "decoder"
        bias = self._bias(stack, len(hidden), causal)
        for number in range(self.config.num_layers):
            block = f"{stack}.block.{number}.layer"
            normed = self.norm(f"{block}.0.layer_norm", hidden)
            output = self._attention(f"{block}.0.SelfAttention", normed, normed, bias)
            hidden = hidden + self.sublayer(f"{block}.0.SelfAttention", hidden, normed, output)
            last = f"{block}.1"
            if states is not None:
                normed = self.norm(f"{block}.1.layer_norm", hidden)
                output = self._attention(f"{block}.1.EncDecAttention", normed, states, None)
                hidden = hidden + self.sublayer(f"{block}.1.EncDecAttention", hidden, normed, output)
                last = f"{block}.2"
            normed = self.norm(f"{last}.layer_norm", hidden)
            inner = self.linear(f"{last}.DenseReluDense.wi", normed).clamp_min(0)
            output = self.linear(f"{last}.DenseReluDense.wo", inner)
            hidden = hidden + self.sublayer(f"{last}.DenseReluDense", hidden, normed, output)
        return self.norm(f"{stack}.final_layer_norm", hidden)

    def _attention(self, name: str, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (self.linear(f"{name}.{part}", x) for part, x in (("q", queries), ("k", keys), ("v", keys)))
        heads, size = [], self.config.d_kv
        for head in range(self.config.num_heads):
            of_head = slice(head * size, (head + 1) * size)
            scores = q[:, of_head] @ k[:, of_head].T + (0 if bias is None else bias[head])
            heads.append(scores.softmax(-1) @ v[:, of_head])
        return self.linear(f"{name}.o", torch.cat(heads, dim=-1))

    def _bias(self, stack: str, length: int, causal: bool) -> Tensor:
        table = self.weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = torch.zeros(self.config.num_heads, length, length, dtype=torch.float64)
        for query in range(length):
            for key in range(length):
                bias[:, query, key] = -math.inf if causal and key > query else table[self._bucket(key - query, causal)]
        return bias

    def _bucket(self, distance: int, causal: bool) -> int:
        """Half of the buckets for the right side where there is one; then one a distance, from the middle on logarithmic ones."""
        buckets, first = self.config.relative_attention_num_buckets, 0
        if not causal:
            buckets //= 2
            first = buckets if distance > 0 else 0
        distance, exact = abs(distance), buckets // 2
        if distance < exact:
            return first + distance
        reach = math.log(distance / exact) / math.log(self.config.relative_attention_max_distance / exact)
        return first + min(exact + int(reach * (buckets - exact)), buckets - 1)

    # --- what is compared ---------------------------------------------------------------------------------------------

    def log_likelihood(self, source_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Return the sum over the target tokens."""
        before = torch.cat([torch.zeros(1, dtype=torch.long), target_ids[:-1]])
        logs = self.logits(source_ids, before).log_softmax(-1)
        return sum((logs[place, token] for place, token in enumerate(target_ids.tolist())), torch.zeros((), dtype=torch.float64))

    def greedy(self, source_ids: Tensor, num_tokens: int) -> list[int]:
        """Return what follows when the likeliest token is taken each time, up to the end of the text."""
        found: list[int] = []
        while len(found) < num_tokens and found[-1:] != [self.config.eos_token_id]:
            found.append(int(self.logits(source_ids, torch.tensor([0, *found]))[-1].argmax()))
        return found


def batch(task_index: tuple[int, ...] = (0, 0, 0, 0), pad: int = 0) -> Batch:
    """Return texts of different lengths and tasks; `pad` fills the sources up."""
    generator = torch.Generator().manual_seed(3)
    source, mask = torch.full((len(LENGTHS), max(LENGTHS)), pad), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    target = torch.full((len(LENGTHS), max(ANSWERS)), -100)
    for n, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        source[n, :length], mask[n, :length] = torch.randint(3, 128, (length,), generator=generator), 1
        target[n, :answer] = torch.cat([torch.randint(3, 128, (answer - 1,), generator=generator), torch.tensor([1])])
    names = tuple(f"task/train:{n}" for n in range(len(LENGTHS)))
    return Batch(0, source, mask, target, torch.tensor(task_index), names, torch.full((len(LENGTHS),), 0.25))


def rows(texts: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return source and target ids of each text without padding."""
    pairs = zip(texts.source_ids, texts.source_mask, texts.target_ids, strict=True)
    return [(source[mask.bool()], target[target >= 0]) for source, mask, target in pairs]


def weights_of(method: Any) -> dict[str, Tensor]:
    """Return the trainable tensors in float64 under their names."""
    return {name: tensor.double() for name, tensor in method.snapshot().items()}


@torch.no_grad()
def shake(method: Any, std: float = 0.2) -> None:
    """Move every trainable tensor away from its start, where many are 0 and prove nothing."""
    generator = torch.Generator().manual_seed(11)
    for parameter in method.parameters():
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))
