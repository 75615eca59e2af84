"""`key=value` on the command line. A key is dotted, or its unique end: `sigma=0.1`, `mesh.particle=2`.

Letters, digits and `_ . / : + - , [ ]` are all a value may hold, because the `deepspeed` launcher hands the overrides
through the shells of remote hosts. A list is `a,b`, `[a,b]`, or one value for a key that takes a list.

With `rows`, an override applies to every run that has the key: to the file's own settings and to each row that sets it
(or, for `method.*`, that names a method with that option).

A program gives values in the place of texts (`apply_values`): any value is allowed there, and a mapping sets several keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bpt_dist.config.base import MethodConfig, did_you_mean
from bpt_dist.config.keys import (
    Fields,
    fields_by_key,
    other_unit,
    section_of,
    takes_list,
    takes_names,
    takes_only_text,
    takes_value,
)
from bpt_dist.config.own_method import KEY as PATH
from bpt_dist.config.own_method import OwnMethod, options_of_section, with_name
from bpt_dist.config.sections import NATURAL_KEY
from bpt_dist.config.strict_yaml import Key, Problem, parse_value
from bpt_dist.errors import ConfigError

METHOD_NAME, METHOD_PATH = ("method", "name"), ("method", PATH)
OVERRIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)=([A-Za-z0-9_./:+,\[\]-]*)")


@dataclass
class Overridden:
    """Plain data with the overrides applied, the keys they set, those that could not be used, and where they come from."""

    data: dict[str, Any]
    keys: set[Key] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    place: str = "command line"


def spell_out(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with sections written as one value in full: `method: bpt` is `method: {name: bpt}`.

    A method given by its file gets its name: `{path: my_method.py}` is `{name: my_method, path: my_method.py}`.
    """
    full = {**data}
    for section, key in NATURAL_KEY.items():
        if isinstance(full.get(section), str):
            full[section] = {key: full[section]}
    if isinstance(full.get("method"), dict):
        full["method"] = with_name(full["method"])
    if isinstance(full.get("rows"), list):
        full["rows"] = [spell_out(row) if isinstance(row, dict) else row for row in full["rows"]]
    return full


def options_of(data: dict[str, Any], folder: Path) -> type[MethodConfig] | None:
    """Return the option class of the method that `data` names, None when it names none that exists."""
    try:
        return options_of_section(data.get("method"), folder)
    except ConfigError:
        return None


def apply(data: dict[str, Any], overrides: Sequence[str], folder: Path) -> Overridden:
    """Set every `key=value` of `overrides` in a spelled-out copy of `data`."""
    result = Overridden(spell_out(data))
    # Which options exist depends on the method, which rows exist on `rows`: these two go first.
    first = [override for override in overrides if re.match(r"(rows|method|method\.name|method\.path)=", override)]
    for override in first + [override for override in overrides if override not in first]:
        _apply_one(result, override, folder)
    return result


def _apply_one(result: Overridden, override: str, folder: Path) -> None:
    match = OVERRIDE.fullmatch(override)
    if match is None:
        result.problems.append(Problem((), _not_an_override(override)))
        return
    written, text = match.groups()
    known = _known(result, folder, written)
    key = _new_key(result, written, known, override)
    if key is None:
        return
    try:
        value = _value(text, known.get(".".join(map(str, key))))
    except yaml.YAMLError:
        result.problems.append(Problem(key, f"is not a value (got {text!r}); write one word or a list a,b"))
        return
    _set(result, key, value, folder)


def apply_values(data: dict[str, Any], values: Mapping[str, Any], folder: Path) -> Overridden:
    """Set values by their keys in a spelled-out copy of `data`: dotted, a unique end, or `__` for the dot (`target__steps`)."""
    result = Overridden(spell_out(data), place="arguments")
    named = {written.replace("__", "."): value for written, value in values.items()}
    first = [written for written in ("rows", "method", "method.name", "method.path") if written in named]
    for written in [*first, *(written for written in named if written not in first)]:
        _apply_value(result, written, named[written], folder)
    return result


def _apply_value(result: Overridden, written: str, value: Any, folder: Path) -> None:
    known = _known(result, folder, written)
    field_of = known.get(written)
    if isinstance(value, Mapping) and field_of is not None and (section_of(field_of, None) or takes_names(field_of)):
        # The name or the file of a method comes first: it decides which options there are.
        for name in sorted(value, key=lambda name: (name != NATURAL_KEY.get(written), name != PATH)):
            _apply_value(result, f"{written}.{name}", value[name], folder)
        return
    key = _new_key(result, written, known, f"{written}={value!r}")
    if key is None:
        return
    try:
        _set(result, key, plain_value(value), folder)
    except TypeError as error:
        result.problems.append(Problem(key, f"{error}; give a number, a text, a list or a mapping"))


