"""`task.json` of an export: the language its prompts understand, so that they can be used without the run that trained them.

    {"format": 1, "backbone": {...}, "tokenizer_sha256": "...", "text_form": {...}, "predict": "map", "prompts": ["."],
     "evaluated": "map", "tasks": [{...}]}

`prompts` are the folders of the prompts that an answer averages over, relative to the file: one for `map`, several for `ensemble`,
none where what is stored is no soft prompt. `text_form` says how this kind of backbone reads a text and its answer. Each of `tasks`
says how a row becomes text (`template`), which answers there are, how long text and answer may be, and how the answer is found.
What is written here words the training rows too: `tasks/text_to_text.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout
from bpt_dist.storage.files import decode_json
from bpt_dist.tasks import text_to_text
from bpt_dist.tasks.schema import DIALECT
from bpt_dist.tasks.spec import Decoding, Kind, Protocol, TaskSpec
from bpt_dist.tasks.text_to_text import ENCODED, TextForm
from bpt_dist.tasks.writings import ALSO_READ, WRITINGS

if TYPE_CHECKING:
    from bpt_dist.config import EvaluationConfig

SHA256 = r"^[0-9a-f]{64}$"
# A folder below that of the file: it can neither leave it nor hide in it.
FOLDER = r"^(\.|[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*)$"
SHOWN = 10  # problems of one file
AGAIN = "export its run again with `bpt-dist export RUN`"


Predict = Literal["map", "ensemble", "best"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Slot(_Part):
    """A place of the text that a row fills."""

    column: str = Field(min_length=1, description="The column of the row; dots lead into nested objects.")
    written: str = Field(pattern=f"^({'|'.join(WRITINGS)})$", description="How the column becomes text.")


def _kind_of(piece: Any) -> str:
    return "words" if isinstance(piece, str) else "slot"


# With a tag for each an error names the one that is meant.
Piece = Annotated[Annotated[str, Tag("words")] | Annotated[Slot, Tag("slot")], Discriminator(_kind_of)]


class TaskEntry(_Part):
    """What a prompt must be told of one task."""

    name: str = Field(min_length=1, description="The name of the task.")
    kind: Kind = Field(description="What the answers are.")
    protocol: Protocol = Field(description="Whose wording the template repeats: ours, or that of the published code.")
    template: tuple[Piece, ...] = Field(
        description="The text: printed words, and places that columns of the row fill, joined by single blanks."
    )
    fields: tuple[str, ...] = Field(description="The columns a row must have.")
    label_words: tuple[str, ...] = Field(description="The possible answers; empty for free text.")
    labels: tuple[bool | int | str, ...] | None = Field(
        default=None,
        description="How rows write the class of each label word, in the order of `label_words`; null where a row has no class, "
        "and in files of earlier versions.",
    )
    decode: Decoding = Field(
        description="`rank`: the label word with the highest log-likelihood, summed over its tokens. `generate`: greedy decoding."
    )
    max_source_length: int = Field(ge=2, description="Tokens a text is cut to, with the token it begins or ends with.")
    max_new_tokens: int = Field(ge=1, description="Tokens that are generated at most.")
    empty_text: Literal["keep", "refuse"] = Field(description="What happens to a row with an empty text.")
    task_id: int | None = Field(default=None, ge=0, description="The task's number in a multi-task prompt.")

    @model_validator(mode="after")
    def _agrees(self) -> TaskEntry:
        needed = _columns(self.pieces)
        if not needed:
            raise ValueError("template: reads no column")
        if set(self.fields) != set(needed):
            raise ValueError(f"fields: should be those of the template, {', '.join(needed)} (got {', '.join(self.fields)})")
        if self.decode == "rank" and not self.label_words:
            raise ValueError("label_words: is empty, decode rank compares them")
        if len(set(self.label_words)) < len(self.label_words):
            raise ValueError("label_words: holds a word twice")
        if self.labels is not None and len(self.labels) != len(self.label_words):
            raise ValueError(f"labels: should be one for each of {len(self.label_words)} label words (got {len(self.labels)})")
        return self

    @property
    def pieces(self) -> text_to_text.Template:
        """The template as the training rows use it."""
        return tuple(p if isinstance(p, str) else text_to_text.Slot(p.column, p.written) for p in self.template)

    def label_of(self, word: str) -> bool | int | str | None:
        """Return how rows write the class of an answer, None where that is not known."""
        if self.labels is None or word not in self.label_words:
            return None
        return self.labels[self.label_words.index(word)]

    @classmethod
    def of(
        cls,
        spec: TaskSpec,
        protocol: Protocol,
        evaluation: EvaluationConfig,
        max_source_length: int | None,
        tokenizer: Any,
        form: TextForm = ENCODED,
    ) -> TaskEntry:
        """Return the entry of a task as a run reads and evaluates it; `max_source_length` is `data.max_source_length`."""
        from bpt_dist.data.tokens import encode_answers, plain_encoder

        words = spec.words(protocol)
        pieces = text_to_text.template(spec, protocol)
        ids = encode_answers(plain_encoder(tokenizer, form), words, int(tokenizer.eos_token_id), form)
        return cls(
            name=spec.name,
            kind=spec.kind,
            protocol=protocol,
            template=tuple(p if isinstance(p, str) else Slot(column=p.column, written=p.written) for p in pieces),
            fields=_columns(pieces),
            label_words=words,
            # The choices of a row have labels of its own, and scores are words themselves.
            labels=spec.label_values if spec.kind == "classification" else None,
            decode=spec.decoding(protocol, evaluation.decode),
            max_source_length=max_source_length or spec.max_source_length,
            max_new_tokens=evaluation.max_new_tokens or max(map(len, ids), default=0) or spec.max_target_length,
            empty_text="keep" if spec.empty_texts == "keep" else "refuse",
        )


class BackboneEntry(_Part):
    """The frozen model the prompts belong to."""

    path: str = Field(min_length=1, description="Folder or hub id, as `from_pretrained` takes it.")
    revision: str | None = Field(description="Revision of the hub.")
    sha256: str = Field(pattern=SHA256, description="SHA-256 over the files of its weights.")
    dtype: Literal["fp32", "bf16"] = Field(description="Type of the weights when the prompts were trained and measured.")
    kind: Literal["encoder-decoder", "decoder-only"] = Field(description="What kind of model it is.")

    @classmethod
    def of(cls, form: TextForm, path: str, revision: str | None, sha256: str, dtype: Literal["fp32", "bf16"]) -> BackboneEntry:
        """Return the entry of a backbone whose texts have that form."""
        kind: Literal["encoder-decoder", "decoder-only"] = "decoder-only" if form.continues else "encoder-decoder"
        return cls(path=path, revision=revision, sha256=sha256, dtype=dtype, kind=kind)


class FormEntry(_Part):
    """How the backbone reads a text and its answer."""

    kind: Literal["text-to-text", "continuation"] = Field(
        description="`text-to-text`: the encoder reads the text to its end token, the decoder begins the answer. `continuation`: "
        "the answer goes on in the sequence of the text, behind which there is no end token."
    )
    start: int | None = Field(ge=0, description="The id that every text begins with; null where there is none.")
    before_answer: Literal["", " "] = Field(description="What an answer or a label word has before it when it becomes tokens.")

    @classmethod
    def of(cls, form: TextForm, tokenizer: Any) -> FormEntry:
        """Return the entry of a backbone's `text_form`."""
        from bpt_dist.data.tokens import before_answer, plain_encoder

        kind: Literal["text-to-text", "continuation"] = "continuation" if form.continues else "text-to-text"
        return cls(kind=kind, start=form.start, before_answer=before_answer(plain_encoder(tokenizer, form), form))  # type: ignore[arg-type]


