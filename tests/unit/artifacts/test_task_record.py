"""`task.json`: worded as the training rows are, described by a schema, refused where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_t5

from bpt_dist.artifacts.task_record import BackboneEntry, FormEntry, TaskEntry, TaskRecord, read_record, record_schema
from bpt_dist.backbones.loading import load_tokenizer
from bpt_dist.config import EvaluationConfig
from bpt_dist.config.schema import text_of
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.text_to_text import ENCODED, ROW_ID, render, written
from bpt_dist.tasks.user_tasks import load_user_tasks

ODD = "It's <b>odd</b>.<br>Yes.\n@highlight\nReally"  # what each form rewrites
SCHEMA = Path(__file__).parents[3] / "configs" / "export.schema.json"


def sample_row(task: str) -> dict[str, Any]:
    """Return a row of a published task."""
    spec = TASKS[task]
    row: dict[str, Any] = {field.column: f"{ODD} {number}" for number, field in enumerate(spec.fields)}
    if spec.form == "wsc":
        row = {"text": "Ann told Ann that she won", "span1_text": "Ann", "span1_index": 2, "span2_text": "she", "span2_index": 4}
    if spec.form == "record":
        row |= {"entities": ["one", "two"]}
    if spec.form == "choices":
        row |= {"choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
    answers = {"squad": {"answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, "record": {"answers": ["one"]}}
    row |= answers.get(spec.form, {})
    if spec.kind in ("classification", "regression"):
        row[spec.target_column] = spec.label_values[0] if spec.label_values else 1.2
    return {**row, "idx": {"question": 3}} if spec.group_column else row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tiny_t5.make(tmp_path_factory.mktemp("t5"))))[0]


@pytest.fixture
def record(tokenizer: Any, tmp_path: Path) -> TaskRecord:
    file = tmp_path / "tasks.yaml"
    file.write_text("mood: {folder: m, fields: [sentence], label: y, label_words: [good, not good], metrics: [accuracy]}\n")
    entry = TaskEntry.of(load_user_tasks([file])["mood"], "fixed", EvaluationConfig(), None, tokenizer)
    backbone = BackboneEntry.of(ENCODED, "t5", None, "a" * 64, "fp32")
    return TaskRecord.of(backbone, "b" * 64, FormEntry.of(ENCODED, tokenizer), [entry])


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "task.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("protocol", ["fixed", "attempt"])
@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_stored_template_words_a_row_as_training_does(tokenizer: Any, tmp_path: Path, task: str, protocol: Any) -> None:
    entry = TaskEntry.of(TASKS[task], protocol, EvaluationConfig(), None, tokenizer)
    stored = TaskEntry.model_validate_json(json.dumps(entry.model_dump(mode="json")))
    row = sample_row(task)
    (example, *_) = render(TASKS[task], {**row, ROW_ID: "test:1"}, protocol, evaluation=True)
    assert written(stored.pieces, row) == example.source
    assert all(name.split(".")[0] in row for name in stored.fields)
    assert stored.label_words == TASKS[task].words(protocol)
    if TASKS[task].kind == "classification":
        assert stored.label_of(example.target) == row[TASKS[task].target_column]
    else:
        assert stored.labels is None


def test_a_record_is_read_as_it_was_written_and_fits_the_schema(record: TaskRecord, tmp_path: Path) -> None:
    assert read_record(write(tmp_path / "export", record.as_json())) == record
    jsonschema.validate(record.as_json(), json.loads(SCHEMA.read_text()))
    (task,) = record.tasks
    assert (task.decode, task.max_source_length, task.max_new_tokens) == ("rank", 256, 3)
    assert task.template[:2] == ("mood", "sentence:")


def test_labels_keep_their_types_and_a_file_of_an_earlier_version_has_none(record: TaskRecord, tmp_path: Path) -> None:
    for labels in ([0, 1], ["0", "1"], [False, True]):
        (task,) = read_record(write(tmp_path / "new", changed(record, "tasks.0.labels", labels))).tasks
        found = task.label_of("not good")
        assert (type(found), found) == (type(labels[1]), labels[1])
        assert task.label_of("bad") is None
    (task,) = read_record(write(tmp_path / "old", changed(record, "tasks.0.labels", ...))).tasks
    assert task.label_of("good") is None


def test_the_schema_is_current() -> None:
    assert SCHEMA.read_text() == text_of(record_schema()), "run: make schema"


def changed(record: TaskRecord, path: str, value: Any) -> dict[str, Any]:
    """Return the file with another value at `tasks.0.decode`, or without that key where the value is `...`."""
    content: Any = record.as_json()
    *inner, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in inner:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("format", 2, "format: Input should be 1"),
        ("tasks.0.decode", "sample", "tasks[0].decode: Input should be 'rank' or 'generate' (got 'sample')"),
        ("tasks.0.max_source_length", "256", "tasks[0].max_source_length: Input should be a valid integer"),
        ("tasks.0.template", ..., "tasks[0].template: Field required"),
        ("tasks.0.template.2.written", "upper", "tasks[0].template[2].written: String should match pattern '^(plain|padded"),
        ("tasks.0.fields", ["text"], "tasks[0]: fields: should be those of the template, sentence (got text)"),
        ("tasks.0.label_words", [], "tasks[0]: label_words: is empty, decode rank compares them"),
        ("tasks.0.labels", [0], "tasks[0]: labels: should be one for each of 2 label words (got 1)"),
        ("tasks.0.labels", [0, 1.5], "tasks[0].labels[1]"),
        ("tasks", [], "the file: tasks: is empty"),
        ("backbone.sha256", "xyz", "backbone.sha256: String should match pattern"),
        ("prompts", ["../elsewhere"], "prompts[0]: String should match pattern"),
        ("prompts", ["00", "01"], "the file: prompts: should be one folder with predict map (got 2)"),
        ("text_form", ..., "text_form: Field required"),
        ("text_form.kind", "continuation", "text_form.kind: should be text-to-text for a backbone that is encoder-decoder"),
        ("text_form.start", 3, "text_form: should have start null and before_answer '' with kind text-to-text"),
        ("backbone.kind", "encoder", "backbone.kind: Input should be 'encoder-decoder' or 'decoder-only' (got 'encoder')"),
        ("evaluated", "mean", "evaluated: Input should be 'map', 'ensemble' or 'best' (got 'mean')"),
        ("more", 1, "more: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(record: TaskRecord, tmp_path: Path, path: str, value: Any, what: str) -> None:
    folder = write(tmp_path / "export", changed(record, path, value))
    with pytest.raises(ConfigError) as refused:
        read_record(folder)
    assert what in str(refused.value)
    assert "task.json: is damaged or of another version; export its run again with `bpt-dist export RUN`" in str(refused.value)


@pytest.mark.parametrize("content", ["", '{"format": 1', '{"format": 1, "format": 1}', "[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.json: cannot be read .*; export its run again"):
        read_record(write(tmp_path / "export", content))
