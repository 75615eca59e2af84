"""Decomposed prompt tuning (DePT): Shi & Lipani, ICLR 2024 (arXiv 2309.05173).

The numbers of a long prompt are spent on a shorter one and on a low-rank update of the input word embeddings: the token at position
t of the text enters the backbone as w_t + (A B)_t. Both parts have their own learning rate. It transfers nothing from source tasks:
this is the strong single-task prompt baseline of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.prompts import prepend, rows_of
from bpt_dist.config import StageConfig, refuse
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Tensors, generator
from bpt_dist.methods.prompt_tuning import PromptTuning
from bpt_dist.tasks.spec import TaskSpec

PUBLISHED_ALPHA = 8  # `lora_alpha` of the authors' code, which no script of theirs changes


class Config(PromptOptions):
    """Options of decomposed prompt tuning."""

    name: Literal["dept"] = "dept"
    length: int = Field(40, ge=1, le=2000, description="Prompt positions (P); the paper tries 20, 40, 60 and 80.")
    max_length: int = Field(
        256, ge=1, le=4096, description="Text positions the update covers (rows of A); later tokens keep their own embeddings."
    )
    rank: int | None = Field(None, ge=1, description="Columns of A; null spends what a prompt of `budget_length` has left.")
    budget_length: int = Field(100, ge=1, description="Length of the plain prompt with the same number of trainable numbers.")
    lr_low_rank: float = Field(5e-3, gt=0, description="Learning rate of the update; target.lr is the prompt's.")
    scale_update: bool = Field(
        False, description="Multiply the update by 8 / sqrt(rank), which the authors' code does and the paper does not."
    )

    @model_validator(mode="after")
    def _budget(self) -> "Config":
        problems = []
        if self.rank is None and self.length >= self.budget_length:
            problems.append(f"length: leaves nothing of budget_length {self.budget_length} (got {self.length}); lower it")
        elif self.rank is not None and self.budget_length != type(self).model_fields["budget_length"].default:
            problems.append(f"budget_length: has no effect beside rank (got {self.budget_length}); remove it")
        refuse(problems)
        return self


class DecomposedPromptTuning(PromptTuning):
    """Train a short prompt and a low-rank update of the word embeddings. 76,800 numbers for P = 40, R = 45 on T5-base."""

    paper = "Shi & Lipani 2024 (DePT)"
    summary = "a shorter soft prompt and a low-rank update of the input embeddings, from scratch"
    config: Config

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start the prompt from scratch and the update at zero: B = 0, A uniform as the authors' Kaiming start."""
        super().begin_target(source, tasks, num_examples, mesh)
        rank, rows, device = self.update_rank(), self.config.max_length, self.backbone.device
        uniform = torch.rand(rows, rank, generator=generator(self.seed, "update", *self.target_tasks))
        self.position_factor = nn.Parameter(((2 * uniform - 1) / rank**0.5).to(device))
        self.embedding_factor = nn.Parameter(torch.zeros(rank, self.backbone.width, device=device))

    def update_rank(self) -> int:
        """Return R, the largest rank within the budget: P D + (S + D) R <= budget_length D; exact for T5-base's 20, 40, 60, 80."""
        if self.config.rank is not None:
            return self.config.rank
        left = (self.config.budget_length - self.particles.shape[1]) * self.backbone.width
        return max(1, left // (self.config.max_length + self.backbone.width))

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Put the prompt before every text whose embeddings are updated by position.

        Pads are updated too, but no text sees them, so a text does not depend on how far it is padded.
        """
        update = self.position_factor[: embeds.shape[1]] @ self.embedding_factor
        if self.config.scale_update:
            update = update * (PUBLISHED_ALPHA / len(self.embedding_factor) ** 0.5)
        beyond = embeds.shape[1] - len(update)
        return prepend(rows_of(self.particles, particles), embeds + functional.pad(update, (0, 0, 0, beyond)).to(embeds))

    @classmethod
    def options_of_stored(cls, options: Mapping[str, Any], trained: Tensors) -> dict[str, Any]:
        """Return options of the same sizes; `init: file` would read the prompt's start once more, only to be replaced."""
        if options["init"] != "file":
            return dict(options)
        length, rank = trained["particles"].shape[1], trained["position_factor"].shape[1]
        budget = Config.model_fields["budget_length"].default
        return {**options, "init": "normal", "init_file": None, "length": length, "rank": rank, "budget_length": budget}

    def param_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        """Return two speeds: the prompt and the update."""
        update = [self.position_factor, self.embedding_factor]
        return [{"params": [self.particles], "lr": self.stage_rate(stage)}, {"params": update, "lr": self.config.lr_low_rank}]

    def prompts(self) -> dict[str, Float[Tensor, "P D"]] | None:
        """Return None: a prompt file has no place for the update, and without it the prompt means something else."""
        return None
