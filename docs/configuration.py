"""Write docs/configuration.md, every key of a configuration, from the schema that editors read: `python docs/configuration.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bpt_dist.config.schema import json_schema

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Every key of a configuration

Made from the schema of the settings by `make schema`; a test refuses a page that is older than they are. The same texts
appear in editors, which read `configs/schema.json`. A key is written as in YAML, or as `section.key=value` behind a command; a last
name that only one section has is enough there (`sigma=0.5`). `bpt-dist train --print-config` shows the values of one run.
"""
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
METHOD = (
    "The name of a method alone (`method: bpt`), or its name and options. `path` in the place of the name is the Python file of "
    "[a method outside the package](adding_a_method.md#outside-the-package); its options are those of its `Config`."
)
CONTAINERS = ("method", "rows", "quick")  # they hold keys of the other sections


def main() -> int:
    """Write the page, or with `--check` return 1 if it is older than the settings."""
    text = page()
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


def page() -> str:
    """Return the page."""
    schema = json_schema()
    definitions = schema["$defs"]
    top = {key: value for key, value in schema["properties"].items() if key not in CONTAINERS}
    plain = {key: value for key, value in top.items() if section_of(value) is None}
    tables = {key: schema["properties"][key] for key in ("rows", "quick")}
    parts = [INTRODUCTION, heading("The run", ""), table(plain, definitions), heading("A table", ""), table(tables, definitions)]
    for key, value in top.items():
        section = section_of(value)
        if section is not None:
            parts += [
                heading(f"`{key}`", definitions[section].get("description", "")),
                table(definitions[section]["properties"], definitions),
            ]
    parts.append(heading("`method`", METHOD))
    for name in sorted(key.removeprefix("method.") for key in definitions if key.startswith("method.")):
        options = definitions[f"method.{name}"]
        own = {key: value for key, value in options["properties"].items() if key != "name"}
        parts += [
            heading(f"`method: {name}`", options.get("description", ""), level=3),
            table(own, definitions) if own else "No options.\n",
        ]
    return "\n".join(parts)


def section_of(value: dict[str, Any]) -> str | None:
    """Return the name of the section that a top key holds, or None for a plain value."""
    for option in (value, *value.get("anyOf", [])):
        name = option.get("$ref", "").rpartition("/")[2]
        if name:
            return str(name)
    return None


def heading(title: str, text: str, level: int = 2) -> str:
    """Return a heading and the sentence below it."""
    return f"{'#' * level} {title}\n\n{' '.join(text.split())}\n" if text else f"{'#' * level} {title}\n"


def table(properties: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a table of keys, a row each."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, value in properties.items():
        default = "required" if "default" not in value else f"`{written(value['default'])}`"
        cells = (f"`{key}`", values(value, definitions), default, " ".join(value.get("description", "").split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def values(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return in words which values a key takes."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(values(option, definitions) for option in value["anyOf"]))
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return "{" + ", ".join(f"{key}: …" for key in definitions[name].get("properties", {})) + "}"
    if "const" in value:
        return f"`{written(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{written(option)}`" for option in value["enum"])
    return of_type(value, value.get("type", "any"), definitions)


def of_type(value: dict[str, Any], kind: str, definitions: dict[str, Any]) -> str:
    """Return in words the values of a JSON type, with their bounds."""
    if kind == "array":
        return f"list of {values(value.get('items', {}), definitions)}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping to {values(inner, definitions)}" if isinstance(inner, dict) else "mapping"
    bounds = [text.format("2^31" if value[key] == 2**31 else f"{value[key]:g}") for key, text in BOUNDS.items() if key in value]
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
    return " ".join([names.get(str(kind), str(kind)), *bounds])


def written(value: Any) -> str:
    """Return a value as YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