class TaskRecord(_Part):
    """The whole file."""

    format: Literal[1] = Field(description="Version of this format.")
    written_by: str = Field(description="Program and version.")
    backbone: BackboneEntry
    tokenizer_sha256: str = Field(pattern=SHA256, description="SHA-256 over the vocabulary.")
    text_form: FormEntry
    predict: Predict = Field(
        description="`map`: one prompt. `ensemble`: the mean over the distributions of several. `best`: the adapted particle with "
        "the best validation score."
    )
    prompts: tuple[Annotated[str, Field(pattern=FOLDER)], ...] = Field(description="Folders of the prompts, relative to this file.")
    evaluated: Predict = Field(description="`evaluation.predict` of the run: what it measured beside the MAP prompt.")
    tasks: tuple[TaskEntry, ...] = Field(description="The tasks the prompts serve.")

    @model_validator(mode="after")
    def _agrees(self) -> TaskRecord:
        if self.predict != "ensemble" and len(self.prompts) > 1:
            raise ValueError(f"prompts: should be one folder with predict {self.predict} (got {len(self.prompts)})")
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("tasks: is empty")
        if len(set(names)) < len(names):
            raise ValueError("tasks: holds a name twice")
        expected = {"encoder-decoder": "text-to-text", "decoder-only": "continuation"}[self.backbone.kind]
        if self.text_form.kind != expected:
            raise ValueError(f"text_form.kind: should be {expected} for a backbone that is {self.backbone.kind}")
        if expected == "text-to-text" and (self.text_form.start is not None or self.text_form.before_answer):
            raise ValueError("text_form: should have start null and before_answer '' with kind text-to-text")
        return self

    @classmethod
    def of(
        cls,
        backbone: BackboneEntry,
        tokenizer_sha256: str,
        text_form: FormEntry,
        tasks: Iterable[TaskEntry],
        evaluated: Predict = "map",
    ) -> TaskRecord:
        """Return the record of one prompt for `tasks`, in the folder of the file."""
        return cls(
            format=1,
            written_by=_program(),
            backbone=backbone,
            tokenizer_sha256=tokenizer_sha256,
            text_form=text_form,
            predict="map",
            prompts=(".",),
            evaluated=evaluated,
            tasks=tuple(tasks),
        )

    def with_prompts(self, folders: Sequence[str], predict: Predict = "map") -> TaskRecord:
        """Return the same language for other prompts."""
        return self.model_copy(update={"prompts": tuple(folders), "predict": predict})

    def with_task_ids(self) -> TaskRecord:
        """Return the record of one multi-task prompt, whose tasks are numbered in their order."""
        return self.model_copy(
            update={"tasks": tuple(task.model_copy(update={"task_id": number}) for number, task in enumerate(self.tasks))}
        )

    def as_json(self) -> dict[str, Any]:
        """Return what `task.json` holds."""
        return self.model_dump(mode="json")


