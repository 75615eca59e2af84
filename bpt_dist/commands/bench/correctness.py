"""Losses and prompt gradients of one step, by the stock T5 and by our pass, and their comparison with float64.

A variant may be a few times as far from float64 as the stock T5 is in the same precision. Gradients have a floor: a ReLU unit that
rounds to the other side of its kink moves a float32 gradient by about 1e-4, in one variant and not in another. A wrong mask,
bias or text moves it by 1e-2 or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.commands.bench.workload import Work
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.training.microbatches import MicroBatch, MicroBatchLimits, shared_microbatches, tokens_a_pass

ALLOWED_FACTOR = 3.0
LOSS_FLOOR, GRADIENT_FLOOR = 1e-5, 1e-3
CEILING = 0.2  # no variant may be further off, however far the stock one is
Gradients = tuple[Tensor, Tensor]  # log-likelihoods [M, N] (mean over target tokens), gradient [M, P, D] of their sum


@dataclass(frozen=True)
class Difference:
    """Relative differences of one variant: the largest of any loss; for the gradient, the vector norm of the worst particle."""

    loss: float
    gradient: float
    allowed_loss: float
    allowed_gradient: float

    @property
    def right(self) -> bool:
        """Return whether both are within their limits (NaN is not)."""
        return self.loss <= self.allowed_loss and self.gradient <= self.allowed_gradient


def compare(results: Mapping[str, Gradients], exact: Gradients, stock: Mapping[str, str]) -> dict[str, Difference]:
    """Return how far each variant is from `exact` (float64), and how far it may be.

    `stock` names for each variant the stock one of its precision, whose own difference sets what is allowed. `exact` may hold the
    first few particles only: the others are compared with the stock variant that is closest to it.
    """
    count = len(exact[0])
    differences = {name: relative((losses[:count], gradients[:count]), exact) for name, (losses, gradients) in results.items()}
    best = results[min(set(stock.values()), key=lambda name: differences[name][1])]
    # The maximum of tensors keeps a NaN, that of Python's numbers may lose it.
    worst = {
        name: torch.tensor([differences[name], relative(result, best)], dtype=torch.float64).amax(dim=0).tolist()
        for name, result in results.items()
    }
    floors = (LOSS_FLOOR, GRADIENT_FLOOR)
    allowances = {}
    for name, difference in worst.items():
        allowed = [min(ALLOWED_FACTOR * value + floor, CEILING) for value, floor in zip(worst[stock[name]], floors, strict=True)]
        allowances[name] = Difference(*difference, *allowed)
    return allowances


def padded(backbone: T5Backbone, work: Work) -> Gradients:
    """Return the result of one batch of all M·N rows, padded to the longest, through the stock T5."""
    return sum_microbatches(backbone, None, work, [MicroBatch(slice(0, len(work.prompts)), work.texts)])


def padded_by_particle(backbone: T5Backbone, work: Work) -> Gradients:
    """Return the result of the padded rows, one particle after the other, through the stock T5: PEFT's loop without PEFT."""
    return sum_microbatches(backbone, None, work, [MicroBatch(slice(m, m + 1), work.texts) for m in range(len(work.prompts))])


def grouped(backbone: T5Backbone, work: Work) -> Gradients:
    """Return the result of one text after the other, each under all particles, through the stock T5: nothing is padded."""
    all_particles = slice(0, len(work.prompts))
    return sum_microbatches(
        backbone, None, work, [MicroBatch(all_particles, work.texts.select([n])) for n in range(len(work.texts))]
    )


def packed(backbone: T5Backbone, ours: PackedT5, work: Work, pass_size: int | None = None) -> Gradients:
    """Return the result of our pass, with the micro-batches that training would use on one rank."""
    return sum_microbatches(backbone, ours, work, our_microbatches(work, Mesh(), pass_size))


def our_microbatches(work: Work, mesh: Mesh, pass_size: int | None = None) -> list[MicroBatch]:
    """Return the micro-batches of this rank; `pass_size` is the setting of that name."""
    limits = MicroBatchLimits(pass_size, work.prompts.shape[1], tokens=tokens_a_pass(work.prompts.device.type))
    return list(shared_microbatches(work.texts, slice(0, len(work.prompts)), mesh, limits))


def sum_microbatches(backbone: T5Backbone, ours: PackedT5 | None, work: Work, microbatches: Iterable[MicroBatch]) -> Gradients:
    """Return the sums over some micro-batches, through our pass or (None) the stock T5; 0 for rows in none of them."""
    prompts = work.prompts.detach().clone().requires_grad_()
    log_likelihoods = prompts.new_zeros(len(prompts), len(work.texts))
    places = {row: place for place, row in enumerate(work.texts.row_ids)}
    backbone.packed = ours
    try:
        for microbatch in microbatches:
            part = prompts[microbatch.particles]
            forward = backbone.log_likelihood(microbatch.batch, lambda embeds, part=part: prepend(part, embeds), "token_mean")  # type: ignore[misc]
            forward.log_likelihood.sum().backward()
            log_likelihoods[microbatch.particles, [places[row] for row in microbatch.batch.row_ids]] = (
                forward.log_likelihood.detach().to(log_likelihoods)
            )
    finally:
        backbone.packed = None
    return log_likelihoods, torch.zeros_like(prompts) if prompts.grad is None else prompts.grad


def relative(result: Gradients, reference: Gradients) -> tuple[float, float]:
    """Return the greatest relative difference of a loss, and of a particle's gradient in the Euclidean norm."""
    (losses, gradients), (true_losses, true_gradients) = ([part.double().cpu() for part in pair] for pair in (result, reference))
    loss = ((losses - true_losses) / true_losses).abs().max()
    return float(loss), float((_norms(gradients - true_gradients) / _norms(true_gradients)).max())


def _norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).norm(dim=1)
