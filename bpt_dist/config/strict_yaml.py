"""YAML without surprises: no tags, anchors, duplicate keys or huge files; the line of every key is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bpt_dist.errors import ConfigError

Key = tuple[str | int, ...]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the key, and a text `what is wrong (got VALUE); remedy`."""

    key: Key
    text: str
    line: int | None = None

    @property
    def dotted(self) -> str:
        """Return the key as users write it: `rows[1].target.steps`."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.key).lstrip(".")


@dataclass
class Document:
    """A read file: its plain data, the line of each key, and what is wrong with its form."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def line_of(self, key: Key) -> int:
        """Return the line of `key`, or of its nearest section that is written in the file (1 if none is)."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


class _Loader(yaml.SafeLoader):
    """Composes nodes, collects what is not allowed, and continues, so that all problems are reported together."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's interface)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.refusals: list[tuple[int, str]] = []
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            self.refusals.append((line, f"alias *{event.anchor} is not allowed; repeat the value"))
            return yaml.ScalarNode("tag:yaml.org,2002:null", "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
        if getattr(event, "anchor", None):
            self.refusals.append((line, f"anchor &{event.anchor} is not allowed; remove it and repeat the value"))
            event.anchor = None
        if getattr(event, "tag", None):
            self.refusals.append((line, f"tag {event.tag} is not allowed; write a plain value"))
            event.tag = None
        if self.depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# YAML 1.1 reads 010 as 8, 1:30 as 90, 2024-01-01 as a date and 1e-3 as text; none of that is wanted.
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE|yes|Yes|no|No|on|On|off|Off", "tTfFyYnNoO"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first, ""])


def parse_value(text: str) -> Any:
    """Return the plain value of a YAML flow expression such as `0.1`, `null` or `[a,b]`."""
    return _Loader(text).get_single_data()


def read(path: Path) -> Document:
    """Return the document at `path`; form problems are collected in it.

    Raises ConfigError when there is nothing to read: no such file, too large, or not YAML.
    """
    text = _read_text(path)
    document = Document(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.problems += [Problem((), what, line) for line, what in loader.refusals]
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1: holds no keys; write `key: value` lines")
        _index(node, (), document)
        document.data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: is not valid YAML: {what}; fix it") from error
    return document


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file; `bpt-dist configs` lists those that are shipped")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES // 1024} kB; a configuration is a page, not data")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _index(node: yaml.Node, key: Key, document: Document) -> None:
    """Note the line of every key below `node`; report repeated and odd keys and resolver calls."""
    if isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(node.value):
            document.lines[*key, position] = child.start_mark.line + 1
            _index(child, (*key, position), document)
    elif isinstance(node, yaml.MappingNode):
        node.value = [pair for pair in node.value if _is_plain_key(pair[0], key, document)]
        for name, child in node.value:
            line = name.start_mark.line + 1
            below = (*key, str(name.value))
            if below in document.lines:
                first = document.lines[below]
                document.problems.append(Problem(below, f"is given twice, first in line {first}; keep one", line))
            document.lines[below] = line
            _index(child, below, document)
    elif re.search(r"\$\{[^}]*:", str(node.value)):
        # OmegaConf's resolvers read the environment; `${other.key}` stays allowed.
        problem = Problem(key, f"calls a resolver (got {node.value!r}); only ${{other.key}} is allowed")
        document.problems.append(problem)


def _is_plain_key(node: yaml.Node, section: Key, document: Document) -> bool:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str" and node.value != "<<":
        return True
    what = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    document.problems.append(Problem(section, f"has a key that is not a word (got {what!r})", node.start_mark.line + 1))
    return False
