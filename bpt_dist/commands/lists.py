"""`bpt-dist methods` and `bpt-dist tasks`: read from the sources, so that no torch is imported; only counts make real methods."""

from __future__ import annotations

import ast
import json
import platform
from pathlib import Path
from typing import Any

import typer

from bpt_dist import config as configuration
from bpt_dist.commands.output import print_list
from bpt_dist.config.method_source import METHODS, method_names
from bpt_dist.distributed.environment import cores, num_gpus
from bpt_dist.errors import ConfigError
from bpt_dist.storage.provenance import git_state, versions
from bpt_dist.tasks import catalogue
from bpt_dist.tasks.mini import TASKS as MINIATURE
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.user_tasks import load_user_tasks

SHOWN_ATTRIBUTES = {"summary": "what is trained", "paper": "paper"}


def print_version() -> None:
    """Print the versions, the commit, the interpreter and the machine that a bug report needs; nothing heavy is imported."""
    installed, git = versions(), git_state()
    commit = "" if git is None else f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}"
    lines = [
        f"bpt_dist {installed.pop('bpt_dist', '(not installed)')}{commit}",
        f"Python {platform.python_version()} on {platform.platform()}, {cores()} core(s), {num_gpus()} GPU(s)",
        ", ".join(f"{name} {version}" for name, version in installed.items()),
    ]
    typer.echo("\n".join(lines))


def print_methods(shape: str | None, *, as_json: bool) -> None:
    """Print name, summary and paper of every method, and with `shape` how many numbers it trains on that backbone.

    Raises ConfigError for a shape that is neither known by name nor a folder.
    """
    described = described_methods()
    if shape is None:
        entries = [{"name": name, **{key: texts.get(key, "") for key in SHOWN_ATTRIBUTES}} for name, texts in described.items()]
        rows = [tuple(entry.values()) for entry in entries]
        header: tuple[str, ...] = ("method", *SHOWN_ATTRIBUTES.values())
    else:
        entries = [count._asdict() for count in _counts(shape)]
        header = ("method", "trained for one target", "a target of 8 together", *SHOWN_ATTRIBUTES.values())
        rows = [_counted_row(entry, described[entry["name"]]) for entry in entries]
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
    else:
        print_list(header, rows, right=() if shape is None else (1, 2))


def _counts(shape: str) -> list[Any]:
    from bpt_dist.backbones.loading import shape_of
    from bpt_dist.methods._counts import counts

    try:
        return list(counts(shape_of(shape, ask_hub=False)))  # known or not: counting must not wait for a network
    except ConfigError as error:
        raise ConfigError(str(error).replace("backbone.path:", "--shape:")) from error


def _counted_row(count: dict[str, Any], texts: dict[str, str]) -> tuple[str, ...]:
    name, *numbers = count.values()
    written = ["-" if number is None else f"{number:,}" for number in numbers]
    return (name, *written, *(texts.get(key, "") for key in SHOWN_ATTRIBUTES))


def described_methods(folder: Path = METHODS) -> dict[str, dict[str, str]]:
    """Return the texts `summary` and `paper` of the method class in each file."""
    return {name: _class_texts(folder / f"{name}.py") for name in method_names(folder)}


def _class_texts(file: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
                names = {target.id for target in statement.targets if isinstance(target, ast.Name)}
                texts |= {name: str(statement.value.value) for name in names & SHOWN_ATTRIBUTES.keys()}
    return texts


def print_tasks(config: Path | None, *, as_json: bool) -> None:
    """Print name, source of the rows, headline metric and a line about every task; `config` adds those of its task files."""
    known: dict[str, tuple[TaskSpec, str]] = {name: (spec, _hub(spec)) for name, spec in catalogue.TASKS.items()}
    known |= {name: (spec, "miniature world") for name, spec in load_user_tasks([MINIATURE]).items()}
    if config is not None:
        own = load_user_tasks(configuration.load(config).data.task_files)
        known |= {name: (spec, str(spec.folder) if spec.folder else _hub(spec)) for name, spec in own.items()}
    if as_json:
        found = [
            {"name": name, "metrics": list(spec.metrics), "rows_from": where, "summary": spec.summary, "kind": spec.kind}
            for name, (spec, where) in known.items()
        ]
        typer.echo(json.dumps(found, indent=1))
        return
    rows: list[Any] = [(name, ", ".join(spec.metrics), where, spec.summary) for name, (spec, where) in known.items()]
    print_list(("task", "metrics", "rows from", "what it asks"), rows)


def _hub(spec: TaskSpec) -> str:
    configs = " + ".join(config for config in spec.hub_configs if config)
    return f"{spec.hub_name} {configs}".strip()
