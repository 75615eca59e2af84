"""A run as one frozen value: YAML read by OmegaConf, checked by pydantic, every problem named at once. Never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bpt_dist.errors import ConfigError
from bpt_dist.settings.base import MethodConfig, refuse, without_effect
from bpt_dist.settings.keys import leaves
from bpt_dist.settings.method_options import METHODS, method_names, method_options
from bpt_dist.settings.models import (
    Backbone,
    Config,
    Data,
    Distribution,
    Evaluation,
    MeshShape,
    SourceStage,
    Stage,
    TargetStage,
    Tracking,
)
from bpt_dist.settings.overrides import Overridden, apply, drop_idle_source
from bpt_dist.settings.prompt import PromptOptions
from bpt_dist.settings.strict_yaml import Document, Key, Problem, read
from bpt_dist.settings.validation import validate

__all__ = [
    "CHANGEABLE",
    "Backbone",
    "Config",
    "Data",
    "Distribution",
    "Evaluation",
    "MeshShape",
    "MethodConfig",
    "PromptOptions",
    "SourceStage",
    "Stage",
    "TargetStage",
    "Tracking",
    "changed_keys",
    "expand",
    "fingerprint",
    "json_schema",
    "load",
    "method_names",
    "method_options",
    "refuse",
    "resolved_yaml",
    "without_effect",
]

CHANGEABLE = frozenset({
    "name", "output", "run_dir", "rows", "seeds", "figures",
    "data.cache",
    "source.pass_size", "target.pass_size",
    "source.checkpoint_every", "source.log_every", "target.checkpoint_every", "target.log_every",
    "evaluation.batch_size", "backbone.attention", "backbone.forward",
    "distribution.mesh", "distribution.mesh.particle", "distribution.mesh.data", "distribution.exchange",
    "distribution.shard", "distribution.zero_config", "distribution.scope", "distribution.offload",
    "distribution.activation_checkpointing",
    "distribution.expect_world_size", "distribution.startup_timeout", "distribution.step_timeout",
    "tracking.mlflow", "tracking.uri", "tracking.experiment", "tracking.allow_insecure", "tracking.register_as",
})  # fmt: skip
"""Keys that a resumed run may change: where things are, how often, on how many processes. All others shape the result."""

OF_THE_FILE = ("name", "output", "run_dir", "seed", "seeds", "rows", "tracking")
"""Keys that belong to the whole file and may not stand in a row."""


def load(path: Path, overrides: Sequence[str] = (), methods: Path = METHODS) -> Config:
    """Return the configuration at `path` with `key=value` overrides applied.

    Raises ConfigError whose lines name every problem: `file:line: key: what is wrong (got VALUE); remedy`.
    """
    document = read(path)
    overridden = apply(document.data, overrides, methods)
    problems = document.problems + overridden.problems
    try:
        data = _plain(overridden.data)
    except OmegaConfBaseException as error:
        key: Key = tuple((error.full_key or "").split("."))
        problems.append(Problem(key, f"refers to nothing: {str(error.msg).splitlines()[0]}"))
        raise _refusal(document, overridden, problems) from error
    config, found = validate(data, methods)
    problems += found
    if config is not None:
        problems += _expansion(config, methods)[1]
    if config is None or problems:
        raise _refusal(document, overridden, problems)
    return config


def expand(config: Config, methods: Path = METHODS) -> list[Config]:
    """Return one configuration for each run: rows by seeds, or the single run itself.

    A run is named `<label or method>-s<seed>` and lives in that folder below the folder of `config`. A row that names
    another method starts that section afresh; source settings are dropped where its method has no source stage.
    """
    runs, problems = _expansion(config, methods)
    if problems:
        raise ConfigError("\n".join(f"{problem.dotted}: {problem.text}" for problem in problems))
    return runs


def resolved_yaml(config: Config) -> str:
    """Return the configuration with every default written out; `load` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(_dump(config)))


