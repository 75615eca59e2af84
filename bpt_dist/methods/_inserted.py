"""What the methods share that change the backbone from outside: their tensors enter through insertion points, without a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bpt_dist.backbones.insertion import Change, Site, each_token, rms_normalised
from bpt_dist.backbones.transfer import send
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method, Tensors, generator
from bpt_dist.objective import sequence_log_likelihood
from bpt_dist.tasks.spec import TaskSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda states: functional.gelu(states, approximate="tanh"),
    "relu": functional.relu,
    "swish": functional.silu,
}


class InsertedMethod(Method):
    """A method of the target stage whose tensors change the backbone where they are inserted."""

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Take out what an earlier target inserted and insert the tensors of this one at their start."""
        self.backbone.detach()
        self.target_tasks = [task.name for task in tasks]
        self.insert()

    def insert(self) -> None:
        """Create the trainable tensors and insert them."""
        raise NotImplementedError

    def draw(self, *keys: object) -> torch.Generator:
        """Return the generator of one start; it depends on seed, targets and `keys`, not on what was drawn before."""
        return generator(self.seed, *self.target_tasks, *keys)

    def placed(self, tensor: Tensor) -> nn.Parameter:
        """Return `tensor` as a trainable one on the backbone's device, in float32 whatever the backbone is."""
        return nn.Parameter(tensor.to(self.backbone.device, torch.float32))

    def train_norms(self) -> None:
        """Train the gain w of every layer norm of the backbone, which keeps w: ours is what is added to it, starting at 0.

        Adding 0 changes no bit, and w need not be read where it is partitioned. Weight decay, if any, pulls to w and not to 0.
        """
        self.norms = nn.ParameterDict()

        def around(place: Site) -> Change:
            norm: Any = place.module
            epsilon = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
            gain = self.norms[place.key] = self.placed(torch.zeros(self.backbone.width))
            return each_token(lambda x, y: y + (gain * rms_normalised(x, epsilon)).to(y.dtype))

        self.backbone.wrap_norm(around)

    def smoothed_loss(self, logits: Float[Tensor, "m N U V"], batch: Batch, label_smoothing: float) -> Float[Tensor, ""]:
        """Return minus the weighted log-likelihood with smoothed labels, summed over this rank's texts."""
        targets = send(batch.target_ids, logits.device)
        smoothed = sequence_log_likelihood(
            logits.flatten(0, 1), targets.repeat(len(logits), 1), self.reduction, label_smoothing
        ).view(len(logits), len(batch))
        return -(smoothed * send(batch.weight, smoothed.device).to(smoothed.dtype)).sum()


def bottleneck(
    states: Float[Tensor, "*rows T D"],
    down: Float[Tensor, "*#rows D d"],
    down_bias: Float[Tensor, "*#rows d"],
    up: Float[Tensor, "*#rows d D"],
    up_bias: Float[Tensor, "*#rows D"],
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*rows T D"]:
    """Return the output of an adapter without a residual, in the type of its weights: one set of weights, or one a row."""
    hidden = activation(states.to(down.dtype) @ down + down_bias.unsqueeze(-2))
    return hidden @ up + up_bias.unsqueeze(-2)


def as_bottleneck(written: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return what a network has written for `bottleneck`, its flat `down` [..., D d] and `up` [..., d D] as matrices."""
    return written | {
        "down": written["down"].unflatten(-1, (width, -1)),
        "up": written["up"].unflatten(-1, (-1, width)),
    }


def linear(num_inputs: int, num_outputs: int, fill: Callable[[Tensor], object], device: torch.device) -> nn.Linear:
    """Return a linear layer with zero bias whose weight `fill` starts; nothing is drawn from the global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)
    fill(layer.weight.data)
    layer.bias.data.zero_()
    return layer.to(device)


def normal(std: float, source: torch.Generator) -> Callable[[Tensor], object]:
    """Return what fills a tensor with N(0, std^2)."""
    return lambda tensor: tensor.normal_(0.0, std, generator=source)


def uniform(bound: float, source: torch.Generator) -> Callable[[Tensor], object]:
    """Return what fills a tensor with U(-bound, bound)."""
    return lambda tensor: tensor.uniform_(-bound, bound, generator=source)
