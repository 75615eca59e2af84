"""The JSON schema by which editors complete and check a sweep file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bpt_dist.commands.sweep.settings import OF_THE_SWEEP, Settings
from bpt_dist.commands.sweep.space import BOUNDS, RANGES
from bpt_dist.config.method_source import METHODS
from bpt_dist.config.schema import json_schema

PLAIN = {"type": ["number", "string", "boolean", "null"]}


def sweep_schema(methods: Path = METHODS) -> dict[str, Any]:
    """Return the schema: the keys of the sweep, those of a run below `run`, and lists or ranges below `space`."""
    run = json_schema(methods)
    schema = Settings.model_json_schema()
    schema["$defs"] = {**schema.get("$defs", {}), **run.pop("$defs")}
    properties = {key: value for key, value in run["properties"].items() if key not in OF_THE_SWEEP}
    schema["properties"]["run"] |= {"properties": properties, "required": ["method"], "additionalProperties": False}
    schema["properties"]["space"] |= {"additionalProperties": {"anyOf": [_choices(), *map(_range, RANGES)]}, "minProperties": 1}
    return {"$schema": run["$schema"], **schema}


def _choices() -> dict[str, Any]:
    return {"type": "array", "items": PLAIN, "minItems": 1, "uniqueItems": True}


def _range(kind: str) -> dict[str, Any]:
    bounds = {"type": "array", "items": {"type": "number"}, "minItems": BOUNDS, "maxItems": BOUNDS}
    points = {"type": "integer", "minimum": 2, "description": "So many values between the bounds make a grid."}
    return {
        "type": "object",
        "properties": {kind: bounds, "points": points},
        "required": [kind],
        "additionalProperties": False,
    }
