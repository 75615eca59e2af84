"""What OpenAPI says about the routes; the requests themselves are read by `limits.py`."""

from __future__ import annotations

from typing import Any

from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from bpt_dist.artifacts.inference.exports import Export

VERSION = "1"
TEXT = (
    "Rows of any tasks, each answered under the prompt of its task on one frozen model. Rows, answers and errors are those of "
    "`bpt-dist predict`."
)


class ErrorEntry(BaseModel):
    """Why there is no answer."""

    kind: str = Field(description="`row`, `task`, `fields` or `internal` for a row; others for a whole request.")
    message: str = Field(description="What is wrong, and what to change.")


class Refusal(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorEntry


class Truncated(BaseModel):
    """The lengths of a text that was cut as in training."""

    tokens: int
    kept: int


class AnswerEntry(BaseModel):
    """The answer to one row: a prediction or an error."""

    id: Any = Field(default=None, description="The `id` of the row.")
    task: str | None = None
    prediction: str | None = Field(default=None, description="The label word, or the text that was written.")
    label: bool | int | str | None = Field(default=None, description="What rows write for it, where the export knows that.")
    probabilities: dict[str, float] | None = Field(default=None, description="Of the label words, where the task ranks them.")
    agreement: float | None = Field(default=None, description="Of an ensemble: the share of pairs of prompts that agree.")
    truncated: Truncated | None = None
    error: ErrorEntry | None = None


class TaskDescription(BaseModel):
    """A task that is served."""

    name: str
    kind: str
    fields: list[str] = Field(description="The columns a row must have.")
    label_words: list[str] = Field(description="The possible answers; empty for free text.")
    labels: list[bool | int | str] | None = Field(description="What rows write for each label word; null where that is not known.")
    decode: str = Field(description="`rank` or `generate`.")
    predict: str = Field(description="`map`, or `ensemble` of several prompts.")
    max_source_length: int = Field(description="Tokens a text is cut to.")


class Health(BaseModel):
    """Whether rows are answered."""

    status: str
    tasks: int
    waiting: int


def task_of(export: Export) -> dict[str, Any]:
    """Return the description of a task."""
    task = export.task
    return TaskDescription(
        name=export.name,
        kind=task.kind,
        fields=list(task.fields),
        label_words=list(task.label_words),
        labels=None if task.labels is None else list(task.labels),
        decode=task.decode,
        predict=export.record.predict,
        max_source_length=task.max_source_length,
    ).model_dump()


ROW = {
    "type": "object",
    "description": "The columns of the task, here or in `fields`; `task` may be left out where one task is served.",
    "properties": {"task": {"type": "string"}, "id": {}, "fields": {"type": "object"}},
    "additionalProperties": True,
}
BODY = {"required": True, "content": {"application/json": {"schema": {"oneOf": [ROW, {"type": "array", "items": ROW}]}}}}
FOLDER = {
    "type": "object",
    "properties": {"folder": {"type": "string", "description": "The export, below the root of the exports."}},
    "required": ["folder"],
    "additionalProperties": False,
}


def _refusals(**texts: str) -> dict[int | str, dict[str, Any]]:
    return {int(status.removeprefix("s")): {"model": Refusal, "description": text} for status, text in texts.items()}


ALWAYS = _refusals(s401="The token is missing or wrong.", s403="The host is another, or loading is off.")
READ = _refusals(s400="Not JSON.", s408="The body is too slow.", s413="Too many bytes or rows.", s415="Not JSON by its header.")
PREDICT: dict[str, Any] = {
    "response_model": AnswerEntry | list[AnswerEntry],
    "openapi_extra": {"requestBody": BODY},
    "responses": ALWAYS
    | READ
    | {status: {"model": AnswerEntry, "description": text} for status, text in ((404, "No such task."), (422, "A bad row."))}
    | _refusals(s429="The queue is full; see `Retry-After`.", s503="The server stops."),
}
TASKS: dict[str, Any] = {"response_model": list[TaskDescription], "responses": ALWAYS}
TASK: dict[str, Any] = {"response_model": TaskDescription, "responses": ALWAYS | _refusals(s404="No such task.")}
LOAD: dict[str, Any] = {
    "response_model": TaskDescription,
    "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": FOLDER}}}},
    "responses": ALWAYS
    | READ
    | {201: {"model": TaskDescription, "description": "Served from now on; 200 where it replaces another."}}
    | _refusals(s404="No such folder.", s409="The export cannot be served here.", s422="A bad name or body."),
}
REMOVE: dict[str, Any] = {"status_code": 204, "response_model": None, "responses": ALWAYS | _refusals(s404="No such task.")}
HEALTH: dict[str, Any] = {"response_model": Health, "responses": {503: {"model": Health, "description": "Nothing is answered."}}}
METRICS: dict[str, Any] = {
    "response_class": PlainTextResponse,
    "responses": ALWAYS,
}
