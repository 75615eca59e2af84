"""Which variants compute the same: against float64, allowing each what the stock T5 needs in its precision, times a factor.

A unit of a ReLU that rounds to the other side of its kink moves a float32 gradient by some 1e-4, in one variant and not in another,
whatever is right: hence the floor of gradients. A wrong mask, bias or text moves them by 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bpt_dist.bench.gradients import Gradients

ALLOWED_FACTOR = 3.0
LOSS_FLOOR, GRADIENT_FLOOR = 1e-5, 1e-3
CEILING = 0.2  # a stock variant further off than this proves nothing about the others


@dataclass(frozen=True)
class Difference:
    """Relative differences of one variant: the greatest of any loss, and that of the gradient as a vector, worst particle."""

    loss: float
    gradient: float
    allowed_loss: float
    allowed_gradient: float

    @property
    def right(self) -> bool:
        """Return whether both are allowed (a NaN is not)."""
        return self.loss <= self.allowed_loss and self.gradient <= self.allowed_gradient


def relative(found: Gradients, reference: Gradients) -> tuple[float, float]:
    """Return the greatest relative difference of a loss, and of a particle's gradient in the Euclidean norm."""
    (losses, gradients), (true_losses, true_gradients) = ([part.double().cpu() for part in pair] for pair in (found, reference))
    loss = ((losses - true_losses) / true_losses).abs().max()
    return float(loss), float((_norms(gradients - true_gradients) / _norms(true_gradients)).max())


def _norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).norm(dim=1)


def compare(found: Mapping[str, Gradients], exact: Gradients, stock: Mapping[str, str]) -> dict[str, Difference]:
    """Return how far each variant is from `exact` (float64), and how far it may be.

    `stock` names for each variant the stock one of its precision, whose own difference sets what is allowed. `exact` may hold the
    first few particles only: the others are compared with the float32 stock variant, which float64 has then confirmed.
    """
    count = len(exact[0])
    differences = {name: relative((losses[:count], gradients[:count]), exact) for name, (losses, gradients) in found.items()}
    best = found[min(set(stock.values()), key=lambda name: differences[name][1])]
    # The maximum of tensors keeps a NaN, that of Python's numbers may lose it.
    worst = {
        name: torch.tensor([differences[name], relative(own, best)], dtype=torch.float64).amax(dim=0).tolist()
        for name, own in found.items()
    }
    floors = (LOSS_FLOOR, GRADIENT_FLOOR)
    result = {}
    for name, own in worst.items():
        allowed = [min(ALLOWED_FACTOR * value + floor, CEILING) for value, floor in zip(worst[stock[name]], floors, strict=True)]
        result[name] = Difference(*own, *allowed)
    return result
