"""LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

W x becomes W x + (alpha / rank) B A x on the query and value projections. A starts from a Gaussian as in the paper, which leaves
its width open: N(0, 1 / rank^2) is what PEFT calls `gaussian`. The authors' code and PEFT's default draw A from Kaiming's uniform
distribution instead. B starts at 0, so that the first step starts from the backbone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.insertion import Change, Site, each_token
from bpt_dist.config import MethodConfig
from bpt_dist.methods._inserted import InsertedMethod
from bpt_dist.methods.base import LowRankPairs


class Config(MethodConfig):
    """Options of LoRA; learning rate and steps are the target stage's."""

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=1024, description="Rank of the change of each weight (R).")
    alpha: float = Field(8.0, gt=0, description="The change is scaled by alpha / rank.")
    targets: Annotated[tuple[Annotated[str, Field(pattern=r"^[a-z_0-9]+$")], ...], Field(strict=False, min_length=1)] = Field(
        ("q", "v"),
        description="Linear layers that are changed, of self- and cross-attention alike: q, k, v, o, wi, wo, or by their "
        "own names.",
    )
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian", description="Start of A: the paper's N(0, 1/rank^2), or `kaiming`, uniform, as the authors' code."
    )


class Lora(InsertedMethod):
    """Train a low-rank change of the q and v projections, shared by all targets. 884,736 numbers for rank 8 on T5-base."""

    paper = "Hu et al. 2022"
    summary = "low-rank changes of the query and value projections"
    config: Config

    def insert(self) -> None:
        """Insert a pair that starts at no change around each target layer."""
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.backbone.wrap_linear(self._pair, self.config.targets)

    def _pair(self, place: Site) -> Change:
        assert isinstance(place.module, nn.Linear)
        num_inputs, num_outputs, rank = place.module.in_features, place.module.out_features, self.config.rank
        a = self.a[place.key] = self.placed(self._start(num_inputs, self.draw(place.name)))
        b = self.b[place.key] = self.placed(torch.zeros(num_outputs, rank))
        scale = self.config.alpha / rank

        def change(x: Tensor, y: Tensor) -> Tensor:
            return y + (functional.linear(functional.linear(x.to(a.dtype), a), b) * scale).to(y.dtype)

        return each_token(change)

    def _start(self, num_inputs: int, source: torch.Generator) -> Tensor:
        rank = self.config.rank
        if self.config.init == "gaussian":
            return torch.randn(rank, num_inputs, generator=source) / rank
        # Kaiming with a = sqrt(5), as torch starts a linear layer.
        return (2 * torch.rand(rank, num_inputs, generator=source) - 1) / num_inputs**0.5

    def low_rank_pairs(self) -> LowRankPairs:
        """Return the trained pairs under the names of the backbone's layers."""
        pairs = {key.replace("/", "."): (a.detach().cpu(), self.b[key].detach().cpu()) for key, a in self.a.items()}
        return LowRankPairs(self.config.alpha, pairs)
