"""ATTEMPT, attentional mixtures of soft prompts: Asai et al., EMNLP 2022 (arXiv 2205.11961).

Every text gets its own prompt: a mixture of frozen source prompts and the trained target prompt, weighted by an attention network
that reads the text. Targets trained together have a prompt each and share the network. Differences from the authors' code:

- its optimizer compares parameter names without ".weight", so its learning rate of the attention never applies; here it does;
- it leaves the attention's layer norm out of training, though the paper's count has it: `train_layer_norm: false`;
- its query takes the maximum over pads as well. There is no option for that: what a text is answered would depend on the longest
  text beside it in the batch, and so on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.prompts import prepend_own
from bpt_dist.backbones.transfer import send
from bpt_dist.config import StageConfig
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods._inserted import normal
from bpt_dist.methods._source_prompts import SourcePrompts
from bpt_dist.methods.base import AuxiliaryPhase, Tensors, generator
from bpt_dist.tasks.spec import TaskSpec

ATTENTION = ("down", "up", "norm_scale", "norm_shift")
# Of both weights at the start, as in the authors' code: `_init_weights` of their T5 meets every `nn.Linear`.
ATTENTION_STD = 0.01


class Config(PromptOptions):
    """Options of ATTEMPT."""

    HAS_SOURCE_STAGE: ClassVar[bool] = True

    name: Literal["attempt"] = "attempt"
    attention_width: int = Field(100, ge=1, le=4096, description="Hidden width of the attention network.")
    lr_attention: float = Field(0.1, gt=0, description="Learning rate of the attention network; the stage's lr is the prompts'.")
    temperature: float | None = Field(None, gt=0, description="Divides the attention's scores; null is e times the model width.")
    train_layer_norm: bool = Field(
        True, description="Train the layer norm of the attention network, as the paper counts; the authors' code freezes it."
    )
    prompt_steps: int | None = Field(
        None,
        ge=1,
        description="Steps of the source prompts where source.steps pre-train the attention; null does not. A stored posterior "
        "brings its own attention or none.",
    )


class AttentionalMixture(SourcePrompts):
    """Train a target prompt and attention over frozen source prompts. 231,936 numbers for P = 100 on T5-base.

    They are 76,800 of the prompt, 153,600 of the network and 1,536 of its layer norm; without the last, 230,400.
    """

    paper = "Asai et al. 2022 (ATTEMPT)"
    summary = "K frozen source prompts and a target prompt, mixed for each text by attention"
    reference_tensors = frozenset({"sources"})
    prompt_of_each_text = True
    source_tensors: ClassVar[dict[str, str]] = {"prompts": "K P D"}
    config: Config
    down: nn.Parameter
    up: nn.Parameter
    norm_scale: nn.Parameter
    norm_shift: nn.Parameter

    # --- stages -----------------------------------------------------------------------------------------------------------------

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Start the source prompts."""
        super().begin_source(tasks, mesh)
        self.stage = "prompts"

    def auxiliary_phases(self) -> Sequence[AuxiliaryPhase]:
        """Return the stage of the source prompts where the attention is trained after them."""
        pretrains = self.stage == "prompts" and self.config.prompt_steps is not None
        return (AuxiliaryPhase("prompts", self.config.prompt_steps or 0),) if pretrains else ()

    def end_auxiliary_phase(self, mesh: Mesh) -> None:
        """Freeze the source prompts and pre-train the attention on the source tasks, as targets trained together would."""
        self._mix(self.task_prompts.detach().clone(), len(self.source_tasks), {})

    def end_source(self, mesh: Mesh) -> dict[str, Tensor]:
        """Hand over the source prompts, and the attention if it is pre-trained; the prompts it was trained with are dropped."""
        if self.stage == "prompts":
            return {"prompts": self.task_prompts.detach()}
        return {"prompts": self.sources, **{f"attention/{name}": getattr(self, name).detach() for name in ATTENTION}}

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start each target's prompt at the first source prompt, the attention from scratch or where pre-training left it."""
        assert source is not None
        self.target_tasks = [task.name for task in tasks]
        pretrained = {name: source[f"attention/{name}"] for name in ATTENTION if f"attention/{name}" in source}
        if self.config.prompt_steps is not None and not pretrained:
            raise ConfigError(
                f"method.prompt_steps: is {self.config.prompt_steps}, but the source posterior holds no pre-trained attention; set "
                "it to null, or train the source stage again"
            )
        self._mix(source["prompts"].to(self.backbone.device), len(tasks), pretrained)

    def _mix(self, sources: Float[Tensor, "J P D"], num_tasks: int, pretrained: Tensors) -> None:
        self.forget()
        self.stage, self.sources = "mixture", sources
        # In the published order of source tasks the first is MNLI.
        self.target_prompts = nn.Parameter(sources[0].expand(num_tasks, -1, -1).clone())
        width, hidden = self.backbone.width, self.config.attention_width
        start = pretrained or {
            "down": self._attention_weight("down", hidden, width),
            "up": self._attention_weight("up", width, hidden),
            "norm_scale": torch.ones(width),
            "norm_shift": torch.zeros(width),
        }
        if start["down"].shape != (hidden, width):
            raise ConfigError(
                f"method.attention_width: is {hidden}, the pre-trained attention of the posterior has {len(start['down'])}; "
                f"set it to {len(start['down'])}"
            )
        for name in ATTENTION:
            trained = self.config.train_layer_norm or not name.startswith("norm")
            setattr(self, name, nn.Parameter(start[name].to(self.backbone.device).clone(), requires_grad=trained))

    def _attention_weight(self, name: str, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        weight = torch.empty(rows, columns)
        normal(ATTENTION_STD, generator(self.seed, "attention", name))(weight)
        return weight

    # --- the mixture ------------------------------------------------------------------------------------------------------------

    def attention(
        self, embeds: Float[Tensor, "N T D"], mask: Int[Tensor, "N T"], own: Float[Tensor, "N P D"]
    ) -> Float[Tensor, "N J+1"]:
        """Return how much every text attends to each source prompt and, last, to its own target prompt; a row sums to 1.

        softmax_j(<max-pool(P_j), h> / T) with h = LN(W_up SiLU(W_down max-pool(embeds))), pads left out of the maximum.
        """
        query = embeds.float().masked_fill(mask[..., None] == 0, -math.inf).amax(dim=1)
        hidden = functional.silu(query @ self.down.T) @ self.up.T
        hidden = functional.layer_norm(hidden, hidden.shape[-1:], self.norm_scale, self.norm_shift)
        scores = torch.cat([hidden @ self.sources.amax(dim=1).T, (hidden * own.amax(dim=1)).sum(-1, keepdim=True)], dim=1)
        return (scores / (self.config.temperature or math.e * self.backbone.width)).softmax(dim=-1)

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Put before every text the prompt made for it: sum_j a_j P_j + P_target, the target prompt being one of the P_j too."""
        if self.stage == "prompts":
            return super().input_embeds(embeds, batch, particles)
        own = self.target_prompts[send(batch.task_index, embeds.device)]
        weights = self.attention(embeds, send(batch.source_mask, embeds.device), own)
        mixed = torch.einsum("nj,jpd->npd", weights[:, :-1], self.sources) + (weights[:, -1] + 1)[:, None, None] * own
        return prepend_own(mixed[None], embeds)

    def param_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        """Return two speeds: the prompts and the attention network."""
        if self.stage == "prompts":
            return super().param_groups(stage)
        attention = [getattr(self, name) for name in ATTENTION if getattr(self, name).requires_grad]
        return [
            {"params": [self.target_prompts], "lr": self.stage_rate(stage)},
            {"params": attention, "lr": self.config.lr_attention},
        ]

    def prompts(self) -> dict[str, Float[Tensor, "P D"]] | None:
        """Return None: every text has a prompt of its own, so there is no prompt to export."""
        return None
