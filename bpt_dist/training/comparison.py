"""The loss of prompts that nobody trains here: the mean of the particles on a step's texts, and where a target could start."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.backbones.prompts import prepend
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Axis, Mesh, World
from bpt_dist.methods.base import Method
from bpt_dist.training.microbatches import MicroBatch, MicroBatchLimits, ordered_microbatches, shared_microbatches

Around = Callable[[MicroBatch], AbstractContextManager[None]]


@torch.no_grad()
def losses_of_prompts(
    method: Method,
    prompts: Float[Tensor, "m P D"],
    batches: Iterable[Batch],
    limits: Callable[[Batch], MicroBatchLimits],
    world: World,
    around: Around,
    *,
    exact: bool = False,
) -> list[list[float]]:
    """Return the loss of each prompt on each task: minus log-likelihood of a text as the method reduces it, mean over its texts.

    A task without texts has the loss NaN. Collective: all ranks share the texts, whatever the mesh of the stage, make the same
    number of passes where the backbone is partitioned, and return the same numbers. Sums are rounded once, so that only the passes
    themselves depend on how texts are shared; with `exact` a pass is one prompt and one text.
    """
    mesh, rows = Mesh(world, data=Axis(world.rank, world.size)), slice(0, len(prompts))
    found: list[tuple[tuple[int, int], float]] = []  # (prompt, task), loss of a text
    for batch in batches:
        units = ordered_microbatches(batch, rows, mesh) if exact else shared_microbatches(batch, rows, mesh, limits(batch))
        for unit in units:
            with around(unit):
                inputs = functools.partial(prepend, prompts[unit.particles])
                forward = method.backbone.log_likelihood(unit.batch, inputs, method.reduction)
            if not unit.is_filler:
                found += _by_text(unit, -forward.log_likelihood)
    by_place: dict[tuple[int, int], list[float]] = {}
    for share in world.gather_objects(found):
        for place, loss in share:
            by_place.setdefault(place, []).append(loss)
    tasks = range(1 + max(task for _, task in by_place))
    return [[_mean(by_place.get((prompt, task), [])) for task in tasks] for prompt in range(len(prompts))]


def mean_of_tasks(losses: Sequence[float]) -> float:
    """Return the mean over the tasks that have texts, as the logged loss of a stage is."""
    there = [loss for loss in losses if not math.isnan(loss)]
    return sum(there) / len(there) if there else math.nan


def _by_text(unit: MicroBatch, losses: Float[Tensor, "m n"]) -> list[tuple[tuple[int, int], float]]:
    tasks = unit.batch.task_index.tolist()
    return [
        ((prompt, task), value)
        for prompt, of_prompt in enumerate(losses.double().tolist(), unit.particles.start)
        for task, value in zip(tasks, of_prompt, strict=True)
    ]


def _mean(losses: Sequence[float]) -> float:
    """Return the mean; NaN where there are none, or where one is not finite."""
    return math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan
