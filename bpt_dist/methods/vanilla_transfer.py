"""Vanilla transfer prompt tuning: one prompt on the mixture of all source tasks, then prompt tuning from there.

The published twin is SPoT's "generic" prompt (Vu et al. 2022); the thesis slides list it as "Vanilla transfer PT".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Tensors
from bpt_dist.methods.prompt_tuning import PromptTuning
from bpt_dist.tasks.spec import TaskSpec


class Config(PromptOptions):
    """Options of vanilla transfer: those of the prompt it starts from."""

    HAS_SOURCE_STAGE: ClassVar[bool] = True

    name: Literal["vanilla_transfer"] = "vanilla_transfer"


class VanillaTransfer(PromptTuning):
    """Train one prompt on the source mixture and continue on the target. 76,800 numbers for P = 100 on T5-base."""

    paper = "thesis slides 2023; Vu et al. 2022 (SPoT, generic)"
    summary = "one soft prompt on the source mixture, continued on the target"
    source_tensors: ClassVar[dict[str, str]] = {"mean": "P D"}

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Start the one prompt all source tasks share."""
        self.own(self.start("source")[None])

    def end_source(self, mesh: Mesh) -> dict[str, Tensor]:
        """Hand over the particles and their mean: one particle is its own mean."""
        particles = mesh.gather_particles(self.particles.detach())
        return {"particles": particles, "mean": particles.mean(dim=0)}

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Continue from the mean of the source prompts."""
        assert source is not None
        self.target_tasks = [task.name for task in tasks]
        self.own(source["mean"][None])
