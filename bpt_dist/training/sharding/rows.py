"""Word embeddings of a partitioned backbone: the rows that a pass looks up are sent, the table is never made whole for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from bpt_dist.backbones.base import Backbone, local_shard


class SharedTable(nn.Embedding):
    """A table of which each rank of `ranks` (None: all) holds an equal part of the numbers, one after the other.

    A part need not begin with a row: a row that lies in two parts is the sum of two answers, each zero where the other is not.
    """

    ranks: Any
    table: Any  # (weight,), which is not a parameter of the module; not read as `weight`, which makes ZeRO gather it

    def forward(self, input: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Return rows of the table (collective: every rank, whatever its ids are)."""
        # Whole for once, as for all ranks: what is too small to be partitioned, or a head that is the table while it is used.
        (weight,) = self.table
        if weight.numel() and not hasattr(weight, "to_local"):
            return super().forward(input)
        return look_up(weight, input, (self.num_embeddings, self.embedding_dim), self.ranks)


@torch.no_grad()
def look_up(weight: Tensor, ids: Int[Tensor, "*n"], shape: tuple[int, int], ranks: Any) -> Float[Tensor, "*n D"]:
    """Return rows of a partitioned table of (rows, D); each different row is sent once (collective: every rank)."""
    num_rows, width = shape
    size, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
    own = local_shard(weight).reshape(-1)
    # FSDP2 cuts between rows, ZeRO the numbers; the last part may be shorter, or padded.
    part = -(-num_rows // size) * width if hasattr(weight, "to_local") else own.numel()
    wanted, places = ids.unique(return_inverse=True)
    bounds = torch.arange(size, device=ids.device)
    begins = torch.searchsorted((wanted * width + width - 1) // part, bounds)
    ends = torch.searchsorted(wanted * width // part, bounds, right=True)
    ranges = torch.stack([begins, ends]).tolist()
    sent = [max(0, end - begin) for begin, end in zip(*ranges, strict=True)]
    asked = torch.empty_like(bounds)
    dist.all_to_all_single(asked, torch.tensor(sent, device=ids.device), group=ranks)
    received: list[int] = asked.tolist()
    of_owners = torch.cat([wanted[begin : begin + count] for begin, count in zip(ranges[0], sent, strict=True)])
    requests = wanted.new_empty(sum(received))
    dist.all_to_all_single(requests, of_owners, received, sent, group=ranks)
    answers = own.new_empty((len(of_owners), width), device=ids.device)
    dist.all_to_all_single(answers, _rows(own, requests, width, rank * part), sent, received, group=ranks)
    found = answers.new_zeros((len(wanted), width))
    for begin, count, rows in zip(ranges[0], sent, answers.split(sent), strict=True):
        found[begin : begin + count] += rows
    return found[places]


def _rows(own: Float[Tensor, " part"], ids: Int[Tensor, " n"], width: int, first: int) -> Float[Tensor, "n D"]:
    """Return what this rank's numbers, from the `first` of the table on, say of rows; zero elsewhere; where the ids are."""
    numbers = (ids[:, None] * width + torch.arange(width, device=ids.device) - first).to(own.device)
    is_here = (numbers >= 0) & (numbers < own.numel())
    found = own[numbers.clamp(0, max(0, own.numel() - 1))] if own.numel() else own.new_zeros(numbers.shape)
    return found.masked_fill(~is_here, 0).to(ids.device)


def tables(backbone: Backbone) -> list[nn.Embedding]:
    """Return the modules that look up word embeddings: they share one weight."""
    weight = backbone.word_embeddings.weight
    return [module for module in backbone.core.modules() if isinstance(module, nn.Embedding) and module.weight is weight]


def send_rows(modules: list[nn.Embedding], ranks: Any) -> None:
    """Let modules of a partitioned table send rows. Their class is changed, and what a family adds, such as a scale, remains."""
    for module in modules:
        kind = type(module)
        module.__class__ = SharedTable if kind is nn.Embedding else type(kind.__name__, (kind, SharedTable), {})
        sharded: Any = module
        sharded.ranks, sharded.table = ranks, (module.weight,)
