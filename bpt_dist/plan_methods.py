"""What a method trains on a T5 of a given shape: counted from its real tensors, made without the T5's weights."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from bpt_dist.backbone_shapes import ShapeBackbone, T5Shape
from bpt_dist.config import MethodConfig, method_names
from bpt_dist.data.tasks import GLUE_8, SOURCE_6, TASKS
from bpt_dist.mesh import Mesh
from bpt_dist.methods.base import Method, method_class

ROWS = 10_000  # of a task; scales the prior only, no size depends on it


class Count(NamedTuple):
    """Numbers that training may change on one target task, and for each of eight that are trained together."""

    name: str
    trainable_parameters: int
    trainable_parameters_per_task_of_8: int


def counts(shape: T5Shape, names: Sequence[str] = ()) -> list[Count]:
    """Return the counts of the named methods, or all, with their default options; a share that is not whole is rounded."""
    found = []
    for name in names or method_names():
        of_one, of_eight = (num_trainable(name, shape, num_tasks) for num_tasks in (1, len(GLUE_8)))
        found.append(Count(name, of_one, round(of_eight / len(GLUE_8))))
    return found


def num_trainable(name: str, shape: T5Shape, num_tasks: int) -> int:
    """Return how many numbers a target stage with the first `num_tasks` of the eight GLUE targets trains."""
    method = _method(name, shape)
    sources, targets = ([TASKS[task] for task in tasks] for tasks in (SOURCE_6, GLUE_8[:num_tasks]))
    handed_over = None
    if method.config.HAS_SOURCE_STAGE:
        method.begin_source(sources, Mesh())
        skip_preludes(method)
        handed_over = method.end_source(Mesh())
    method.begin_target(handed_over, targets, [ROWS] * num_tasks, Mesh())
    skip_preludes(method)
    found = method.num_trainable()
    method.end()
    return found


def skip_preludes(method: Method) -> None:
    """Take an untrained method to the main stage of the stage just begun."""
    for _ in method.preludes():
        method.end_prelude(Mesh())


def _method(name: str, shape: T5Shape) -> Method:
    chosen = method_class(name)
    options: type[MethodConfig] = importlib.import_module(chosen.__module__).Config
    # A prior has no default width, and no size depends on it.
    given: dict[str, Any] = {"sigma": 1.0} if "sigma" in options.model_fields else {}
    return chosen(options.model_validate(given), ShapeBackbone(shape), seed=0, reduction="token_mean")
