"""Find a task by name: the published ones of the catalogue, and the user's own from YAML. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from bpt_dist.data.catalogue import GLUE_8, SOURCE_6, SOURCE_12, SUPER_GLUE_5, TASKS
from bpt_dist.data.spec import METRICS_OF_KIND, SplitRule, TaskSpec, TextField
from bpt_dist.data.task_files import load_user_tasks
from bpt_dist.errors import ConfigError

__all__ = [
    "GLUE_8", "METRICS_OF_KIND", "SOURCE_6", "SOURCE_12", "SUPER_GLUE_5", "TASKS",
    "SplitRule", "TaskSpec", "TextField", "get", "load_user_tasks",
]  # fmt: skip


def get(name: str, user_tasks: Mapping[str, TaskSpec] | None = None) -> TaskSpec:
    """Return the task of that name; the user's tasks come first, so a file can replace a published task."""
    known = {**TASKS, **(user_tasks or {})}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`bpt-dist tasks` lists them"
    raise ConfigError(f"unknown task {name!r}; {hint} (your own tasks come from data.task_files)")
