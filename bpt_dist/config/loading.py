"""A run as one frozen value: YAML read by OmegaConf, checked by pydantic, every problem named at once. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from bpt_dist.config.base import did_you_mean
from bpt_dist.config.keys import other_unit
from bpt_dist.config.method_source import METHODS
from bpt_dist.config.mlflow_environment import experiment_of_environment
from bpt_dist.config.overrides import Overridden, apply, apply_values, drop_idle_source, plain_value
from bpt_dist.config.own_method import KEY as PATH
from bpt_dist.config.quick import QUICK, in_section, quick_data
from bpt_dist.config.sections import RunConfig, Seeds
from bpt_dist.config.strict_yaml import Document, Key, Problem, read
from bpt_dist.config.validation import validate
from bpt_dist.errors import ConfigError

OF_THE_FILE = ("name", "output", "run_dir", "seed", "rows", "comparisons", "quick", "tracking")
"""Keys that belong to the whole file and may not be in a row."""
OF_THE_ROW = ("label", "seeds")
"""Keys of a row that are no keys of its runs."""
_SEEDS: TypeAdapter[tuple[int, ...]] = TypeAdapter(Seeds)


def load(path: Path, overrides: Sequence[str] = (), methods: Path = METHODS, *, quick: bool = False) -> RunConfig:
    """Return the configuration at `path`, with `quick` its smaller version, with `key=value` overrides applied.

    Raises ConfigError whose lines name every problem: `file:line: key: what is wrong (got VALUE); remedy`.
    """
    document = read(path)
    given, smaller = quick_data(document.data) if quick else (document.data, [])
    return _checked(document, apply(given, overrides, methods), smaller, methods)


def load_values(source: Path | Mapping[str, Any], values: Mapping[str, Any], methods: Path = METHODS) -> RunConfig:
    """Return the configuration in a file or in plain data, with `values` in the place of what it says of their keys.

    Keys are dotted, their unique end, or have `__` for the dot. Raises ConfigError as `load` does.
    """
    if isinstance(source, Path):
        document = read(source)
    else:
        try:
            document = Document(Path("configuration"), plain_value(source))
        except TypeError as error:
            raise ConfigError(f"configuration: {error}; give numbers, texts, lists and mappings") from None
    return _checked(document, apply_values(document.data, values, methods), [], methods)


def _checked(document: Document, overridden: Overridden, smaller: list[Problem], methods: Path) -> RunConfig:
    """Return the configuration of a document with its overrides, or raise ConfigError with every problem."""
    problems = document.problems + smaller + overridden.problems
    try:
        data = _plain(overridden.data)
    except OmegaConfBaseException as error:
        key: Key = tuple((error.full_key or "").split("."))
        problems.append(Problem(key, f"refers to nothing: {str(error.msg).splitlines()[0]}"))
        raise _refusal(document, overridden, problems) from error
    config, invalid = validate(data, methods)
    problems += invalid
    if config is not None:
        problems += _expansion(config, methods)[1]
        problems += [] if config.quick is None else _quick_problems(document.data, methods)
    if config is None or problems:
        raise _refusal(document, overridden, problems)
    return config


def expand(config: RunConfig, only: Sequence[str] = (), methods: Path = METHODS) -> list[RunConfig]:
    """Return one configuration for each run: rows by seeds, or the single run itself; with `only`, of the rows that it names.

    A run is named `<label or method>-s<seed>` and lives in that folder below the folder of `config`. A row that names
    another method starts with an empty section; source settings are dropped where its method has no source stage. A row may have
    `seeds` of its own. Raises ConfigError for what cannot be run, and for a name in `only` that no row has.
    """
    runs, problems = _expansion(config, methods)
    problems += [] if problems else _unknown_rows(config, runs, only)
    if problems:
        raise ConfigError("\n".join(f"{problem.dotted}: {problem.text}" for problem in problems))
    return [run for run in runs if not only or row_label(run) in only]


def resolved_yaml(config: RunConfig) -> str:
    """Return the configuration with every default written out; `load` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(_dump(config)))


