"""One prompt for each source task, all trained in one run: what SPoT retrieves, ATTEMPT mixes and MPT distils."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpt_dist.backbones.prompts import prepend_chosen
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.prompt_tuning import PromptTuning
from bpt_dist.tasks.spec import TaskSpec


class SourcePrompts(PromptTuning):
    """Train a prompt on each source task, every text under its own task's prompt: K prompt tunings that share their steps."""

    independent_rows = frozenset({"task_prompts"})

    def task_start(self, task: str) -> Float[Tensor, "P D"]:
        """Return where the prompt of one source task starts; by default every task has its own start."""
        return self.start("source", task)

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Start one prompt for each source task."""
        self.forget()
        self.source_tasks = tuple(task.name for task in tasks)
        prompts = torch.stack([self.task_start(name) for name in self.source_tasks])
        # Not particles: these are trained on different texts, so every rank of the mesh keeps all of them.
        self.task_prompts = nn.Parameter(prompts.to(self.backbone.device, torch.float32))

    def forget(self) -> None:
        """Drop the tensors of the stage before: nothing of it is trained any further."""
        for name in dict(self.named_parameters()):
            delattr(self, name)

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Put before every text the prompt of its source task; afterwards, the target's."""
        if not hasattr(self, "task_prompts"):
            return super().input_embeds(embeds, batch, particles)
        return prepend_chosen(self.task_prompts[None], batch.task_index, embeds)
