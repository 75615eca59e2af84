"""A method on a tiny backbone with its target stage begun, without a run around it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method, method_class


def begun(
    folder: Path, name: str, tasks: tuple[str, ...] = ("mood",), *, seed: int = 0, dtype: str = "fp32", **options: Any
) -> Any:
    """Return the method `name` with `options`, trained by nothing yet on the target `tasks` together."""
    return begun_on(loading.load(str(folder), dtype=dtype), name, tasks, seed=seed, **options)


def begun_on(backbone: Backbone, name: str, tasks: tuple[str, ...], *, seed: int = 0, **options: Any) -> Any:
    """Return the same on a backbone that is loaded."""
    chosen = method_class(name)
    config = importlib.import_module(chosen.__module__).Config.model_validate(options)
    method: Method = chosen(config, backbone, seed=seed, reduction="token_sum")
    specs: Any = [SimpleNamespace(name=task) for task in tasks]
    method.begin_target(None, specs, [32] * len(tasks), Mesh())
    return method
