"""The JSON schema by which editors complete and check configurations: `python -m bpt_dist.config.schema` writes it.

Task files have theirs in `tasks/schema.py`, sweep files in `commands/sweep/schema.py`; `bpt-dist schema --of KIND` writes any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bpt_dist.config.method_source import METHODS, method_names, method_options
from bpt_dist.config.own_method import KEY as PATH
from bpt_dist.config.own_method import OwnMethod
from bpt_dist.config.sections import RunConfig
from bpt_dist.tasks.schema import DIALECT

SCHEMA = Path(__file__).parents[2] / "configs" / "schema.json"


def json_schema(methods: Path = METHODS) -> dict[str, Any]:
    """Return the JSON schema of a configuration file for editors, with the options of every method."""
    schema = RunConfig.model_json_schema()
    schema["properties"]["method"] = method_schema(schema["$defs"], methods)
    path = {"type": "string", "description": "Short for `backbone: {path: ...}`."}
    schema["properties"]["backbone"] = {"anyOf": [path, {"$ref": "#/$defs/BackboneConfig"}]}
    return {"$schema": DIALECT, **schema}


def method_schema(definitions: dict[str, Any], methods: Path = METHODS) -> dict[str, Any]:
    """Return the schema of the section `method`, whose `name` decides which options there are; `definitions` gets theirs.

    With `if` and `then` an editor complains about the one wrong option, not that none of all the methods fits.
    """
    names = method_names(methods)
    branches: list[dict[str, Any]] = []
    for name in names:
        options = method_options(name, methods).model_json_schema(ref_template="#/$defs/" + name + ".{model}")
        definitions |= {f"{name}.{key}": value for key, value in options.pop("$defs", {}).items()}
        definitions[f"method.{name}"] = options
        chosen = {"type": "object", "properties": {"name": {"const": name}}, "required": ["name"]}
        branches.append({"if": chosen, "then": {"$ref": f"#/$defs/method.{name}"}})
    short = {"type": "string", "enum": names}
    known = {"type": "object", "properties": {"name": {"enum": names}}, "required": ["name"]}
    # The options of a file outside the package are known to that file alone.
    path = {"type": "string", "pattern": r"\.py$", "description": OwnMethod.model_fields[PATH].description}
    own = {"type": "object", "properties": {"name": {"type": "string", "not": {"enum": names}}, PATH: path}}
    given = {"type": "object", "required": [PATH]}
    return {
        "description": "The method and its options, or only its name; `path` is the file of a method outside the package.",
        "type": ["string", "object"],
        "allOf": [{"if": {"type": "string"}, "then": short, "else": {"if": given, "then": own, "else": known}}, *branches],
    }


def text_of(schema: dict[str, Any]) -> str:
    """Return the content of the file of a schema."""
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def schema_text() -> str:
    """Return the content of `configs/schema.json`."""
    return text_of(json_schema())


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
