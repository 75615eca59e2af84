"""Adapters: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, placed as by HyperFormer.

After the self-attention and the feed-forward sub-layer of every block of all stacks (none after cross-attention), before the
residual is added and, in Gemma, before the norm that follows a sub-layer: y + up(act(down(y))). All layer norms of the backbone
are trained as well. Targets trained together have one adapter each and share the layer norms, as the published row of several
targets does (rabeehk/hyperformer, `AdapterController.construct_adapters` with configs/adapter_dagger.json); `shared` gives all of
them one adapter.

Differences from the code of published rows: weights start from the paper's N(0, 0.01^2) cut at two standard deviations, which the
code does not cut; the code leaves the task's name out of the text for adapters, while all methods here see the same text; and the
code of the row of several targets puts a layer norm, shared by the tasks, behind each adapter (`add_layer_norm_after_adapter`),
which the printed count of parameters does not include.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from bpt_dist.backbones.insertion import Change, Site, each_token, of_rows
from bpt_dist.backbones.transfer import send
from bpt_dist.config import MethodConfig
from bpt_dist.data.batches import Batch
from bpt_dist.methods._inserted import ACTIVATIONS, InsertedMethod, bottleneck
from bpt_dist.methods.base import Tensors

CUT = 2.0  # standard deviations


class Config(MethodConfig):
    """Options of adapters; learning rate and steps are the target stage's (published: 3e-4)."""

    name: Literal["adapters"] = "adapters"
    reduction: int = Field(32, ge=1, description="Width of the backbone divided by the width of the bottleneck.")
    activation: Literal["gelu_new", "relu", "swish"] = Field("gelu_new", description="Non-linearity of the bottleneck.")
    init_std: float = Field(0.01, gt=0, description="Standard deviation of the weights at the start; biases start at 0.")
    shared: bool = Field(
        False, description="One adapter for all targets trained together; published is one a target with shared layer norms."
    )


class Adapters(InsertedMethod):
    """Train a bottleneck after each sub-layer, and the layer norms: 1,855,104 numbers on T5-base.

    Each of eight targets trained together has bottlenecks of its own and an eighth of the norms: 1,813,440 (231,888 with `shared`).
    """

    paper = "Houlsby et al. 2019"
    summary = "a bottleneck after each sub-layer, one a target, and all layer norms"
    config: Config

    def insert(self) -> None:
        """Insert a near-identity bottleneck for each target after each sub-layer but cross-attention."""
        self.adapters = nn.ParameterDict()
        self.backbone.wrap_sublayer(self._adapter, ("self_attention", "feed_forward"))
        self.train_norms()

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Note which adapter each text passes through: every pass comes here first."""
        self.task_of_text = send(batch.task_index, embeds.device)
        self.num_tasks_in_pass = len(batch.task_index.unique())
        return super().input_embeds(embeds, batch, particles)

    def _adapter(self, place: Site) -> Change:
        weights = {name: self.placed(start) for name, start in self._starts(place).items()}
        self.adapters.update({f"{place.key}/{name}": weight for name, weight in weights.items()})
        activation = ACTIVATIONS[self.config.activation]

        def change(_x: Tensor, y: Tensor) -> Tensor:
            of_texts: Mapping[str, Tensor] = weights
            if self._is_one_a_target:
                index = self.task_of_text[:1] if self.num_tasks_in_pass == 1 else of_rows(self.task_of_text, len(y))
                of_texts = {name: weight[index] for name, weight in weights.items()}
            return y + bottleneck(y, **of_texts, activation=activation).to(y.dtype)

        return change if self._is_one_a_target else each_token(change)

    @property
    def _is_one_a_target(self) -> bool:
        return len(self.target_tasks) > 1 and not self.config.shared

    def _starts(self, place: Site) -> dict[str, Tensor]:
        """Return the weights at the start, with a first axis over targets where each has its own."""
        if self._is_one_a_target:
            starts = [self._start(self.draw(place.name, task)) for task in self.target_tasks]
            return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
        return self._start(self.draw(place.name))

    def _start(self, source: torch.Generator) -> dict[str, Tensor]:
        width, std = self.backbone.width, self.config.init_std
        inner = max(1, width // self.config.reduction)
        return {
            "down": nn.init.trunc_normal_(torch.empty(width, inner), 0, std, -CUT * std, CUT * std, generator=source),
            "down_bias": torch.zeros(inner),
            "up": nn.init.trunc_normal_(torch.empty(inner, width), 0, std, -CUT * std, CUT * std, generator=source),
            "up_bias": torch.zeros(width),
        }

    @classmethod
    def options_of_stored(cls, options: Mapping[str, Any], trained: Tensors) -> dict[str, Any]:
        """Return the options with `shared` as the stored tensors have it: runs of earlier versions do not name it."""
        biases = [tensor for name, tensor in trained.items() if name.endswith("/down_bias")]
        return {**options, "shared": biases[0].dim() == 1} if biases else dict(options)
