"""The JSON schema by which editors complete and check a file of tasks, `data.task_files`."""

from __future__ import annotations

from typing import Any, get_args

from bpt_dist.tasks.spec import METRICS_OF_KIND, EmptyText, SplitKind, Unlabelled
from bpt_dist.tasks.user_tasks import COLUMN, KEYS, LENGTHS, NAME

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TEXT = {"type": "string", "minLength": 1}
COLUMN_NAME = {"type": "string", "pattern": f"^(?:{COLUMN.pattern})$"}
TOKENS = {"type": "integer", "minimum": LENGTHS.start, "maximum": LENGTHS.stop - 1}
METRICS = sorted({metric for names in METRICS_OF_KIND.values() for metric in names})
WORDS_BY_COLUMN = {
    "type": "object", "propertyNames": COLUMN_NAME, "additionalProperties": {"type": ["string", "null"]}, "minProperties": 1
}  # fmt: skip
# What each key of a task means, and which values it takes.
DESCRIBED: dict[str, tuple[str, dict[str, Any]]] = {
    "summary": ("Half a sentence about the task, for `bpt-dist tasks`.", TEXT),
    "folder": ("Holds train.jsonl, validation.jsonl and perhaps test.jsonl; relative to this file.", TEXT),
    "hub": ("A data set of the hub: owner/name.", TEXT),
    "config": ("The configuration of the data set of the hub.", TEXT),
    "fields": (
        "The columns of the source text in their order; {column: words} prints other words before a column.",
        {"anyOf": [{"type": "array", "items": COLUMN_NAME, "minItems": 1}, WORDS_BY_COLUMN]},
    ),
    "label": ("The column of the class, or of the score.", COLUMN_NAME),
    "label_words": (
        "The target text of each class, by its value in the rows; a list is for the classes 0, 1, 2 and so on.",
        {
            "anyOf": [
                {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True},
                {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 2},
            ]
        },
    ),
    "target": ("The column of the target text: a text, or a list of right answers.", COLUMN_NAME),
    "score": (
        "[low, high, step] of the scores in `label`.",
        {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
    ),
    "metrics": ("The first selects checkpoints and fills the table.", {"type": "array", "items": {"enum": METRICS}, "minItems": 1}),
    "split": ("How train, validation and test are made from the published splits.", {"enum": list(get_args(SplitKind))}),
    "id": ("The column that names a row.", TEXT),
    "group": ("The column of what rows belong together, such as a question and its answers.", TEXT),
    "max_source_length": ("Tokens a source text is cut to.", {**TOKENS, "default": 256}),
    "max_target_length": ("Tokens a target text is cut to.", {**TOKENS, "default": 128}),
    "unlabelled": ("What happens to rows without a label.", {"enum": list(get_args(Unlabelled))}),
    "empty_text": ("What happens to rows with an empty field.", {"enum": list(get_args(EmptyText))}),
}


def tasks_schema() -> dict[str, Any]:
    """Return the schema; what depends on several keys in other ways than by their presence is left to the reader of the file."""
    assert DESCRIBED.keys() == set(KEYS)
    entry = {
        "type": "object",
        "additionalProperties": False,
        "required": ["fields", "metrics"],
        "properties": {key: {"description": text, **schema} for key, (text, schema) in DESCRIBED.items()},
        "allOf": [_one_of("folder", "hub"), _one_of("label", "target")],
        "if": {"required": ["label"], "not": {"required": ["score"]}},
        "then": {"required": ["label_words"]},
    }
    return {
        "$schema": DIALECT,
        "title": "Tasks of your own, for data.task_files",
        "type": "object",
        "propertyNames": {"pattern": f"^(?:{NAME.pattern})$"},
        "additionalProperties": entry,
        "minProperties": 1,
    }


def _one_of(*keys: str) -> dict[str, Any]:
    return {"oneOf": [{"required": [key]} for key in keys]}