def _dump(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _plain(data: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _expansion(config: RunConfig, methods: Path) -> tuple[list[RunConfig], list[Problem]]:
    if config.rows is None and config.seeds is None:
        alone = "has no effect in a file without rows and seeds; remove it"
        return [config], [Problem((key,), alone) for key in ("comparisons", QUICK) if getattr(config, key)]
    runs: list[RunConfig] = []
    problems: list[Problem] = []
    for position, row in enumerate(config.rows or ({},)):
        problems += [
            Problem(("rows", position, key), "belongs to the whole file, not to a row; move it up or remove it")
            for key in OF_THE_FILE
            if key in row
        ]
        seeds, wrong = _seeds(config, row)
        problems += [Problem(("rows", position, "seeds"), text) for text in wrong]
        for seed in seeds:
            run, invalid = validate(_row_data(config, row, seed, methods), methods)
            problems += [Problem(_key_in_row(row, position, problem.key), problem.text) for problem in invalid]
            runs += [run] if run is not None else []
    names = [run.name for run in runs]
    problems += [
        Problem(("rows",), f"several rows are named {name!r}; give each a label of its own")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    problems += [] if problems else _comparison_problems(config, runs)
    return runs, list(dict.fromkeys(problems))


def _unknown_rows(config: RunConfig, runs: Sequence[RunConfig], asked: Sequence[str]) -> Iterator[Problem]:
    """Yield what `--row` names and the file has not."""
    if config.rows is None:
        yield from [Problem(("--row",), "the file has no rows; leave it out")] * bool(asked)
        return
    labels = list(dict.fromkeys(map(row_label, runs)))
    for row in asked:
        if row not in labels:
            yield Problem(("--row",), f"{row} is no row of {config.name}; rows are {', '.join(labels)}{did_you_mean(row, labels)}")


def _seeds(config: RunConfig, row: Mapping[str, Any]) -> tuple[tuple[int, ...], list[str]]:
    """Return the seeds of a row, its own or those of the file, and what is wrong with its own."""
    usual = config.seeds or (config.seed,)
    if row.get("seeds") is None:
        return usual, []
    try:
        own = _SEEDS.validate_python(row["seeds"])
    except ValidationError:
        return usual, [f"is no list of whole numbers from 0 (got {row['seeds']!r}); write seeds: [0, 1, 2]"]
    if len(set(own)) < len(own):
        return usual, [f"lists a seed twice (got {list(own)}); name each once"]
    return own, []


def _quick_problems(data: dict[str, Any], methods: Path) -> list[Problem]:
    """Return what is wrong with the smaller version of a file whose whole version is right."""
    smaller, problems = quick_data(data)
    if problems:
        return problems
    config, invalid = validate(_plain(smaller), methods)
    return list(in_section(data, invalid if config is None else _expansion(config, methods)[1]))


def _comparison_problems(config: RunConfig, runs: Sequence[RunConfig]) -> Iterator[Problem]:
    """Yield what a comparison names and the table will not have."""
    by_label = {row_label(run): run for run in runs}
    beside = (f"{label}/{run.evaluation.predict}" for label, run in by_label.items() if run.evaluation.predict != "map")
    rows = {*by_label, *beside}
    for position, text in enumerate(config.comparisons):
        key: Key = ("comparisons", position)
        names, _, tasks = text.partition("@")
        first, second = names.split(":")
        if first == second:
            yield Problem(key, f"compares {first} with itself; name two rows")
        for row in (first, second):
            if row not in rows:
                yield Problem(key, f"{row} is no row of the table; rows are {', '.join(sorted(rows))}{did_you_mean(row, rows)}")
                continue
            targets = by_label[row.rpartition("/")[0] or row].data.target_tasks
            for task in (task for task in tasks.split(",") if task and task not in targets):
                yield Problem(key, f"{task} is no target task of row {row}; it has {', '.join(targets)}")


def _row_data(config: RunConfig, row: dict[str, Any], seed: int, methods: Path) -> dict[str, Any]:
    """Return the plain data of the run of one row and seed; the row wins over the rest of the file."""
    # What the file leaves out is left out here: a default must not meet a row's `lr_full_relative` as if it were given.
    given = config.model_dump(mode="json", exclude_unset=True)
    base = {key: value for key, value in given.items() if key not in ("rows", "seeds", "comparisons", QUICK)}
    label = row.get("label")
    row = {key: value for key, value in row.items() if key not in (*OF_THE_FILE, *OF_THE_ROW)}
    if isinstance(row.get("method"), str):
        row["method"] = {"name": row["method"]}
    if isinstance(row.get("method"), dict) and row["method"].get("name") not in (None, config.method.name):
        base["method"] = {key: row["method"][key] for key in ("name", PATH) if key in row["method"]}
        drop_idle_source(base, methods)
    for section, keys in row.items():
        _give_way(base.get(section), keys)
    data = _plain(OmegaConf.merge(base, row))
    name = f"{label or data['method']['name']}-s{seed}"
    data |= {"name": name, "seed": seed, "run_dir": str(config.directory / name)}
    source = data.get("source")
    if isinstance(source, dict) and isinstance(source.get("posterior"), str):
        source["posterior"] = source["posterior"].replace("{seed}", str(seed))
    if config.tracking.mlflow and config.tracking.experiment is None:
        data["tracking"] = {**data.get("tracking", {}), "experiment": experiment_of_environment() or config.name}
    return data


def _give_way(base: Any, row: Any) -> None:
    """Remove from a section of the file what the row gives in the other unit: `lr` gives way to `lr_relative`, and the reverse."""
    if isinstance(base, dict) and isinstance(row, dict):
        for key in (key for key, value in row.items() if value is not None):
            base.pop(other_unit(key), None)


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
        place = overridden.place if of_command_line else f"{document.path}:{line}" if document.lines else str(document.path)
        lines.append((2**31 if of_command_line else line, f"{place}: {text}"))
    return ConfigError("\n".join(text for _, text in sorted(lines, key=lambda pair: pair[0])))


def row_label(run: RunConfig) -> str:
    """Return the name of the row a run belongs to: its own without the seed."""
    return re.sub(rf"-s{run.seed}$", "", run.name)
