"""From plain data to a `Config`, or to the complete list of what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bpt_dist.config.base import MethodConfig, did_you_mean
from bpt_dist.config.keys import fields_by_key
from bpt_dist.config.method_source import method_names
from bpt_dist.config.overrides import spell_out
from bpt_dist.config.own_method import KEY as PATH
from bpt_dist.config.own_method import name_of, options_of_section
from bpt_dist.config.rules import problems_between_sections
from bpt_dist.config.sections import RunConfig
from bpt_dist.config.strict_yaml import Key, Problem
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.mini.world import ALL_TASKS
from bpt_dist.tasks.user_tasks import load_user_tasks

LONGEST_VALUE = 80
MISSING = "is missing; give a value"
WORDING = {
    "string_pattern_mismatch": "may hold a-z 0-9 . _ - only, 64 characters at most, the first a letter or digit",
    "path_type": "should be a path",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping",
    "model_type": "should be a section",
}


def validate(data: dict[str, Any], folder: Path) -> tuple[RunConfig | None, list[Problem]]:
    """Return the configuration that `data` describes, or None and every problem found."""
    data = spell_out(data)
    method, problems = _validate_method(data.get("method"), folder)
    broken = frozenset(problem.dotted for problem in problems)
    options = type(method) if type(method) is not MethodConfig else None
    try:
        config = RunConfig.model_validate({**data, "method": method})
    except ValidationError as error:
        problems += task_problems(data)
        of_keys = _problems(error, data, RunConfig, (), options)
        problems = _without_echoes(problems + of_keys)
        broken |= {name for problem in of_keys for name in _touched(problem)}
        problems += [problem for problem in _rules_on_the_rest(data, method, broken) if problem not in problems]
        return None, problems
    problems += [_located((), line) for line in problems_between_sections(config, broken)]
    problems += task_problems(data)
    return (None if problems else config), problems


def _validate_method(section: Any, folder: Path) -> tuple[MethodConfig, list[Problem]]:
    """Return the method's options and no problem, or a stand-in with default options and the problems."""
    names = method_names(folder)
    unknown = MethodConfig.model_construct(name="unknown")
    if not isinstance(section, dict):
        what = "is missing" if section is None else f"should be a name or a section (got {section!r})"
        return unknown, [Problem(("method",), f"{what}; name one of {', '.join(names)}")]
    name = section.get("name")
    try:
        options = options_of_section(section, folder)
    except ConfigError as error:
        return unknown, [Problem(("method", PATH), str(error))]
    if section.get(PATH) is not None and name != name_of(section[PATH]):
        stem = name_of(section[PATH])
        return unknown, [Problem(("method", "name"), f"is {name!r}, and the file of method.path is {stem}.py; remove the name")]
    if options is None:
        near = did_you_mean(str(name), names) or f"; name one of {', '.join(names)}"
        near = f"; write method: {{path: {name}}}" if str(name).endswith(".py") else near
        what = "is missing" if name is None else f"no such method (got {name!r})"
        slips = [key for key in section if name is None and did_you_mean(key, ["name"])]
        problems = [Problem(("method", key), "unknown key; did you mean name?") for key in slips]
        return unknown, [*problems, Problem(("method", "name"), what + near)]
    try:
        # As JSON, strict types still read a path from a text and a tuple from a list.
        return options.model_validate_json(json.dumps(section, default=str)), []
    except ValidationError as error:
        return options.model_construct(name=name), _problems(error, {"method": section}, options, ("method",), options)


def _rules_on_the_rest(data: dict[str, Any], method: MethodConfig, broken: frozenset[str]) -> list[Problem]:
    """Return the violated rules over several sections that read no broken key.

    The rules need a whole configuration, so broken keys take their defaults. Users then see all problems in one round.
    """
    rest = _without(data, broken)
    try:
        config = RunConfig.model_validate({**rest, "method": method})
    except ValidationError:
        return []
    return [_located((), line) for line in problems_between_sections(config, broken)]


def _without(data: dict[str, Any], broken: frozenset[str], prefix: str = "") -> dict[str, Any]:
    rest: dict[str, Any] = {}
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        if dotted not in broken:
            rest[name] = _without(value, broken, f"{dotted}.") if isinstance(value, dict) else value
    return rest