def read_record(folder: Path) -> TaskRecord:
    """Read the `task.json` of an export. Raises ConfigError with every problem of the file, or where to get one."""
    file = folder / layout.TASK_RECORD
    if not file.is_file():
        raise ConfigError(
            f"{folder}: has no {layout.TASK_RECORD}, which says how its texts are worded; it was exported by an earlier version or "
            f"another program: {AGAIN}"
        )
    try:
        data = file.read_bytes()  # through a link, too: the hub's cache is made of them
        decode_json(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); {AGAIN}") from error
    try:
        return TaskRecord.model_validate_json(data)
    except ValidationError as error:
        problems = [_problem(entry) for entry in error.errors()]
        rest = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n  ".join([*problems[:SHOWN], *rest])
        raise ConfigError(f"{file}: is damaged or of another version; {AGAIN}:\n  {lines}") from error


def record_schema() -> dict[str, Any]:
    """Return the JSON schema of `task.json`."""
    return {"$schema": DIALECT, **TaskRecord.model_json_schema(), "title": "The task.json of an exported prompt"}


def _program() -> str:
    try:
        return f"bpt_dist {version('bpt_dist')}"
    except PackageNotFoundError:  # used from a checkout that is not installed
        return "bpt_dist"


def _problem(entry: Any) -> str:
    """Return a problem of pydantic's as `tasks[0].decode: what (got value)`."""
    place = ""
    for part in entry["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in ("words", "slot"):  # the tags of a union
            place += f".{part}" if place else part
    given = "" if entry["type"] in ("missing", "value_error") else f" (got {str(entry['input'])[:60]!r})"
    return f"{place or 'the file'}: {entry['msg'].removeprefix('Value error, ')}{given}"


def _columns(pieces: text_to_text.Template) -> tuple[str, ...]:
    """Return the columns that a template reads, each once."""
    slots = [piece for piece in pieces if isinstance(piece, text_to_text.Slot)]
    return tuple(dict.fromkeys(name for slot in slots for name in (slot.column, *ALSO_READ.get(slot.written, ()))))