def fingerprint(config: Config) -> str:
    """Return the SHA-256 of all keys that shape the result, 64 hexadecimal digits; CHANGEABLE keys are left out."""
    shaping = {key: value for key, value in leaves(_dump(config)).items() if key not in CHANGEABLE}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return the dotted keys that differ and may not change between a run and its resumption, sorted."""
    before, after = leaves(_dump(old)), leaves(_dump(new))
    missing = object()
    differing = {key for key in before | after if before.get(key, missing) != after.get(key, missing)}
    return sorted(differing - CHANGEABLE)


def json_schema(methods: Path = METHODS) -> dict[str, Any]:
    """Return the JSON schema of a configuration file for editors, with the options of every method."""
    schema = Config.model_json_schema()
    names = method_names(methods)
    variants: list[dict[str, Any]] = [{"enum": names}]
    for name in names:
        options = method_options(name, methods).model_json_schema(ref_template="#/$defs/" + name + ".{model}")
        schema["$defs"] |= {f"{name}.{key}": value for key, value in options.pop("$defs", {}).items()}
        options["required"] = sorted({*options.get("required", ()), "name"})
        variants.append(options)
    schema["properties"]["method"] = {"description": "The method and its options.", "anyOf": variants}
    path = {"type": "string", "description": "Short for `backbone: {path: ...}`."}
    schema["properties"]["backbone"] = {"anyOf": [path, {"$ref": "#/$defs/Backbone"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _dump(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _plain(data: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _expansion(config: Config, methods: Path) -> tuple[list[Config], list[Problem]]:
    if config.rows is None and config.seeds is None:
        return [config], []
    runs: list[Config] = []
    problems: list[Problem] = []
    for position, row in enumerate(config.rows or ({},)):
        problems += [
            Problem(("rows", position, key), "belongs to the whole file, not to a row; move it up or remove it")
            for key in OF_THE_FILE
            if key in row
        ]
        for seed in config.seeds or (config.seed,):
            run, found = validate(_row_data(config, row, seed, methods), methods)
            problems += [Problem(_key_in_row(row, position, problem.key), problem.text) for problem in found]
            runs += [run] if run is not None else []
    names = [run.name for run in runs]
    problems += [
        Problem(("rows",), f"several rows are named {name!r}; give each a label of its own")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    return runs, list(dict.fromkeys(problems))


def _row_data(config: Config, row: dict[str, Any], seed: int, methods: Path) -> dict[str, Any]:
    """Return the plain data of the run of one row and seed; the row wins over the rest of the file."""
    base = {key: value for key, value in _dump(config).items() if key not in ("rows", "seeds")}
    row = {key: value for key, value in row.items() if key not in OF_THE_FILE}
    label = row.pop("label", None)
    if isinstance(row.get("method"), str):
        row["method"] = {"name": row["method"]}
    if isinstance(row.get("method"), dict) and row["method"].get("name") not in (None, config.method.name):
        base["method"] = {"name": row["method"]["name"]}
        drop_idle_source(base, methods)
    data = _plain(OmegaConf.merge(base, row))
    name = f"{label or data['method']['name']}-s{seed}"
    data |= {"name": name, "seed": seed, "run_dir": str(config.directory / name)}
    if config.tracking.mlflow and config.tracking.experiment is None:
        data["tracking"]["experiment"] = config.name
    return data


def _key_in_row(row: dict[str, Any], position: int, key: Key) -> Key:
    if key == ("name",):
        return ("rows", position, "label")
    return ("rows", position, *key) if key and key[0] in row else key


def _refusal(document: Document, overridden: Overridden, problems: list[Problem]) -> ConfigError:
    """Return the error that lists `problems` in the order of the file, the command line last."""
    lines: list[tuple[int, str]] = []
    for problem in dict.fromkeys(problems):
        of_command_line = problem in overridden.problems or any(problem.key[: len(key)] == key for key in overridden.keys)
        text = f"{problem.dotted}: {problem.text}" if problem.key else problem.text
        line = problem.line or document.line_of(problem.key)
        place = "command line" if of_command_line else f"{document.path}:{line}"
        lines.append((2**31 if of_command_line else line, f"{place}: {text}"))
    return ConfigError("\n".join(text for _, text in sorted(lines, key=lambda pair: pair[0])))