def _touched(problem: Problem) -> list[str]:
    """Return the key of a problem and the key its author may have meant: neither can be relied on."""
    meant = re.search(r"did you mean ([\w.]+)\?", problem.text)
    words = [str(part) for part in problem.key if not isinstance(part, int)]
    parent, names = ".".join(words[:-1]), [".".join(words)]
    if problem.text == MISSING:
        return [*names, parent]
    if meant:
        names += [meant[1] if "." in meant[1] or not parent else f"{parent}.{meant[1]}"]
    elif problem.text.startswith("unknown key"):
        names += [parent] if parent else []
    return names


def _without_echoes(problems: list[Problem]) -> list[Problem]:
    """Drop `is missing` for a key that another line says was misspelt."""
    meant = {name for problem in problems for name in _touched(problem)[1:]}
    return [problem for problem in problems if not (problem.text.startswith("is missing") and problem.dotted in meant)]


def _problems(
    error: ValidationError, data: dict[str, Any], model: type[BaseModel], prefix: Key, options: type[MethodConfig] | None
) -> list[Problem]:
    texts_by_key: dict[Key, list[str]] = {}
    for detail in error.errors():
        for problem in _problems_of(detail, data, model, prefix, options):
            texts = texts_by_key.setdefault(problem.key, [])
            if problem.text not in texts:
                texts.append(problem.text)
    # A key that may be of several types fails once for each: one line says it.
    return [Problem(key, _joined(texts)) for key, texts in texts_by_key.items()]


def _joined(texts: list[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    got = [re.search(r" \(got .*\)$", text, re.DOTALL) for text in texts]
    if not all(got) or len({match[0] for match in got if match}) > 1:
        return "; and ".join(texts)
    bare = [text[: match.start()] for text, match in zip(texts, got, strict=True) if match]
    return " or ".join([bare[0], *(text.removeprefix("should be ") for text in bare[1:])]) + (got[0][0] if got[0] else "")


def _problems_of(
    detail: ErrorDetails,
    data: dict[str, Any],
    model: type[BaseModel],
    prefix: Key,
    options: type[MethodConfig] | None,
) -> list[Problem]:
    """Translate one pydantic error; a validator over several keys reports one problem a line, `key: text`."""
    key = _real_key(data, (*prefix, *detail["loc"]), detail["type"])
    if detail["type"] == "extra_forbidden":
        return [Problem(key, f"unknown key{_nearest_key(key, model, options)}")]
    if detail["type"] == "missing":
        return [Problem(key, MISSING)]
    if detail["type"] == "value_error":
        lines = str(detail["ctx"]["error"]).split("\n")
        return [_located(key, line) for line in lines]
    message = WORDING.get(detail["type"]) or detail["msg"].removeprefix("Input ")
    message = message[0].lower() + message[1:]
    return [Problem(key, f"{message} (got {_short(detail['input'])})")]


def _real_key(data: Any, loc: Key, kind: str) -> Key:
    """Return `loc` without the names pydantic adds for the branches of a union."""
    real: list[str | int] = []
    for position, part in enumerate(loc):
        present = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if present:
            real.append(part)
            data = data[part]
        elif kind == "missing" and position == len(loc) - 1:
            real.append(part)
    return tuple(real)


def _nearest_key(key: Key, model: type[BaseModel], options: type[MethodConfig] | None) -> str:
    known = fields_by_key(options)
    parent = "".join(f"{part}." for part in key[:-1])
    siblings = [name[len(parent) :] for name in known if name.startswith(parent) and "." not in name[len(parent) :]]
    word = str(key[-1])
    near = did_you_mean(word, siblings)
    if near:
        return near
    elsewhere = {name.rpartition(".")[2]: name for name in known}
    close = did_you_mean(word, elsewhere)
    last = close.removeprefix("; did you mean ").removesuffix("?")
    return f"; did you mean {elsewhere[last]}?" if close else f"; known are {', '.join(siblings)}"


def _located(key: Key, line: str) -> Problem:
    match = re.match(r"([a-z_][\w.]*): ", line)
    if match is None:
        return Problem(key, line)
    return Problem((*key, *match[1].split(".")), line[match.end() :])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def task_problems(data: dict[str, Any]) -> Iterator[Problem]:
    """Yield a problem for every task that plain `data` names and nobody defines, and for every broken task file."""
    section = data.get("data")
    if not isinstance(section, dict):
        return
    files = section.get("task_files") or []
    known = {*TASKS, *ALL_TASKS}
    try:
        known |= set(load_user_tasks(files)) if _are_texts(files) else set()
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