def plain_value(value: Any) -> Any:
    """Return a value of Python as YAML would give it. Raises TypeError for what no configuration can hold."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): plain_value(below) for name, below in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain_value(part) for part in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"holds a value of type {type(value).__name__}, which no configuration can hold")


def _known(result: Overridden, folder: Path, written: str) -> Fields:
    """Return the keys of the file's own settings and of each row, whose methods differ in their options.

    The file of another method can be given whatever the method is, by its full key: `path` alone is the backbone's.
    """
    rows = [row for row in result.data.get("rows") or () if isinstance(row, dict)]
    known: Fields = {written: OwnMethod.model_fields[PATH]} if written == ".".join(METHOD_PATH) else {}
    for settings in (result.data, *rows):
        known |= fields_by_key(options_of(settings, folder))
    return known


def _new_key(result: Overridden, written: str, known: Fields, override: str) -> Key | None:
    """Return the full key for a written one; None, with the problem noted, where there is none or it was set before."""
    dotted, problem = resolve_key(written, known)
    if dotted is None:
        result.problems.append(Problem((written,), problem))
        return None
    key: Key = tuple(dotted.split("."))
    if key in result.keys:
        result.problems.append(Problem(key, f"is given twice (got {override!r}); keep one"))
        return None
    return key


def _set(result: Overridden, key: Key, value: Any, folder: Path) -> None:
    _set_everywhere(result, key, value, folder)
    backbone = result.data.get("backbone")
    if key == ("backbone", "path") and ("backbone", "revision") not in result.keys and isinstance(backbone, dict):
        # The commit in the file is one of the repository in the file; it says nothing of another one.
        backbone.pop("revision", None)


def _not_an_override(text: str) -> str:
    if "=" not in text:
        return f"{text!r} is not key=value; write for example target.steps=100"
    return (
        f"{text!r} holds a character with a meaning to shells; allowed are letters, digits and _ . / : + - , [ ]. Write the value "
        "into the YAML file, where any text may be"
    )


def resolve_key(written: str, known: Fields) -> tuple[str | None, str]:
    """Return the full key for a written one (full, or its unique end), or None and what is wrong with it."""
    dotted = f"{written}.{NATURAL_KEY[written]}" if written in NATURAL_KEY else written
    free_name = dotted.rpartition(".")[0] in known and takes_names(known[dotted.rpartition(".")[0]])
    if free_name or (dotted in known and takes_value(known[dotted])):
        return dotted, ""
    if dotted in known:
        return None, f"is a section; set one of its keys, {written}.KEY=VALUE"
    ends = [key for key in known if key.endswith("." + written)]
    if len(ends) == 1:
        return ends[0], ""
    return None, f"is ambiguous; write one of {', '.join(sorted(ends))}" if ends else _unknown(written, known)


def _unknown(written: str, known: Fields) -> str:
    last_names = {key.rpartition(".")[2] for key in known}
    near = did_you_mean(written, known) or did_you_mean(written.rpartition(".")[2], last_names)
    return f"unknown key{near or '; `--print-config` shows all keys'}"


def _value(text: str, leaf: Any) -> Any:
    listed = leaf is not None and takes_list(leaf)
    value = parse_value(f"[{text}]" if "," in text and not text.startswith("[") else text)
    if leaf is not None and takes_only_text(leaf) and not listed and value is not None:
        return text
    return [value] if listed and value is not None and not isinstance(value, list) else value


def _set_everywhere(result: Overridden, key: Key, value: Any, folder: Path) -> None:
    rows = [row for row in result.data.get("rows") or () if isinstance(row, dict)]
    if key in (METHOD_NAME, METHOD_PATH) and rows and all("method" in row for row in rows):
        result.problems.append(Problem(key, f"has no effect, every row names its method (got {value!r}); add rows=null"))
        return
    dotted = ".".join(map(str, key))
    # The command line wins over the file in another unit, too; what it gives in both is refused with the rest.
    other: Key = (*key[:-1], other_unit(str(key[-1])))
    gives_way = value is not None and other not in result.keys
    if key in (METHOD_NAME, METHOD_PATH):
        _name_method(result, key, value, folder)
    elif key[0] != "method" or dotted in fields_by_key(options_of(result.data, folder)):
        set_key(result.data, key, value)
        if gives_way:
            drop_key(result.data, other)
    for row in rows:
        has_option = key[0] == "method" and dotted in fields_by_key(options_of(row, folder))
        if has_option or (key[0] != "method" and (holds(row, key) or (gives_way and holds(row, other)))):
            set_key(row, key, value)
            if gives_way:
                drop_key(row, other)
    result.keys.add(key)


def _name_method(result: Overridden, key: Key, value: Any, folder: Path) -> None:
    """Name another method, or give its file: its section starts empty, and without a source stage the source settings are dropped.

    The file of the same method may be elsewhere: its options stay. A name and a file given both are set as they are.
    """
    data, section = result.data, result.data.get("method")
    named = with_name({str(key[-1]): value})
    both = {METHOD_NAME, METHOD_PATH} - {key} <= result.keys
    if isinstance(section, dict) and (both or section.get("name") == named.get("name")):
        data["method"] = {**section, **({str(key[-1]): value} if both else named)}
        return
    data["method"] = named
    drop_idle_source(data, folder)


def drop_idle_source(data: dict[str, Any], folder: Path) -> None:
    """Remove the source settings in place where the method has no source stage."""
    options = options_of(data, folder)
    if options is not None and not options.HAS_SOURCE_STAGE:
        data.pop("source", None)
        if isinstance(data.get("data"), dict):
            data["data"] = {key: value for key, value in data["data"].items() if key != "source_tasks"}


def holds(data: Any, key: Key) -> bool:
    """Return whether nested plain data has a value at `key`."""
    for part in key:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def set_key(data: dict[str, Any], key: Key, value: Any) -> None:
    """Set a nested value in place, making sections on the way (a single value such as `mesh: auto` is replaced by one)."""
    for part in key[:-1]:
        below = data.get(str(part))
        data[str(part)] = {**below} if isinstance(below, dict) else {}
        data = data[str(part)]
    data[str(key[-1])] = value


def drop_key(data: dict[str, Any], key: Key) -> None:
    """Remove a nested value in place where there is one."""
    if holds(data, key):
        for part in key[:-1]:
            data = data[str(part)]
        del data[str(key[-1])]
