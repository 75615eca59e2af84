"""What a method trains on a backbone of a given shape: counted from its real tensors, made without the backbone's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.config import MethodConfig, method_names
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method, method_class, options_class
from bpt_dist.tasks.catalogue import GLUE_8, SOURCE_6, TASKS

ROWS = 10_000  # of a task; scales the prior only, no size depends on it


class Count(NamedTuple):
    """Numbers that training may change on one target task, and for each of eight that are trained together.

    None for a method that the backbone has no place for.
    """

    name: str
    trainable_parameters: int | None
    trainable_parameters_per_task_of_8: int | None


def counts(shape: ModelShape, names: Sequence[str] = ()) -> list[Count]:
    """Return the counts of the named methods, or all, with their default options; a share that is not whole is rounded."""
    rows = []
    backbone = shape.backbone()
    for name in names or method_names():
        if method_class(name).needs_encoder is not None and "encoder" not in backbone.num_blocks:
            rows.append(Count(name, None, None))
            continue
        of_one, of_eight = (num_trainable(name, shape, num_tasks) for num_tasks in (1, len(GLUE_8)))
        rows.append(Count(name, of_one, round(of_eight / len(GLUE_8))))
    return rows


def num_trainable(name: str, shape: ModelShape, num_tasks: int, options: MethodConfig | None = None) -> int:
    """Return how many numbers a target stage with the first `num_tasks` of the eight GLUE targets trains, by default options."""
    method = _method(name, shape, options)
    sources, targets = ([TASKS[task] for task in tasks] for tasks in (SOURCE_6, GLUE_8[:num_tasks]))
    handed_over = None
    if method.config.HAS_SOURCE_STAGE:
        method.begin_source(sources, Mesh())
        skip_preludes(method)
        handed_over = method.end_source(Mesh())
    method.begin_target(handed_over, targets, [ROWS] * num_tasks, Mesh())
    skip_preludes(method)
    number = method.num_trainable()
    method.end()
    return number


def skip_preludes(method: Method) -> None:
    """Take an untrained method to the main stage of the stage just begun."""
    for _ in method.auxiliary_phases():
        method.end_auxiliary_phase(Mesh())


def _method(name: str, shape: ModelShape, options: MethodConfig | None) -> Method:
    chosen = method_class(name)
    if options is None:
        defaults = options_class(chosen)
        # A prior has no default width, and no size depends on it.
        given: dict[str, Any] = {"sigma": 1.0} if "sigma" in defaults.model_fields else {}
        options = defaults.model_validate(given)
    return chosen(options, shape.backbone(), seed=0, reduction="token_mean")
