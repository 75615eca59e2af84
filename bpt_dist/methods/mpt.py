"""Multitask prompt tuning (MPT): Wang et al., ICLR 2023 (arXiv 2303.02861).

The prompt of task k is P* o (u_k v_k^T): one prompt that all tasks share times a rank-one matrix of the task. Source stage: a
teacher prompt is trained on every source task, then P* and all (u_k, v_k) learn together from the texts and from the teachers:

    L = L_CE + lambda (L_logits + L_hidden)

Target stage: P* is copied, u and v start at the means over the source tasks; P* and (u, v) have their own learning rates. Targets
trained together share P*. The published task sampling is `source.sampling: stochastic`, a setting of every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from bpt_dist.backbones.base import Forward, InputEmbeds
from bpt_dist.backbones.prompts import prepend_chosen
from bpt_dist.backbones.transfer import send
from bpt_dist.config import StageConfig, refuse, without_effect
from bpt_dist.config.prompt_options import FactoredPromptOptions
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods._source_prompts import SourcePrompts
from bpt_dist.methods.base import AuxiliaryPhase, SharedPrompt, Tensors
from bpt_dist.objective import low_rank_product, sequence_divergence, state_distance
from bpt_dist.tasks.spec import TaskSpec


class Config(FactoredPromptOptions):
    """Options of multitask prompt tuning; F is the shared prompt, u and v are the task vectors."""

    HAS_SOURCE_STAGE: ClassVar[bool] = True

    name: Literal["mpt"] = "mpt"
    distillation: float = Field(0.9, ge=0, description="Weight of the distillation losses (lambda); 0 trains no teachers.")
    teacher_steps: int = Field(1000, ge=1, description="Steps of the teacher prompts, before source.steps.")

    @model_validator(mode="after")
    def _teachers(self) -> "Config":
        refuse(without_effect(self, "with distillation 0", "teacher_steps") if not self.distillation else [])
        return self


class MultitaskPromptTuning(SourcePrompts):
    """Train one shared prompt times rank-one task matrices. 77,668 numbers a target for P = 100 on T5-base."""

    paper = "Wang et al. 2023 (MPT)"
    summary = "a shared prompt times rank-one task matrices, distilled from K teacher prompts"
    reference_tensors = frozenset({"teachers"})
    source_tensors: ClassVar[dict[str, str]] = {"full": "P D", "u": "K R P", "v": "K R D"}
    config: Config
    full: nn.Parameter
    u: nn.Parameter
    v: nn.Parameter

    # --- stages -----------------------------------------------------------------------------------------------------------------

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Start the teachers, or where nothing is distilled the shared prompt."""
        super().begin_source(tasks, mesh)
        self.stage = "teachers"
        if not self.config.distillation:
            self._begin_shared()

    def auxiliary_phases(self) -> Sequence[AuxiliaryPhase]:
        """Return the stage of the teachers."""
        return (AuxiliaryPhase("teachers", self.config.teacher_steps),) if self.stage == "teachers" else ()

    def end_auxiliary_phase(self, mesh: Mesh) -> None:
        """Freeze the teachers and start the shared prompt."""
        self.teachers = self.task_prompts.detach().clone()
        self._begin_shared()

    def _begin_shared(self) -> None:
        """Start from P* as prompt tuning would, all u and v ones: every task's prompt is P*.

        How the authors start u and v is not published. PEFT draws them from N(0, 0.02^2), which starts every prompt near zero.
        """
        self.stage = "source"
        full, num_tasks = self.start("source", "shared").float(), len(self.source_tasks)
        self._own_factors(full, torch.ones(num_tasks, 1, len(full)), torch.ones(num_tasks, 1, full.shape[1]))

    def _own_factors(self, full: Float[Tensor, "P D"], u: Float[Tensor, "K R P"], v: Float[Tensor, "K R D"]) -> None:
        self.forget()
        self.full, self.u, self.v = (nn.Parameter(tensor.to(self.backbone.device).clone()) for tensor in (full, u, v))

    def end_source(self, mesh: Mesh) -> dict[str, Tensor]:
        """Hand over the shared prompt and the vectors of every source task."""
        return {"full": self.full.detach(), "u": self.u.detach(), "v": self.v.detach()}

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Copy the shared prompt; every target's vectors start at the means of the source tasks' vectors."""
        assert source is not None
        self.stage, self.target_tasks = "target", [task.name for task in tasks]
        u, v = (source[name].mean(dim=0, keepdim=True).repeat(len(tasks), 1, 1) for name in ("u", "v"))
        self._own_factors(source["full"], u, v)

    # --- prompts and loss -------------------------------------------------------------------------------------------------------

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Put before every text the prompt of its task."""
        if self.stage == "teachers":
            return super().input_embeds(embeds, batch, particles)
        prompts = low_rank_product(self.full, self.u, self.v)
        return prepend_chosen(prompts[None], batch.task_index, embeds)

    @property
    def _distils(self) -> bool:
        return self.stage == "source" and self.config.distillation > 0

    @property
    def extra_forwards(self) -> int:
        """Return 1 where the teacher reads every text too."""
        return int(self._distils)

    def forward(self, batch: Batch, particles: slice = slice(None)) -> Forward:
        """Return log-likelihoods of the batch's targets; where a teacher is to be followed, run it first.

        First, because a partitioned backbone is gathered for the forward pass that `backward` undoes last.
        """
        if not self._distils:
            return super().forward(batch, particles)
        with torch.no_grad():
            self.taught = self._read(batch, lambda embeds: prepend_chosen(self.teachers[None], batch.task_index, embeds))
        return self._read(batch, lambda embeds: self.input_embeds(embeds, batch))

    def _read(self, batch: Batch, input_embeds: InputEmbeds) -> Forward:
        return self.backbone.log_likelihood(batch, input_embeds, self.reduction, states=True)

    def loss(self, forward: Forward, batch: Batch) -> Float[Tensor, ""]:
        """Return the weighted sum over texts of minus log-likelihood + lambda (KL to the teacher + distances of states)."""
        plain = super().loss(forward, batch)
        if not self._distils:
            return plain
        assert forward.states is not None
        assert self.taught.states is not None
        logits = forward.logits
        device = logits.device
        targets, weight = send(batch.target_ids, device), send(batch.weight, device)
        # A prompt's own positions are states too: the teacher's prompt is as long as the student's.
        encoder_mask = send(torch.cat([torch.ones(len(batch), len(self.full)), batch.source_mask], dim=1), device)
        distance = sequence_divergence(self.taught.logits[0], logits[0], targets, self.reduction)
        for taught, own, mask in zip(self.taught.states, forward.states, (encoder_mask, targets >= 0), strict=True):
            distance = distance + state_distance(taught[0], own[0], mask)
        return plain + self.config.distillation * (distance * weight).sum()

    def param_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        """Return two speeds on targets: the shared prompt and the task vectors.

        On sources they have one, `source.lr`. A relative one is for each in its own units: the vectors are numbers around 1.
        """
        if self.stage == "teachers" or (self.stage == "source" and stage.lr_relative is None):
            return super().param_groups(stage)
        full, factors = stage.lr_relative, stage.lr_relative
        if self.stage == "target":
            full, factors = self.config.lr_full_relative, self.config.lr_low_rank
        return [
            {"params": [self.full], "lr": self.prompt_rate(self.config.lr_full, full)},
            {"params": [self.u, self.v], "lr": factors},
        ]

    @classmethod
    def shared_prompt(cls, trained: Tensors) -> SharedPrompt:
        """Return the shared prompt and the targets' task vectors."""
        return SharedPrompt(trained["full"], trained["u"], trained["v"])

    def prompts(self) -> dict[str, Float[Tensor, "P D"]]:
        """Return the composed prompt of each target task."""
        return dict(zip(self.target_tasks, low_rank_product(self.full, self.u, self.v).detach().cpu(), strict=True))
