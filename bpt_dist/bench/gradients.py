"""The gradient of one step's log-likelihoods to its prompts, by every way that is compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bpt_dist.backbone import Backbone
from bpt_dist.bench.work import Work
from bpt_dist.mesh import Mesh
from bpt_dist.packed import PackedT5
from bpt_dist.passes import Passes
from bpt_dist.prompts import prepend
from bpt_dist.work import Unit, shared_units

Gradients = tuple[Tensor, Tensor]  # log-likelihoods [M, N] (mean over target tokens), gradient [M, P, D] of their sum


def padded(backbone: Backbone, work: Work) -> Gradients:
    """One batch of all M·N rows, padded to the longest, through the stock T5."""
    return of_units(backbone, None, work, [Unit(slice(0, len(work.prompts)), work.texts)])


def padded_by_particle(backbone: Backbone, work: Work) -> Gradients:
    """The padded rows of one particle after the other through the stock T5: PEFT's loop without PEFT."""
    return of_units(backbone, None, work, [Unit(slice(m, m + 1), work.texts) for m in range(len(work.prompts))])


def grouped(backbone: Backbone, work: Work) -> Gradients:
    """One text after the other through the stock T5, each under all particles: rows of one length, nothing is padded."""
    everybody = slice(0, len(work.prompts))
    return of_units(backbone, None, work, [Unit(everybody, work.texts.select([n])) for n in range(len(work.texts))])


def packed(backbone: Backbone, ours: PackedT5, work: Work, pass_size: int | None = None) -> Gradients:
    """Our own pass, in the passes that training would make of the step on one rank."""
    return of_units(backbone, ours, work, our_units(work, Mesh(), pass_size))


def our_units(work: Work, mesh: Mesh, pass_size: int | None = None) -> list[Unit]:
    """Return the passes of this rank; `pass_size` is the setting of that name."""
    return list(shared_units(work.texts, slice(0, len(work.prompts)), mesh, Passes(pass_size, work.prompts.shape[1])))


def of_units(backbone: Backbone, ours: PackedT5 | None, work: Work, units: Iterable[Unit]) -> Gradients:
    """Return the sums over some passes, through our own pass or (None) the stock T5; 0 where a row is in none of them."""
    prompts = work.prompts.detach().clone().requires_grad_()
    found = prompts.new_zeros(len(prompts), len(work.texts))
    places = {row: place for place, row in enumerate(work.texts.row_ids)}
    backbone.packed = ours
    try:
        for unit in units:
            part = prompts[unit.particles]
            forward = backbone.log_likelihood(unit.batch, lambda embeds, part=part: prepend(part, embeds), "token_mean")  # type: ignore[misc]
            forward.log_likelihood.sum().backward()
            found[unit.particles, [places[row] for row in unit.batch.row_ids]] = forward.log_likelihood.detach().to(found)
    finally:
        backbone.packed = None
    return found, torch.zeros_like(prompts) if prompts.grad is None else prompts.grad
