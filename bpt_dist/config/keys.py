"""The tree of keys: which exist, which are sections, which take lists. Method options are those of the chosen method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bpt_dist.config.base import MethodConfig, Section
from bpt_dist.config.sections import RunConfig

Fields = dict[str, FieldInfo]
RELATIVE = "_relative"


def other_unit(key: str) -> str:
    """Return the key that gives the same in another unit, `lr` for `lr_relative` and the reverse; it need not exist."""
    return key.removesuffix(RELATIVE) if key.endswith(RELATIVE) else f"{key}{RELATIVE}"


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and everything inside it: unions, Annotated, list items."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from _parts(inner)


def section_of(field: FieldInfo, options: type[MethodConfig] | None) -> type[BaseModel] | None:
    """Return the model below a field, or None for a leaf; the method's is `options` where it is known."""
    for part in _parts(field.annotation):
        if isinstance(part, type) and issubclass(part, MethodConfig):
            return options or part
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def takes_value(field: FieldInfo) -> bool:
    """Return whether a key may hold something other than a section: every leaf, and `mesh`, which may be one value."""
    return section_of(field, None) is None or any(get_origin(part) is Literal for part in _parts(field.annotation))


def takes_list(field: FieldInfo) -> bool:
    """Return whether a key holds a list."""
    return any(get_origin(part) is tuple for part in _parts(field.annotation))


def takes_names(field: FieldInfo) -> bool:
    """Return whether a key is a free mapping such as `source.task_weights`."""
    return any(get_origin(part) is dict for part in _parts(field.annotation))


def takes_only_text(field: FieldInfo) -> bool:
    """Return whether digits on the command line mean text: `revision=1234567` is a commit, not a number."""
    parts = list(_parts(field.annotation))
    return any(part in (str, Path) for part in parts) and not any(part in (int, float, bool) for part in parts)


def fields_by_key(options: type[MethodConfig] | None, model: type[BaseModel] = RunConfig, prefix: str = "") -> Fields:
    """Return every key with its field, sections included: `target`, `target.steps`, ..."""
    fields: Fields = {}
    for name, field in model.model_fields.items():
        fields[prefix + name] = field
        below = section_of(field, options)
        if below is not None:
            fields |= fields_by_key(options, below, f"{prefix}{name}.")
    return fields


def relative_rates(tree: dict[str, Any]) -> dict[str, float]:
    """Return the learning rates that a dumped configuration gives in units of the word embeddings, by the key of the absolute one.

    `source.lr_relative: 0.1` is `{"source.lr": 0.1}`.
    """
    given = {key: value for key, value in leaves(tree).items() if re.fullmatch(r".*\.lr(_\w+)?_relative", key)}
    return {key.removesuffix("_relative"): value for key, value in given.items() if value is not None}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a dumped configuration by dotted key; lists and empty mappings are values."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            values |= leaves(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
