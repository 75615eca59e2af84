"""Full fine-tuning: every weight of the backbone is trained on the target (Raffel et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from bpt_dist.backbones.base import local_shard
from bpt_dist.config import MethodConfig
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method, Tensors
from bpt_dist.tasks.spec import TaskSpec


class Config(MethodConfig):
    """Fine-tuning has no settings of its own: learning rate and steps are the target stage's."""

    TRAINS_BACKBONE: ClassVar[bool] = True

    name: Literal["fine_tuning"] = "fine_tuning"


class FineTuning(Method):
    """Train all weights of the backbone on the target task(s). 222,903,552 numbers on T5-base.

    Without dropout, as all methods here: what it drops would depend on the number of processes and on where a run was resumed.
    """

    paper = "Raffel et al. 2020"
    summary = "all weights of the backbone"

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start from the pretrained weights, also after an earlier target has changed them."""
        weights = dict(self.backbone.model.named_parameters())
        if not hasattr(self, "pretrained"):
            self.pretrained = {name: local_shard(weight).clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            local_shard(weight).copy_(self.pretrained[name])
            # Registered here, so that optimizer, checkpoints and counts find them where they find every method's tensors.
            weight.requires_grad = True
            self.register_parameter(name.replace(".", "/"), weight)

    def end(self) -> None:
        """Give the backbone its pretrained weights back, frozen."""
        super().end()
        # Nothing was begun where an earlier process had stored all results.
        pretrained = getattr(self, "pretrained", {})
        for name, weight in self.backbone.model.named_parameters():
            part = local_shard(weight.requires_grad_(False))
            part.copy_(pretrained.get(name, part))

    def num_trainable(self) -> int:
        """Return the number of weights of the whole backbone, of which this rank may hold a part."""
        return sum(getattr(weight, "ds_numel", weight.numel()) for weight in self.parameters())
