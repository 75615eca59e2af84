"""HyperFormer++ and HyperFormer: Karimi Mahabadi et al., "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
Hypernetworks", ACL 2021.

One hyper-network a stack writes the weights of every adapter from an embedding of task, block and position (after self-attention
or after the feed-forward sub-layer): I = LN(MLP([task; block; position])), weights linear in I. The adapter is followed by a layer
norm whose gain and bias are written too, y + gain o LN(up(act(down(y)))) + bias, before T5 adds the residual. Task embeddings are
trained, the layer norms of the backbone as well. `++` is the row of published tables; the `plain` variant has its own
hyper-networks for each position and no embedding of the position. Differences from the authors' code: it draws the texts of a step
from one task, trains with label smoothing 0.1, which the paper does not mention (`label_smoothing`), and leaves the task's name out
of the text.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.base import Forward
from bpt_dist.backbones.insertion import Change, Site, of_rows
from bpt_dist.backbones.transfer import send
from bpt_dist.config import MethodConfig
from bpt_dist.data.batches import Batch
from bpt_dist.methods._inserted import ACTIVATIONS, InsertedMethod, as_bottleneck, bottleneck, linear, normal

POSITIONS = {"DenseReluDense": 0, "SelfAttention": 1}
EPSILON = 1e-6  # of the layer norm of I
INIT_STD = 0.01
Weights = dict[str, Tensor]  # of one position: name -> [tasks, blocks, ...]


class Config(MethodConfig):
    """Options of HyperFormer; learning rate and steps are the target stage's (published: 3e-4, batches by temperature 10)."""

    name: Literal["hyperformer"] = "hyperformer"
    variant: Literal["++", "plain"] = Field("++", description="One hyper-network for both positions, or one for each.")
    reduction: int = Field(32, ge=1, description="Width of the backbone divided by the width of the bottleneck.")
    activation: Literal["gelu_new", "relu", "swish"] = Field("gelu_new", description="Non-linearity of the bottleneck.")
    embedding: int = Field(64, ge=1, description="Width of the embeddings of task, block and position.")
    hidden: int = Field(128, ge=1, description="Hidden width of the network that joins the embeddings.")
    projected: int = Field(64, ge=1, description="Width of the joint embedding I that weights are written from.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the loss spread over all pieces; authors' code: 0.1.")


class HyperNetwork(nn.Module):
    """Writes the adapters of one stack from embeddings of tasks."""

    def __init__(self, config: Config, width: int, num_blocks: int, source: torch.Generator, device: torch.device) -> None:
        super().__init__()
        fill, inner, joint = normal(INIT_STD, source), max(1, width // config.reduction), config.projected
        num_parts = 3 if config.variant == "++" else 2
        self.width = width
        self.blocks = nn.Parameter(torch.randn(num_blocks, config.embedding, generator=source).to(device))
        if config.variant == "++":
            self.positions = nn.Parameter(torch.randn(len(POSITIONS), config.embedding, generator=source).to(device))
        self.hidden = linear(num_parts * config.embedding, config.hidden, fill, device)
        self.project = linear(config.hidden, joint, fill, device)
        self.norm = nn.LayerNorm(joint, eps=EPSILON, device=device)
        sizes = {"down": width * inner, "down_bias": inner, "up": inner * width, "up_bias": width, "gain": width, "bias": width}
        self.writers = nn.ModuleList(
            nn.ModuleDict({name: linear(joint, size, fill, device) for name, size in sizes.items()})
            for _ in range(1 if config.variant == "++" else len(POSITIONS))
        )

    def forward(self, tasks: Float[Tensor, "K E"]) -> list[Weights]:
        """Return the weights of both positions, for each of the tasks and blocks."""
        parts = [tasks[:, None].expand(-1, len(self.blocks), -1), self.blocks.expand(len(tasks), -1, -1)]
        if len(self.writers) == len(POSITIONS):
            joint = self._joint(parts)
            return [self._write(writer, joint) for writer in self.writers]
        of_positions = [[*parts, position.expand_as(parts[0])] for position in self.positions]
        return [self._write(self.writers[0], self._joint(each)) for each in of_positions]

    def _joint(self, parts: list[Tensor]) -> Float[Tensor, "K L I"]:
        joint: Tensor = self.norm(self.project(functional.relu(self.hidden(torch.cat(parts, dim=-1)))))
        return joint

    def _write(self, writer: nn.Module, joint: Float[Tensor, "K L I"]) -> Weights:
        return as_bottleneck({name: layer(joint) for name, layer in writer.named_children()}, self.width)


class HyperFormer(InsertedMethod):
    """Train hyper-networks that write adapters for tasks and places, and the layer norms. 5,210,608 numbers on T5-base."""

    paper = "Karimi Mahabadi et al. 2021"
    summary = "shared hyper-networks that write adapters and their norms, task embeddings, and all layer norms"
    needs_encoder = "writes adapters for the blocks of an encoder and of a decoder by a network each"
    config: Config

    def insert(self) -> None:
        """Insert adapters whose weights are written at the start of each pass."""
        config, backbone = self.config, self.backbone
        embeddings = [torch.randn(config.embedding, generator=self.draw("task", name)) for name in self.target_tasks]
        self.tasks = self.placed(torch.stack(embeddings))
        self.networks = nn.ModuleDict({
            stack: HyperNetwork(config, backbone.width, num_blocks, self.draw(stack), backbone.device)
            for stack, num_blocks in backbone.num_blocks.items()
        })  # fmt: skip
        backbone.wrap_sublayer(self._adapter, ("self_attention", "feed_forward"))
        self.train_norms()

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Write the adapters of the tasks in the batch: every pass comes here first."""
        present, self.task_of_text = (send(index, embeds.device) for index in batch.task_index.unique(return_inverse=True))
        self.weights = {stack: network(self.tasks[present]) for stack, network in self.networks.items()}
        return super().input_embeds(embeds, batch, particles)

    def _adapter(self, place: Site) -> Change:
        position, activation = POSITIONS[place.name.rsplit(".", 1)[-1]], ACTIVATIONS[self.config.activation]

        def change(_x: Tensor, y: Tensor) -> Tensor:
            of_tasks = {name: weight[:, place.block] for name, weight in self.weights[place.stack][position].items()}
            if len(of_tasks["bias"]) > 1:
                index = of_rows(self.task_of_text, len(y))
                of_tasks = {name: weight[index] for name, weight in of_tasks.items()}
            gain, bias = of_tasks.pop("gain")[:, None], of_tasks.pop("bias")[:, None]
            states = bottleneck(y, **of_tasks, activation=activation)
            return y + (functional.layer_norm(states, states.shape[-1:]) * gain + bias).to(y.dtype)

        return change

    def loss(self, forward: Forward, batch: Batch) -> Float[Tensor, ""]:
        """Return minus the weighted log-likelihood, with smoothed labels where asked for."""
        smoothing = self.config.label_smoothing
        return self.smoothed_loss(forward.logits, batch, smoothing) if smoothing else super().loss(forward, batch)
