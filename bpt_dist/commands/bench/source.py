"""The variants of the source step that are compared: PEFT in a loop, the stock T5, ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench import correctness
from bpt_dist.commands.bench.baselines import PeftLoop
from bpt_dist.commands.bench.correctness import Gradients
from bpt_dist.commands.bench.timing import Clock
from bpt_dist.commands.bench.workload import Work, in_dtype, our_pass, random_backbone, stein_phi, use_attention

ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Variant:
    """One way to compute the step. `num_tokens`: encoder tokens it computes, padding included. `stock`: the variant whose distance
    from float64 limits that of this one (None: dropout makes its numbers random)."""

    name: str
    title: str
    dtype: str
    run: Callable[[], Gradients]
    num_tokens: int
    stock: str | None


class Models:
    """The T5s of a comparison, made on first use; PEFT, the stock variants and ours share the weights of a dtype."""

    def __init__(self, shape: T5Shape, device: torch.device, num_prompt: int, seed: int = 0) -> None:
        self.shape, self.device, self.num_prompt, self.seed = shape, device, num_prompt, seed
        self._backbones: dict[str, T5Backbone] = {}
        self._peft: dict[str, PeftLoop] = {}
        self._packed: dict[str, PackedT5] = {}

    def backbone(self, dtype: str) -> T5Backbone:
        """Return the T5 in a dtype."""
        if dtype not in self._backbones:
            first = self._backbones.get("fp32") or random_backbone(self.shape, self.device, self.seed)
            self._backbones["fp32"] = first
            self._backbones.setdefault(dtype, first if dtype == "fp32" else in_dtype(first, dtype))
        return self._backbones[dtype]

    def forget(self, dtype: str) -> None:
        """Free the T5 of a dtype."""
        self._backbones.pop(dtype, None)
        self._peft.pop(dtype, None)
        self._packed.pop(dtype, None)

    def peft(self, dtype: str) -> PeftLoop:
        """Return PEFT's model over the T5 of a dtype."""
        if dtype not in self._peft:
            self._peft[dtype] = PeftLoop(self.backbone(dtype), self.num_prompt)
        return self._peft[dtype]

    def packed(self, dtype: str) -> PackedT5:
        """Return our pass over the T5 of a dtype."""
        if dtype not in self._packed:
            self._packed[dtype] = our_pass(self.backbone(dtype))
        return self._packed[dtype]

    def stock(self, dtype: str, attention: str) -> T5Backbone:
        """Return the T5 of a dtype, with its stock modules set to a kind of attention."""
        backbone = self.backbone(dtype)
        use_attention(backbone, attention)
        return backbone


def best_attention(models: Models, work: Work, dtype: str, clock: Clock) -> str:
    """Return the attention with which PEFT is fastest in this dtype: one particle, the better of two runs each."""
    first = Work(work.prompts[:1], work.texts)
    seconds = {}
    for attention in ATTENTIONS:
        models.stock(dtype, attention)
        models.peft(dtype).gradients(first)
        seconds[attention] = min(clock.time(lambda: models.peft(dtype).gradients(first)).seconds for _ in range(2))
    return min(seconds, key=lambda attention: seconds[attention])


def variants(models: Models, work: Work, attention: dict[str, str], pass_size: int | None) -> Iterator[Variant]:
    """Yield the variants of the source step for the dtypes in `attention`: the stock modules' attention by dtype."""
    padded_tokens, tokens = work.num_padded_tokens, work.num_tokens
    for dtype, kind in attention.items():
        loop = f"peft_{dtype}"
        yield Variant(loop, f"PEFT loop, {kind}", dtype, partial(_peft, models, work, dtype, kind, False), padded_tokens, loop)
        if dtype == "fp32":
            dropout = partial(_peft, models, work, dtype, kind, True)
            yield Variant("peft_train_fp32", f"PEFT loop, {kind}, dropout", dtype, dropout, padded_tokens, None)
            batch = partial(_stock, correctness.padded, models, work, dtype, kind)
            yield Variant("padded_fp32", f"one padded batch, stock T5, {kind}", dtype, batch, padded_tokens, loop)
        groups = partial(_stock, correctness.grouped, models, work, dtype, kind)
        yield Variant(f"grouped_{dtype}", f"grouped by text, stock T5, {kind}", dtype, groups, tokens, loop)
        yield Variant(f"ours_{dtype}", "ours, packed", dtype, partial(_ours, models, work, dtype, pass_size), tokens, loop)


def _peft(models: Models, work: Work, dtype: str, attention: str, dropout: bool) -> Gradients:
    models.stock(dtype, attention)
    return models.peft(dtype).gradients(work, dropout=dropout)


def _stock(way: Callable[[T5Backbone, Work], Gradients], models: Models, work: Work, dtype: str, attention: str) -> Gradients:
    return way(models.stock(dtype, attention), work)


def _ours(models: Models, work: Work, dtype: str, pass_size: int | None) -> Gradients:
    gradients = correctness.packed(models.backbone(dtype), models.packed(dtype), work, pass_size)
    stein_phi(work.prompts, gradients[1])  # only ours is charged with this phase of the step
    return gradients


def exact(models: Models, work: Work, num_particles: int = 1) -> Gradients:
    """Return the first particles' log-likelihoods and gradients in float64, through the stock T5 without padding."""
    first = Work(work.prompts[:num_particles].double(), work.texts)
    reference = correctness.grouped(models.stock("fp64", "eager"), first)
    models.forget("fp64")
    return reference


def bytes_needed(shape: T5Shape, work: Work) -> int:
    """Return the bytes that one padded batch of all rows keeps for the backward pass of the stock T5."""
    source, target = work.texts.source_ids.shape[1], work.texts.target_ids.shape[1]
    return work.num_rows * shape.row_cost(work.prompts.shape[1], source, target).activation_bytes
