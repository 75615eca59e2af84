"""BitFit: Ben Zaken et al., "Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL 2022.

BitFit trains the biases a model has. T5 has none, so one is added, starting at 0, to every linear layer (q, k, v, o, wi, wo, and
lm_head) and to the layer norms of the blocks. The norm after each stack gets none. That is what the code of Compacter (Karimi
Mahabadi et al. 2021) and ATTEMPT does, from which published rows come: it builds `final_layer_norm` without `adapter_config`
(rabeehk/compacter, third_party/models/t5/modeling_t5.py, `T5Stack`).
A decoder-only model is treated alike; the norms of single heads get none.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from bpt_dist.backbones.insertion import Change, Site, each_token
from bpt_dist.config import MethodConfig
from bpt_dist.methods._inserted import InsertedMethod

LM_HEAD = "lm_head"


class Config(MethodConfig):
    """Options of BitFit; learning rate and steps are the target stage's (published: 3e-4)."""

    name: Literal["bitfit"] = "bitfit"
    # Published counts include this bias. `freeze_bitfit_lm_head` of the configuration released with ATTEMPT freezes the weight of
    # the head and trains its bias.
    lm_head: bool = Field(True, description="Train a bias of the logits as well.")


class BitFit(InsertedMethod):
    """Train a bias on every linear layer and every layer norm of a block, shared by all targets. 280,960 numbers on T5-base."""

    paper = "Ben Zaken et al. 2022"
    summary = "biases added to all linear layers and the layer norms of the blocks"
    config: Config

    def insert(self) -> None:
        """Insert a zero bias at every linear layer and every layer norm of a block."""
        self.biases = nn.ParameterDict()
        self.backbone.wrap_linear(self._bias, None)
        self.backbone.wrap_norm(self._bias)

    def _bias(self, place: Site) -> Change:
        if self.backbone.is_last_norm(place.name) or (place.stack == LM_HEAD and not self.config.lm_head):
            return each_token(lambda _x, y: y)
        size = place.module.out_features if isinstance(place.module, nn.Linear) else self.backbone.width
        bias = self.biases[place.key] = self.placed(torch.zeros(size))
        return each_token(lambda _x, y: y + bias.to(y.dtype))
