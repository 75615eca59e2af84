"""BitFit: Ben Zaken et al., "Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL 2022.

BitFit trains the biases a model has. T5 has none, so one is added, starting at 0, to every linear layer (q, k, v, o, wi, wo, and
lm_head) and every layer norm, as the code of Compacter (Karimi Mahabadi et al. 2021) does, from which published rows come.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from bpt_dist.config import MethodConfig
from bpt_dist.insertion import Change, Place
from bpt_dist.methods._inserted import InsertedMethod

LM_HEAD = "lm_head"


class Config(MethodConfig):
    """Options of BitFit; learning rate and steps are the target stage's (published: 3e-4)."""

    name: Literal["bitfit"] = "bitfit"
    # The published counts include this bias; the configuration released with ATTEMPT freezes it.
    lm_head: bool = Field(True, description="Train a bias of the logits as well.")


class BitFit(InsertedMethod):
    """Train a bias on every linear layer and layer norm, shared by all targets. 282,496 numbers on T5-base."""

    paper = "Ben Zaken et al. 2022"
    summary = "biases added to all linear layers and layer norms"
    config: Config

    def insert(self) -> None:
        """Insert a zero bias at every linear layer and layer norm."""
        self.biases = nn.ParameterDict()
        self.backbone.around_linear(self._bias, None)
        self.backbone.around_norm(self._bias)

    def _bias(self, place: Place) -> Change:
        if place.stack == LM_HEAD and not self.config.lm_head:
            return lambda _x, y: y
        size = place.module.out_features if isinstance(place.module, nn.Linear) else self.backbone.width
        bias = self.biases[place.key] = self.placed(torch.zeros(size))
        return lambda _x, y: y + bias.to(y.dtype)
