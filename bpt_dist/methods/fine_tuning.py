"""Full fine-tuning: every weight of the T5 is trained on the target (Raffel et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from bpt_dist.config import MethodConfig
from bpt_dist.data.tasks import TaskSpec
from bpt_dist.mesh import Mesh
from bpt_dist.methods.base import Method, Tensors


class Config(MethodConfig):
    """Fine-tuning has no settings of its own: learning rate and steps are the target stage's."""

    name: Literal["fine_tuning"] = "fine_tuning"


class FineTuning(Method):
    """Train all weights of the T5 on the target task(s). 222,903,552 numbers on T5-base."""

    paper = "Raffel et al. 2020"
    summary = "all weights of the T5"
    freezes_backbone = False

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start from the pretrained weights, kept aside for the next target."""
        if not hasattr(self, "_pretrained"):
            self._pretrained = {name: weight.detach().clone() for name, weight in self.backbone.model.named_parameters()}
        for name, weight in self.backbone.model.named_parameters():
            weight.data.copy_(self._pretrained[name])
            # Registered here, so that optimizer, checkpoints and counts find the weights where they find every method's tensors.
            self.register_parameter(name.replace(".", "/"), nn.Parameter(weight.data) if not weight.requires_grad else weight)
