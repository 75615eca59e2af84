"""`bpt-dist methods` and `bpt-dist tasks`: read from the sources, so that no method file and no torch is imported."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.cli_output import print_list
from bpt_dist.data import tasks
from bpt_dist.data.spec import TaskSpec
from bpt_dist.mini import TASKS as MINIATURE
from bpt_dist.settings.method_options import METHODS, method_names

SHOWN_ATTRIBUTES = {"summary": "what is trained", "paper": "paper"}


def print_methods() -> None:
    """Print name, summary and paper of every method."""
    rows = [(name, *(attributes.get(key, "") for key in SHOWN_ATTRIBUTES)) for name, attributes in described_methods().items()]
    print_list(("method", *SHOWN_ATTRIBUTES.values()), rows)


def described_methods(folder: Path = METHODS) -> dict[str, dict[str, str]]:
    """Return the texts `summary` and `paper` of the method class in each file."""
    return {name: _class_texts(folder / f"{name}.py") for name in method_names(folder)}


def _class_texts(file: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
                names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
                found |= {name: str(statement.value.value) for name in names & SHOWN_ATTRIBUTES.keys()}
    return found


def print_tasks(config: Path | None) -> None:
    """Print name, source of the rows, headline metric and a line about every task; `config` adds those of its task files."""
    known: dict[str, tuple[TaskSpec, str]] = {name: (spec, _hub(spec)) for name, spec in tasks.TASKS.items()}
    known |= {name: (spec, "miniature world") for name, spec in tasks.load_user_tasks([MINIATURE]).items()}
    if config is not None:
        own = tasks.load_user_tasks(configuration.load(config).data.task_files)
        known |= {name: (spec, str(spec.folder) if spec.folder else _hub(spec)) for name, spec in own.items()}
    rows: list[Any] = [(name, ", ".join(spec.metrics), where, spec.summary) for name, (spec, where) in known.items()]
    print_list(("task", "metrics", "rows from", "what it asks"), rows)


def _hub(spec: TaskSpec) -> str:
    configs = " + ".join(config for config in spec.hub_configs if config)
    return f"{spec.hub_name} {configs}".strip()
