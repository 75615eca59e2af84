"""The smaller version of a table that `quick:` describes: keys that take the place of the file's, in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bpt_dist.config.keys import other_unit
from bpt_dist.config.overrides import holds, spell_out
from bpt_dist.config.strict_yaml import Key, Problem

QUICK = "quick"


def quick_data(data: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the plain data of a file with its section `quick` laid over them, and what is wrong with that."""
    changes = data.get(QUICK)
    whole = {key: value for key, value in data.items() if key != QUICK}
    if changes is None:
        return whole, [Problem((QUICK,), "is missing, so the file has no smaller version; add the section or leave out --quick")]
    if not isinstance(changes, dict):
        return whole, []  # the section's form is refused with the rest of the file
    if QUICK in changes:
        return whole, [Problem((QUICK, QUICK), "has no effect inside itself; remove it")]
    name = f"{data.get('name', 'run')}-{QUICK}"
    return merged(spell_out(whole), {"name": name} | spell_out(changes)), []


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`: sections key by key, all else as a whole; a rate takes the place of its other unit."""
    result = {key: value for key, value in base.items() if changes.get(other_unit(key)) is None}
    for key, value in changes.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def in_section(data: dict[str, Any], problems: Iterable[Problem]) -> Iterator[Problem]:
    """Yield the problems of the smaller version at the keys where the file has them."""
    for problem in problems:
        key: Key = (QUICK, *problem.key)
        names = tuple(part for part in key if isinstance(part, str))
        yield Problem(key if problem.key and holds(data, names[:2]) else (QUICK,), problem.text)
