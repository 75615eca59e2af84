"""Soft prompt transfer (SPoT): Vu et al., ACL 2022 (arXiv 2110.07904), in its targeted form: retrieval by task embedding.

A library of one prompt for each source task is trained in one run. Early versions of the prompts are its keys ("task embeddings"),
the finished ones its values. A target task trains a prompt for as few steps as the keys had, and starts from the value whose key is
the most similar, or from a mixture of the most similar ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from bpt_dist.config import refuse, without_effect
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods._source_prompts import SourcePrompts
from bpt_dist.methods.base import AuxiliaryPhase, Tensors
from bpt_dist.tasks.spec import TaskSpec


class Config(PromptOptions):
    """Options of soft prompt transfer."""

    HAS_SOURCE_STAGE: ClassVar[bool] = True

    name: Literal["spot"] = "spot"
    probe_steps: int = Field(1000, ge=1, description="Steps of a task embedding; on source tasks they come before source.steps.")
    similarity: Literal["average_tokens", "per_token"] = Field(
        "average_tokens", description="Cosine of the prompts averaged over positions, or mean cosine over pairs of positions."
    )
    retrieval: Literal["best", "mixture"] = Field("best", description="The most similar prompt, or a weighted mean.")
    top_k: int = Field(3, ge=1, description="Prompts in a `mixture`, each weighted by its similarity.")

    @model_validator(mode="after")
    def _retrieval(self) -> "Config":
        refuse(without_effect(self, "with retrieval best", "top_k") if self.retrieval == "best" else [])
        return self


class SoftPromptTransfer(SourcePrompts):
    """Train one prompt a source task and continue on the target from the most similar. 76,800 numbers for P = 100 on T5-base."""

    paper = "Vu et al. 2022 (SPoT)"
    summary = "K source prompts, the most similar continued on the target"
    reference_tensors = frozenset({"library", "keys"})
    source_tensors: ClassVar[dict[str, str]] = {"prompts": "K P D", "keys": "K P D", "start": "P D", "key_steps": ""}
    config: Config

    def task_start(self, task: str) -> Float[Tensor, "P D"]:
        """Return the one start of all task embeddings: from different ones, cosines would compare the starts."""
        return self.start("source")

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Start the keys of the library."""
        super().begin_source(tasks, mesh)
        self.stage = "keys"

    def auxiliary_phases(self) -> Sequence[AuxiliaryPhase]:
        """Return the short stage that makes a task embedding of each source task, or of the target."""
        return (AuxiliaryPhase(self.stage, self.config.probe_steps),)

    def end_auxiliary_phase(self, mesh: Mesh) -> None:
        """Keep the keys and train them on to the values; or compare the target's embedding and start from what it retrieves."""
        if self.stage == "keys":
            self.keys = self.task_prompts.detach().clone()
            self.stage = "source"
            return
        embedding = self.particles[0].detach()
        self.similarity = similarities(embedding, self.keys, self.config.similarity)
        self.weights = mixture_weights(self.similarity, self.config.top_k if self.config.retrieval == "mixture" else 1)
        self.own(torch.einsum("k,kpd->pd", self.weights, self.library)[None])
        self.stage = "target"

    def end_source(self, mesh: Mesh) -> dict[str, Tensor]:
        """Hand over the library, and the start and the number of steps that a target's embedding shares with the keys."""
        start, key_steps = self.start("source").to(self.keys), torch.tensor(self.config.probe_steps)
        return {"prompts": self.task_prompts.detach(), "keys": self.keys, "start": start, "key_steps": key_steps}

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start the target's task embedding where those of the source tasks started."""
        assert source is not None
        if (key_steps := int(source["key_steps"])) != self.config.probe_steps:
            raise ConfigError(
                f"method.probe_steps: is {self.config.probe_steps}, the keys of the source posterior had {key_steps} steps and "
                f"compare with embeddings of as many; set it to {key_steps}"
            )
        self.forget()
        self.library, self.keys, start = (source[name].to(self.backbone.device) for name in ("prompts", "keys", "start"))
        self.target_tasks = [task.name for task in tasks]
        self.own(start[None])
        self.stage = "probe"

    def diagnostics(self) -> dict[str, Any]:
        """Return how similar the target is to each source task, what was retrieved, and the matrix the picture is drawn from."""
        if self.stage != "target":
            return {}
        names = self.source_tasks or tuple(str(k) for k in range(len(self.keys)))
        to_target, weights = self.similarity.tolist(), self.weights.tolist()
        between = [similarities(key, self.keys, self.config.similarity).tolist() for key in self.keys]
        metrics = {f"spot/similarity/{name}": value for name, value in zip(names, to_target, strict=True)}
        metrics |= {f"spot/weight/{name}": value for name, value in zip(names, weights, strict=True)}
        # In every record, as the particles' picture is: a resumed run cannot know which records came before.
        similarity = {"tasks": list(names), "between": between, "target": to_target, "weights": weights}
        return {"metrics": metrics, "similarity": similarity}


def similarities(
    prompt: Float[Tensor, "P D"], others: Float[Tensor, "K Q D"], kind: Literal["average_tokens", "per_token"]
) -> Float[Tensor, " K"]:
    """Return the cosine similarity, -1 to 1, of a prompt to each of the others (Vu et al. 2022, section 4.1).

    `average_tokens`: cosine of the two prompts averaged over positions. `per_token`: mean cosine over all pairs of positions.
    """
    if kind == "average_tokens":
        return functional.cosine_similarity(prompt.mean(dim=0)[None], others.mean(dim=1), dim=-1)
    # The mean over pairs of directions is the product of the mean directions.
    return functional.normalize(others, dim=-1).mean(dim=1) @ functional.normalize(prompt, dim=-1).mean(dim=0)


def mixture_weights(similarity: Float[Tensor, " K"], top_k: int) -> Float[Tensor, " K"]:
    """Return weights that sum to 1: similarity over its sum among the `top_k` most similar, 0 for the others (Vu et al. 2022).

    A prompt that points away is no help, so negative similarities weigh nothing beside the best, which always counts.
    """
    best = similarity.topk(min(top_k, len(similarity)))
    share = best.values.clamp_min(0)
    # The first of the best counts alone where nothing is similar: 0 / 0 otherwise.
    alone = torch.zeros_like(share)
    alone[0] = 1
    share = torch.where(share.sum() > 0, share / share.sum().clamp_min(torch.finfo(share.dtype).tiny), alone)
    return torch.zeros_like(similarity).scatter(0, best.indices, share)
