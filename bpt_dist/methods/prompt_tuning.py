"""Prompt tuning: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpt_dist.backbones.prompts import initial_prompt, prepend, rows_of
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method, Tensors, generator
from bpt_dist.tasks.spec import TaskSpec


class Config(PromptOptions):
    """Options of prompt tuning."""

    name: Literal["prompt_tuning"] = "prompt_tuning"


class PromptTuning(Method):
    """Train a soft prompt before the text; the backbone stays frozen. 76,800 numbers for P = 100 on T5-base."""

    paper = "Lester et al. 2021"
    summary = "one soft prompt a task, from scratch"
    particle_tensors = frozenset({"particles"})
    config: PromptOptions

    def start(self, *keys: object) -> Float[Tensor, "P D"]:
        """Return the initial prompt of this seed; `keys` tell several starts of one run apart."""
        return initial_prompt(self.config, self.backbone, generator(self.seed, "prompt", *keys))

    def own(self, particles: Float[Tensor, "m P D"]) -> None:
        """Make `particles` the trainable tensor of this rank."""
        # With a single target the whole state is one tensor [1, P, D]: one particle is not a special case.
        self.particles = nn.Parameter(particles.to(self.backbone.device, torch.float32).clone())

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start one prompt from scratch, shared by all target tasks when there are several."""
        self.target_tasks = [task.name for task in tasks]
        self.own(self.start(*self.target_tasks)[None])

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Put each of the particles before every text."""
        return prepend(rows_of(self.particles, particles), embeds)

    def prompts(self) -> dict[str, Float[Tensor, "P D"]] | None:
        """Return the trained prompt under the name of each target task."""
        return {name: self.particles[0].detach().cpu() for name in self.target_tasks}
