"""Adapters: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, placed as by HyperFormer.

After the self-attention and the feed-forward sub-layer of every block of both stacks (none after cross-attention), before T5 adds
the residual: y + up(act(down(y))). All layer norms of the T5 are trained as well. Differences from the code of published rows
(ATTEMPT's): weights start from the paper's N(0, 0.01^2) cut at two standard deviations, which the code does not cut; and the code
leaves the task's name out of the text for adapters alone, while all methods here see the same text.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from bpt_dist.config import MethodConfig
from bpt_dist.insertion import Change, Place
from bpt_dist.methods._inserted import ACTIVATIONS, InsertedMethod, bottleneck

CUT = 2.0  # standard deviations


class Config(MethodConfig):
    """Options of adapters; learning rate and steps are the target stage's (published: 3e-4)."""

    name: Literal["adapters"] = "adapters"
    reduction: int = Field(32, ge=1, description="Width of the T5 divided by the width of the bottleneck.")
    activation: Literal["gelu_new", "relu", "swish"] = Field("gelu_new", description="Non-linearity of the bottleneck.")
    init_std: float = Field(0.01, gt=0, description="Standard deviation of the weights at the start; biases start at 0.")


class Adapters(InsertedMethod):
    """Train a bottleneck after each sub-layer, and the layer norms, shared by all targets. 1,855,104 numbers on T5-base."""

    paper = "Houlsby et al. 2019"
    summary = "a bottleneck after each sub-layer, and all layer norms"
    config: Config

    def insert(self) -> None:
        """Insert a near-identity bottleneck after each sub-layer but cross-attention."""
        self.adapters = nn.ParameterDict()
        self.backbone.around_sublayer(self._adapter, ("self_attention", "feed_forward"))
        self.train_norms()

    def _adapter(self, place: Place) -> Change:
        width = self.backbone.width
        inner, std, source = max(1, width // self.config.reduction), self.config.init_std, self.draw(place.name)
        starts = {
            "down": nn.init.trunc_normal_(torch.empty(width, inner), 0, std, -CUT * std, CUT * std, generator=source),
            "down_bias": torch.zeros(inner),
            "up": nn.init.trunc_normal_(torch.empty(inner, width), 0, std, -CUT * std, CUT * std, generator=source),
            "up_bias": torch.zeros(width),
        }
        weights = {name: self.placed(start) for name, start in starts.items()}
        self.adapters.update({f"{place.key}/{name}": weight for name, weight in weights.items()})
        activation = ACTIVATIONS[self.config.activation]
        return lambda _x, y: y + bottleneck(y, **weights, activation=activation).to(y.dtype)
