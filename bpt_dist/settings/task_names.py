"""Which task names a configuration may use: the published tasks, the miniature world's, and those of `data.task_files`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from bpt_dist.errors import ConfigError
from bpt_dist.settings.base import did_you_mean
from bpt_dist.settings.strict_yaml import Problem


def task_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """Yield a problem for every task that plain `data` names and nobody defines, and for every broken task file."""
    section = data.get("data")
    if not isinstance(section, dict):
        return
    files = section.get("task_files") or []
    # By name and late: the catalogue lies above the configuration, which only asks it for names.
    catalogue = importlib.import_module("bpt_dist.data.tasks")
    miniature = importlib.import_module("bpt_dist.mini.world")
    known = {*catalogue.TASKS, *miniature.ALL_TASKS}
    try:
        known |= set(catalogue.load_user_tasks(files)) if _are_texts(files) else set()
    except ConfigError as error:
        yield from (Problem(("data", "task_files"), line) for line in str(error).splitlines())
        return
    for key in ("source_tasks", "target_tasks"):
        names = section.get(key)
        for position, name in enumerate(names if isinstance(names, list | tuple) else ()):
            if isinstance(name, str) and name not in known:
                near = did_you_mean(name, known) or "; `bpt-dist tasks` lists them, data.task_files adds your own"
                yield Problem(("data", key, position), f"no such task (got {name!r}){near}")


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)
