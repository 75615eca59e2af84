"""Sum one step's gradients over its texts: by one all-reduce, or in an order that does not depend on the world size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bpt_dist.distributed.mesh import Mesh
from bpt_dist.training.microbatches import MicroBatch


@dataclass
class Losses:
    """Minus log-likelihoods of one step, summed by task over this rank's texts and particles.

    `bad_rows` are the ids of its texts whose loss or gradient was not finite; a sum over ranks would blame them all. Until `read`
    the numbers are on the device (`pending`: some of them, and who counts them).
    """

    sums: list[float]
    counts: list[float]
    bad_rows: set[str] = field(default_factory=set)
    pending: list[tuple[Float[Tensor, " _n"], Callable[[list[float]], None]]] = field(default_factory=list)

    @classmethod
    def of(cls, num_tasks: int) -> Losses:
        """Return zeros for `num_tasks` tasks."""
        return cls([0.0] * num_tasks, [0.0] * num_tasks)

    def add(self, task: int, value: float, count: float) -> None:
        """Count `count` sequences of a task whose minus log-likelihoods sum to `value`."""
        self.sums[task] += value
        self.counts[task] += count

    def read(self, gradients: Sequence[Tensor] = ()) -> bool:
        """Count what is on the device, and return whether all numbers of `gradients` are finite: the step's one wait for it."""
        flags = [all_finite(gradients).double().reshape(1)] if any(gradient.numel() for gradient in gradients) else []
        parts = [values.double() for values, _ in self.pending]
        numbers = torch.cat([*flags, *parts]).tolist() if flags or parts else []
        place = len(flags)
        for values, count in self.pending:
            count(numbers[place : place + len(values)])
            place += len(values)
        self.pending.clear()
        return not flags or bool(numbers[0])

    def by_task(self, num_tasks: int) -> Losses:
        """Add up what was kept for each particle apart, in the order of the particles."""
        folded = Losses.of(num_tasks)
        for index, (value, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            folded.add(index % num_tasks, value, count)
        return folded


class GradientAccumulator(Protocol):
    """Collects the gradient that each pass leaves in `.grad`; `close` leaves the sum of all passes there, on every replica."""

    def add(self, unit: MicroBatch, log_likelihood: Float[Tensor, "m N"]) -> None:
        """Take the gradient of one pass."""

    def close(self) -> Losses:
        """Leave the sum in `.grad` and return the losses, which have yet to be read (collective: every rank)."""


class AllReduceAccumulator:
    """Gradients add up in `.grad`; one all-reduce over `data` ends the step."""

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Mesh, num_tasks: int) -> None:
        self.parameters, self.mesh, self.losses = parameters, mesh, Losses.of(num_tasks)
        # The passes with texts, and for each text minus its log-likelihood over the particles, left on the device until `close`.
        self.passes: list[tuple[MicroBatch, int, Float[Tensor, " n"]]] = []

    def add(self, unit: MicroBatch, log_likelihood: Float[Tensor, "m N"]) -> None:
        """Keep the losses; autograd has already added the gradient."""
        if not unit.is_filler:
            self.passes.append((unit, len(log_likelihood), -log_likelihood.detach().double().sum(dim=0)))

    def close(self) -> Losses:
        """Sum over the replicas.

        Where the sum over replicas would hide whose gradients are not finite, it is noted here; else `TrainingStage.agree` sees it.
        """
        is_finite = self._sum_over_replicas() if self.mesh.data.size > 1 and self.parameters else None
        self.losses.pending += [
            (of_text, partial(self._count, unit, num_particles)) for unit, num_particles, of_text in self.passes
        ]
        if is_finite is not None:
            self.losses.pending.append((is_finite.double().reshape(1), self._blame_all))
        return self.losses

    def _count(self, unit: MicroBatch, num_particles: int, of_texts: list[float]) -> None:
        for task, row, value in zip(unit.batch.task_index.tolist(), unit.batch.row_ids, of_texts, strict=True):
            self.losses.add(task, value, num_particles)
            if not math.isfinite(value):
                self.losses.bad_rows.add(row)

    def _blame_all(self, own_are_finite: list[float]) -> None:
        if not own_are_finite[0] and not self.losses.bad_rows:
            self.losses.bad_rows.update(row for unit, _, _ in self.passes for row in unit.batch.row_ids)

    def _sum_over_replicas(self) -> Bool[Tensor, ""]:
        """Sum the gradients and return whether this rank's own were finite; a replica without a task's texts brings zeros.

        A parameter that no replica has a gradient for keeps none, as in one process: the optimizer must not move it.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        is_finite = all_finite(gradients)
        present = gradients[0].new_tensor([float(parameter.grad is not None) for parameter in self.parameters])
        self.mesh.sum_over_data_([*gradients, present])
        # What this rank has a gradient for needs no answer of the others, for which it would wait.
        counts = present.tolist() if any(parameter.grad is None for parameter in self.parameters) else [1.0] * len(gradients)
        for parameter, gradient, count in zip(self.parameters, gradients, counts, strict=True):
            parameter.grad = gradient if count else None
        return is_finite


def all_finite(tensors: Sequence[Tensor]) -> Bool[Tensor, ""]:
    """Return, on the device of the tensors, whether all their numbers are finite: the largest magnitude is, and NaN stays NaN."""
    largest: Tensor = nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()], norm_type=math.inf)
    return largest.isfinite()


class OrderedAccumulator:
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
        # What the passes have left on the device until `close`: whether a pass was finite, and the losses of all replicas.
        self.flags: list[tuple[MicroBatch, Bool[Tensor, ""]]] = []
        self.gathered: list[tuple[int, Float[Tensor, ""]]] = []

    def add(self, unit: MicroBatch, log_likelihood: Float[Tensor, "1 1"]) -> None:
        """Gather this round's gradients and losses and add those of real texts (collective: every rank)."""
        rows = [self._row(tensor, parameter, unit) for tensor, parameter in zip(self._gradients(), self.parameters, strict=True)]
        own = torch.cat([-log_likelihood.detach().float().reshape(1), *[row.reshape(-1) for row in rows]])
        if not unit.is_filler:
            self.flags.append((unit, all_finite([own])))
        targets = [self._row(total, parameter, unit) for total, parameter in zip(self.sums, self.parameters, strict=True)]
        for replica, task in zip(self.mesh.gather_over_data(own), unit.round_tasks, strict=False):
            if self.mesh.data.index == 0:  # all replicas know the same losses; the first one counts them
                place = (self.first_particle + unit.particles.start) * self.num_tasks + task
                self.gathered.append((place, replica[0]))
            parts = replica[1:].split([target.numel() for target in targets])
            for target, part in zip(targets, parts, strict=True):
                target.add_(part.view_as(target))
        for parameter in self.parameters:
            parameter.grad = None

    def close(self) -> Losses:
        """Leave the sums in `.grad`."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            parameter.grad = total
        for kept, count in ((self.flags, self._blame), (self.gathered, self._count)):
            if kept:
                self.losses.pending.append((torch.stack([value.float() for _, value in kept]), count))
        return self.losses

    def _blame(self, are_finite: list[float]) -> None:
        for (unit, _), is_finite in zip(self.flags, are_finite, strict=True):
            if not is_finite:
                self.losses.bad_rows.update(unit.batch.row_ids)

    def _count(self, values: list[float]) -> None:
        for (place, _), value in zip(self.gathered, values, strict=True):
            self.losses.add(place, value, 1)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters]

    def _row(self, tensor: Tensor, parameter: nn.Parameter, unit: MicroBatch) -> Tensor:
        return tensor[unit.particles] if id(parameter) in self.sharded else tensor
