"""Sum one step's gradients over its texts: by one all-reduce, or in an order that no world size changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpt_dist.mesh import Mesh
from bpt_dist.work import Unit


@dataclass
class Losses:
    """Minus log-likelihoods of one step, summed by task over this rank's texts and particles.

    `bad_rows` are the ids of its texts whose loss or gradient was not finite; a sum over ranks would blame them all.
    """

    sums: list[float]
    counts: list[float]
    bad_rows: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, num_tasks: int) -> Losses:
        """Return zeros for `num_tasks` tasks."""
        return cls([0.0] * num_tasks, [0.0] * num_tasks)

    def add(self, task: int, value: float, count: float) -> None:
        """Count `count` sequences of a task whose minus log-likelihoods sum to `value`."""
        self.sums[task] += value
        self.counts[task] += count

    def by_task(self, num_tasks: int) -> Losses:
        """Add up what was kept for each particle apart, in the order of the particles."""
        folded = Losses.of(num_tasks)
        for index, (value, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            folded.add(index % num_tasks, value, count)
        return folded


class GradientSum(Protocol):
    """Takes the gradient each pass left in `.grad` and, at the end, leaves there the whole of it on every replica."""

    def add(self, unit: Unit, log_likelihood: Float[Tensor, "m N"]) -> None:
        """Take the gradient of one pass."""

    def close(self) -> Losses:
        """Leave the sum in `.grad` and return the losses (collective: every rank)."""


class ReducedSum:
    """Gradients add up in `.grad`; one all-reduce over `data` ends the step."""

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Mesh, num_tasks: int) -> None:
        self.parameters, self.mesh, self.losses = parameters, mesh, Losses.of(num_tasks)
        self.rows: list[str] = []

    def add(self, unit: Unit, log_likelihood: Float[Tensor, "m N"]) -> None:
        """Count the losses; autograd has already added the gradient."""
        of_text = -log_likelihood.detach().double().sum(dim=0).cpu()
        texts = zip(unit.batch.task_index.tolist(), of_text.tolist(), unit.batch.weight.tolist(), unit.batch.row_ids, strict=True)
        for task, value, weight, row in texts:
            if weight:  # a text without weight only fills a pass
                self.losses.add(task, value, len(log_likelihood))
                self.rows.append(row)
                if not math.isfinite(value):
                    self.losses.bad_rows.add(row)

    def close(self) -> Losses:
        """Sum over the replicas."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not self.losses.bad_rows and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.losses.bad_rows.update(self.rows)
        self.mesh.sum_over_data_(gradients)
        return self.losses


class OrderedSum:
    """Gradients of single passes are gathered over `data` and added in the order of the texts: the same bits on every world size.

    `sharded` are the parameters whose first axis counts this rank's particles. Losses are kept for each of all M particles apart.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], sharded: Sequence[nn.Parameter], mesh: Mesh, num_tasks: int, num_particles: int
    ) -> None:
        self.parameters, self.mesh, self.num_tasks = parameters, mesh, num_tasks
        self.sharded = {id(parameter) for parameter in sharded}
        self.sums = [torch.zeros_like(parameter) for parameter in parameters]
        self.losses = Losses.of(num_tasks * num_particles)
        self.first_particle = mesh.rows(num_particles).start

    def add(self, unit: Unit, log_likelihood: Float[Tensor, "1 1"]) -> None:
        """Gather this round's gradients and losses and add those of real texts (collective: every rank)."""
        rows = [self._row(tensor, parameter, unit) for tensor, parameter in zip(self._gradients(), self.parameters, strict=True)]
        own = torch.cat([-log_likelihood.detach().float().reshape(1), *[row.reshape(-1) for row in rows]])
        if unit.batch.weight.any() and not own.isfinite().all():
            self.losses.bad_rows.update(unit.batch.row_ids)
        targets = [self._row(total, parameter, unit) for total, parameter in zip(self.sums, self.parameters, strict=True)]
        for replica, task in zip(self.mesh.gather_over_data(own), unit.round_tasks, strict=False):
            if self.mesh.data.index == 0:  # the replicas know the same losses; one of them says so
                place = (self.first_particle + unit.particles.start) * self.num_tasks + task
                self.losses.add(place, float(replica[0]), 1)
            parts = replica[1:].split([target.numel() for target in targets])
            for target, part in zip(targets, parts, strict=True):
                target.add_(part.view_as(target))
        for parameter in self.parameters:
            parameter.grad = None

    def close(self) -> Losses:
        """Leave the sums in `.grad`."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            parameter.grad = total
        return self.losses

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters]

    def _row(self, tensor: Tensor, parameter: nn.Parameter, unit: Unit) -> Tensor:
        return tensor[unit.particles] if id(parameter) in self.sharded else tensor
