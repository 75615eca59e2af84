"""HyperDecoder: Ivison & Peters, "Hyperdecoders: Instance-specific decoders for multi-task NLP", Findings of EMNLP 2022.

The encoder has ordinary adapters parallel to its feed-forward sub-layers: h + FF(norm(h)) + up(relu(down(norm(h)))). Those of the
decoder are written for each text: a hyper-network maps the mean of the encoder's last states over the text, joined with an
embedding of the block, to all weights and biases. Everything is shared by all tasks. Differences from the authors' code: it trains
with label smoothing 0.1 (`label_smoothing`), draws texts of one task a step, and works in one process only.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.base import Forward
from bpt_dist.backbones.insertion import Change, Site, each_token
from bpt_dist.config import MethodConfig
from bpt_dist.data.batches import Batch
from bpt_dist.methods._inserted import InsertedMethod, as_bottleneck, bottleneck, linear, uniform

BLOCK_EMBEDDING = 10
LEARNED_GAIN = 1e-4  # of Xavier's uniform start of the encoder's adapters
WRITTEN_GAIN = 1e-3  # of the "hyperfan-in" start (Chang et al. 2020) of what writes the decoder's


class Config(MethodConfig):
    """Options of HyperDecoder; learning rate and steps are the target stage's (published: 3e-4, batches by temperature 10)."""

    name: Literal["hyperdecoder"] = "hyperdecoder"
    bottleneck: int = Field(64, ge=1, description="Width of the adapters of encoder and decoder.")
    hidden: int = Field(128, ge=1, description="Hidden width of the hyper-network.")
    adapter_input: Literal["normed", "raw"] = Field(
        "normed", description="What adapters read: the normed state, or the hidden state itself (the authors' ablation)."
    )
    pooled_mlp: bool = Field(False, description="Put a network of two layers behind the mean of the encoder's states.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the loss spread over all pieces; authors' code: 0.1.")


class Generator(nn.Module):
    """Writes the adapters of all blocks of the decoder for each text, from what the encoder made of it."""

    def __init__(self, config: Config, width: int, num_blocks: int, source: torch.Generator, device: torch.device) -> None:
        super().__init__()
        inner, hidden = config.bottleneck, config.hidden
        self.blocks = nn.Parameter(torch.randn(num_blocks, BLOCK_EMBEDDING, generator=source).to(device))
        self.mlp = nn.Sequential()
        if config.pooled_mlp:
            first, second = (self._plain(width, width, source, device) for _ in range(2))
            self.mlp = nn.Sequential(first, nn.ReLU(), second)
        self.hidden = self._plain(width + BLOCK_EMBEDDING, hidden, source, device)
        fan_ins = {"down": width, "down_bias": 1, "up": inner, "up_bias": 1}
        sizes = {"down": width * inner, "down_bias": inner, "up": inner * width, "up_bias": width}
        self.writers = nn.ModuleDict({
            name: linear(hidden, size, uniform(WRITTEN_GAIN * (3 / (hidden * fan_ins[name])) ** 0.5, source), device)
            for name, size in sizes.items()
        })  # fmt: skip
        self.width = width

    @staticmethod
    def _plain(num_inputs: int, num_outputs: int, source: torch.Generator, device: torch.device) -> nn.Linear:
        """Return a linear layer as torch starts one, bias included."""
        fill = uniform(num_inputs**-0.5, source)
        layer = linear(num_inputs, num_outputs, fill, torch.device("cpu"))
        fill(layer.bias.data)
        return layer.to(device)

    def forward(self, pooled: Float[Tensor, "rows D"]) -> dict[str, Tensor]:
        """Return the weights [rows, blocks, ...] by name."""
        num_rows, num_blocks = len(pooled), len(self.blocks)
        texts = self.mlp(pooled)[:, None].expand(-1, num_blocks, -1)
        hidden = functional.relu(self.hidden(torch.cat([texts, self.blocks.expand(num_rows, -1, -1)], dim=-1)))
        return as_bottleneck({name: layer(hidden) for name, layer in self.writers.items()}, self.width)


class HyperDecoder(InsertedMethod):
    """Train adapters of the encoder and a network that writes the decoder's for each text. 14,078,008 numbers on T5-base."""

    paper = "Ivison & Peters 2022"
    summary = "encoder adapters, and a hyper-network that writes the decoder's adapters for each text"
    needs_encoder = "writes the adapters of a decoder from what an encoder has read"
    config: Config

    def insert(self) -> None:
        """Insert learned adapters in the encoder and written ones in the decoder."""
        backbone, raw = self.backbone, self.config.adapter_input == "raw"
        self.adapters = nn.ParameterDict()
        self.generator = Generator(
            self.config, backbone.width, backbone.num_blocks["decoder"], self.draw("generator"), backbone.device
        )
        backbone.wrap_sublayer(self._learned, ("feed_forward",), stack="encoder", residual=raw)
        backbone.after_encoder(self._write)
        backbone.wrap_sublayer(self._written, ("feed_forward",), stack="decoder", residual=raw)

    def _learned(self, place: Site) -> Change:
        width, inner, source = self.backbone.width, self.config.bottleneck, self.draw("adapter", place.block)
        starts = {
            "down": nn.init.xavier_uniform_(torch.empty(width, inner), gain=LEARNED_GAIN, generator=source),
            "down_bias": torch.zeros(inner),
            "up": nn.init.xavier_uniform_(torch.empty(inner, width), gain=LEARNED_GAIN, generator=source),
            "up_bias": torch.zeros(width),
        }
        weights = {name: self.placed(start) for name, start in starts.items()}
        self.adapters.update({f"{place.block}/{name}": weight for name, weight in weights.items()})
        return each_token(lambda x, y: y + bottleneck(x, **weights, activation=functional.relu).to(y.dtype))

    def _write(self, states: Float[Tensor, "rows L D"], mask: Int[Tensor, "rows L"]) -> None:
        """Write the decoder's adapters of this pass; they stay for all tokens it generates."""
        kept = mask.to(torch.float32).unsqueeze(-1)
        self.weights = self.generator((states.to(torch.float32) * kept).sum(1) / kept.sum(1))

    def _written(self, place: Site) -> Change:
        def change(x: Tensor, y: Tensor) -> Tensor:
            own = {name: weight[:, place.block] for name, weight in self.weights.items()}
            return y + bottleneck(x, **own, activation=functional.relu).to(y.dtype)

        return change

    def loss(self, forward: Forward, batch: Batch) -> Float[Tensor, ""]:
        """Return minus the weighted log-likelihood, with smoothed labels where asked for."""
        smoothing = self.config.label_smoothing
        return self.smoothed_loss(forward.logits, batch, smoothing) if smoothing else super().loss(forward, batch)
