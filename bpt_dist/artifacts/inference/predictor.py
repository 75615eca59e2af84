"""Answer rows of different tasks in one batch, each text under the prompt of its own task, on one frozen model."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bpt_dist.artifacts.inference.exports import Export
from bpt_dist.artifacts.task_record import FormEntry
from bpt_dist.backbones.base import Backbone, Texts
from bpt_dist.backbones.prompts import peft_config, read_prompt
from bpt_dist.data.row_checks import slot_problems
from bpt_dist.data.tokens import cut_source, encode_answers, encode_sources, plain_encoder
from bpt_dist.errors import ConfigError
from bpt_dist.storage.digest import SHORT
from bpt_dist.tasks.text_to_text import Slot, written

TASK, FIELDS, ID = "task", "fields", "id"  # what a row may hold beside the columns of its task
TOKENS_AT_ONCE = 16_384  # read in one pass, prompts and hypotheses included
PREFIX_BYTES = 512 << 20  # kept of prompts that were read, where a backbone can
WINDOW = 512  # rows that are looked at together: those of like length share a pass
SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is answered to one row: a prediction, or the `error` that made one impossible.

    `prediction` is a label word or a text, and `label` what rows write for it, where the export knows that. `kind` of an error is
    `row`, `task` or `fields`. `probabilities` are those of the label words where the task ranks; `agreement`,
    of an ensemble, is the share of pairs of prompts that predict the same. `num_tokens` is the length of a text that was cut to
    `kept_tokens`, as in training.
    """

    task: str | None = None
    prediction: str | None = None
    label: bool | int | str | None = None
    probabilities: Mapping[str, float] | None = None
    agreement: float | None = None
    num_tokens: int | None = None
    kept_tokens: int | None = None
    kind: str | None = None
    error: str | None = None
    id: Any = None

    def as_json(self) -> dict[str, Any]:
        """Return the answer as a line of `bpt-dist predict` holds it."""
        known = {ID: self.id, TASK: self.task}
        if self.error is not None:
            known["error"] = {"kind": self.kind, "message": self.error}
        else:
            known |= {"prediction": self.prediction, "label": self.label}
            known |= {"probabilities": self.probabilities, "agreement": self.agreement}
        if self.num_tokens is not None:
            known["truncated"] = {"tokens": self.num_tokens, "kept": self.kept_tokens}
        return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A prompt, ready to answer: its m hypotheses, and the ids of its label words."""

    export: Export
    hypotheses: Float[Tensor, "m P D"]
    candidates: Int[Tensor, "C U"] | None

    @property
    def num_target(self) -> int:
        """Tokens of the longest answer."""
        return self.export.task.max_new_tokens if self.candidates is None else self.candidates.shape[1]


@dataclass(frozen=True)
class Question:
    """A row that can be answered: its place, its prompt, and the ids of its text before they were cut and after."""

    place: int
    prompt: Loaded
    num_tokens: int
    ids: Sequence[int]
    id: Any

    @property
    def cost(self) -> int:
        """Positions read for all hypotheses."""
        num_hypotheses, length, _ = self.prompt.hypotheses.shape
        return num_hypotheses * (length + len(self.ids))


class Predictor:
    """Answers rows under any number of prompts of one backbone, of any lengths, ranked or generated, MAP or ensemble.

        predictor = Predictor(backbone, exports)
        predictor.predict([{"task": "mood", "sentence": "the cat sat"}, ...])   # one Answer a row, in order

    A row names its task by `task`, which may be left out where there is one prompt, and holds the columns beside it, or in an
    object `fields`. What is wrong with a row is its answer; the other rows are answered. Several threads may call it: a pass runs
    alone, and prompts that are added or removed meanwhile count from the next call on. A decoder-only model keeps what it reads of
    a prompt for the next passes, at most `prefix_bytes` (512 MiB by default, 0 for nothing).
    """

    def __init__(
        self,
        backbone: Backbone,
        exports: Iterable[Export] = (),
        *,
        tokens_at_once: int = TOKENS_AT_ONCE,
        prefix_bytes: int | None = None,
    ) -> None:
        """Serve exports. Raises ConfigError for `prefix_bytes` where the backbone reads each prompt together with its text."""
        self.backbone, self.tokens_at_once = backbone, tokens_at_once
        keeps = backbone.keep_prefixes(PREFIX_BYTES if prefix_bytes is None else prefix_bytes)
        if prefix_bytes and not keeps:
            raise ConfigError(
                f"--prefix-cache (prefix_bytes): {backbone.name} reads each prompt together with its text, and can keep nothing; "
                "leave it out"
            )
        self._prompts: dict[str, Loaded] = {}  # replaced as a whole, never changed
        self._passes, self._changes = threading.Lock(), threading.Lock()
        for export in exports:
            self.add(export)

    @property
    def tasks(self) -> dict[str, Export]:
        """Return what is served, by the name rows ask for it."""
        return {name: prompt.export for name, prompt in self._prompts.items()}

    def add(self, export: Export, *, replace: bool = False) -> None:
        """Serve one more prompt. Raises ConfigError for one of another backbone or tokenizer, and for a name that is taken."""
        loaded = self._load(export)
        with self._changes:
            if export.name in self._prompts and not replace:
                other = self._prompts[export.name].export.folder
                raise ConfigError(f"task {export.name!r}: has a prompt already, {other}; give {export.folder} another name")
            self._prompts = {**self._prompts, export.name: loaded}

    def remove(self, name: str) -> None:
        """Serve a prompt no longer. Raises ConfigError where there is none of that name."""
        with self._changes:
            if name not in self._prompts:
                raise ConfigError(f"task {name!r}: has no prompt here; name one of {_some(self._prompts)}")
            self._prompts = {other: prompt for other, prompt in self._prompts.items() if other != name}

    def predict(self, rows: Sequence[Any]) -> list[Answer]:
        """Return the answer to each row."""
        read = self._read(rows, self._prompts)
        questions = [one for one in read if isinstance(one, Question)]
        answers = {place: one for place, one in enumerate(read) if isinstance(one, Answer)}
        for found in self.passes(questions):
            answers |= found
        return [answers[place] for place in range(len(rows))]

    def read(self, rows: Sequence[Any]) -> list[Question | Answer]:
        """Return what each row asks, ready for `passes`, or the answer that says why it cannot be asked."""
        return self._read(rows, self._prompts)

    def passes(self, questions: Sequence[Question]) -> Iterator[dict[int, Answer]]:
        """Yield the answers of one pass after the other, by the places of the questions."""
        for batch in self._batches(questions):
            with self._passes, torch.no_grad():
                found = {one.place: answer for one, answer in zip(batch, self._answer(batch), strict=True)}
            yield found

    def stream(self, rows: Iterable[Any], *, window: int = WINDOW) -> Iterator[Answer]:
        """Yield the answer to each row in order, never holding more than `window` rows."""
        rows = iter(rows)
        while some := list(itertools.islice(rows, window)):
            yield from self.predict(some)

    # --- prompts --------------------------------------------------------------------------------------------------------------

    def _load(self, export: Export) -> Loaded:
        record, backbone = export.record, self.backbone
        for what, belongs, here in (
            ("backbone", record.backbone.sha256, backbone.identity),
            ("tokenizer", record.tokenizer_sha256, backbone.tokenizer_hash),
        ):
            if belongs != here:
                raise ConfigError(
                    f"{export.folder}: belongs to another {what} ({record.backbone.path}, SHA-256 {belongs[:SHORT]}; here "
                    f"{backbone.path}, {here[:SHORT]}); give its own by --backbone PATH"
                )
        if record.text_form != (own := FormEntry.of(backbone.text_form, backbone.tokenizer)):
            raise ConfigError(
                f"{export.folder}: its texts are written with {_form(record.text_form)}, those of {backbone.path} with "
                f"{_form(own)}; give the tokenizer and config.json it was trained with, by --backbone PATH"
            )
        places = [export.folder / folder for folder in record.prompts]
        if any((kind := peft_config(place).get("peft_type")) == "LORA" for place in places):
            raise ConfigError(
                f"{export.folder}: is a PEFT folder of type {kind}, no soft prompt; use `bpt-dist eval {export.folder}`"
            )
        given: dict[str, Any] = {"task": export.task.task_id, "task_type": backbone.task_type}
        prompts = [read_prompt(place, backbone.width, **given) for place in places]
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ConfigError(f"{export.folder}: its prompts differ in length; export the run again with `bpt-dist export RUN`")
        candidates = self._candidates(export) if export.task.decode == "rank" else None
        return Loaded(export, torch.stack(prompts).to(backbone.device), candidates)

    def _candidates(self, export: Export) -> Int[Tensor, "C U"]:
        """Return the ids of the label words, padded by -100."""
        tokenizer = self.backbone.tokenizer
        form = self.backbone.text_form
        ids = encode_answers(plain_encoder(tokenizer, form), export.task.label_words, int(tokenizer.eos_token_id), form)
        padded = torch.full((len(ids), max(map(len, ids))), -100, dtype=torch.long)
        for word, of_word in enumerate(ids):
            padded[word, : len(of_word)] = torch.as_tensor(of_word)
        return padded

    # --- rows -----------------------------------------------------------------------------------------------------------------

    def _read(self, rows: Sequence[Any], prompts: Mapping[str, Loaded]) -> list[Question | Answer]:
        """Return what is asked by each row, or the answer that says why it cannot be."""
        read: list[Question | Answer | None] = []
        texts: list[tuple[int, Loaded, str, Any]] = []
        for place, row in enumerate(rows):
            found = _look_at(row, prompts)
            read.append(found if isinstance(found, Answer) else None)
            if not isinstance(found, Answer):
                prompt, fields = found
                texts.append((place, prompt, written(prompt.export.task.pieces, fields), row.get(ID)))
        tokenizer, form = self.backbone.tokenizer, self.backbone.text_form
        plain = [text for _, _, text, _ in texts]
        ids = encode_sources(plain_encoder(tokenizer, form), plain, int(tokenizer.eos_token_id), form) if texts else ()
        for (place, prompt, _, name), of_text in zip(texts, ids, strict=True):
            kept = cut_source(of_text, prompt.export.task.max_source_length, form).tolist()
            read[place] = self._fitting(Question(place, prompt, len(of_text), kept, name))
        return [one for one in read if one is not None]

    def _fitting(self, question: Question) -> Question | Answer:
        """Return the question, or why prompt, text and answer have more positions than the backbone."""
        most, prompt = self.backbone.max_positions, question.prompt
        num_prompt, num_source = prompt.hypotheses.shape[1], len(question.ids)
        if most is None or num_prompt + num_source + prompt.num_target <= most:
            return question
        error = (
            f"the text has {num_source} tokens, which with {num_prompt} prompt positions and {prompt.num_target} of the answer are "
            f"more than the {most} positions of the backbone; shorten it to {max(most - num_prompt - prompt.num_target, 0)} tokens"
        )
        return Answer(task=prompt.export.name, kind="fields", error=error, id=question.id)

    def _batches(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Yield questions that share a pass: decoded alike, with as many hypotheses, the longest first."""
        alike: dict[tuple[bool, int], list[Question]] = {}
        for one in questions:
            alike.setdefault((one.prompt.candidates is None, len(one.prompt.hypotheses)), []).append(one)
        for group in alike.values():
            batch: list[Question] = []
            left = self.tokens_at_once
            for one in sorted(group, key=lambda one: -one.cost):
                cost = one.cost
                if batch and cost > left:
                    yield batch
                    batch, left = [], self.tokens_at_once
                batch.append(one)
                left -= cost
            yield batch

    # --- passes ---------------------------------------------------------------------------------------------------------------

    def _answer(self, batch: Sequence[Question]) -> Iterator[Answer]:
        """Yield the answers to questions that share a pass."""
        texts, prompts = Texts.of([one.ids for one in batch]), [one.prompt.hypotheses for one in batch]
        candidates = [one.prompt.candidates for one in batch if one.prompt.candidates is not None]
        if not candidates:
            limits = [one.prompt.export.task.max_new_tokens for one in batch]
            targets = self.backbone.generate_each(texts, prompts, limits)
            yield from (_answer_to(one, prediction=text.strip()) for one, text in zip(batch, targets, strict=True))
            return
        for one, log_likelihood in zip(batch, self.backbone.rank_each(texts, prompts, candidates), strict=True):
            words = one.prompt.export.task.label_words
            # Probabilities are averaged, not their logarithms: the predictive distribution of the ensemble.
            probabilities = log_likelihood.double().softmax(-1).mean(0).tolist()
            best = max(range(len(words)), key=probabilities.__getitem__)
            agreement = _agreement(log_likelihood) if len(log_likelihood) > 1 else None
            shares = dict(zip(words, probabilities, strict=True))
            yield _answer_to(one, prediction=words[best], probabilities=shares, agreement=agreement)


def _answer_to(question: Question, prediction: str, **found: Any) -> Answer:
    cut = len(question.ids) < question.num_tokens
    lengths: dict[str, Any] = {"num_tokens": question.num_tokens, "kept_tokens": len(question.ids)} if cut else {}
    export = question.prompt.export
    label = export.task.label_of(prediction)
    return Answer(task=export.name, id=question.id, prediction=prediction, label=label, **lengths, **found)


def _look_at(row: Any, prompts: Mapping[str, Loaded]) -> tuple[Loaded, dict[str, Any]] | Answer:
    """Return the prompt of a row and its columns, or what is wrong with it."""
    if not isinstance(row, dict):
        return Answer(
            kind="row", error=f"a row must be an object, this is {type(row).__name__}; give the columns of a task by name"
        )
    name, own = row.get(TASK), row.get(ID)
    if not _can_be_repeated(own):
        return Answer(
            kind="row",
            error=f"`{ID}` holds half a surrogate pair or a number out of range, which no answer can repeat; give another",
        )
    only = next(iter(prompts.values())) if len(prompts) == 1 else None
    # A column of the only task may have the name of ours.
    if only is not None and (name is None or (TASK in only.export.task.fields and not isinstance(row.get(FIELDS), dict))):
        name = only.export.name
    if not isinstance(name, str) or name not in prompts:
        what = "names no task" if name is None else f"task {str(name)[:SHOWN]!r} is not known here"
        return Answer(kind="task", error=f"{what}; set `task` to one of {_some(prompts)}", id=own)
    prompt = prompts[name]
    fields = row[FIELDS] if isinstance(row.get(FIELDS), dict) else row
    task = prompt.export.task
    slots = [piece for piece in task.pieces if isinstance(piece, Slot)]
    found = [what for slot in slots for what in slot_problems(slot, fields, may_be_empty=task.empty_text == "keep")]
    if found:
        problems = "; ".join(dict.fromkeys(found))
        return Answer(task=name, kind="fields", error=f"{problems}; task {name!r} reads {', '.join(task.fields)}", id=own)
    return prompt, fields


def _can_be_repeated(value: Any) -> bool:
    """Return whether a value can be written as JSON: `1e999` and half a surrogate pair can be read, but not written."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _form(entry: FormEntry) -> str:
    start = "no start token" if entry.start is None else f"start token {entry.start}"
    return f"{start} and {entry.before_answer!r} before the answer"


def _agreement(log_likelihood: Float[Tensor, "m C"]) -> float:
    """Return the share of the pairs of hypotheses whose likeliest candidate is the same."""
    num_hypotheses, num_candidates = log_likelihood.shape
    votes = functional.one_hot(log_likelihood.argmax(dim=-1), num_candidates).sum(dim=0).double()
    return float((votes * (votes - 1)).sum() / (num_hypotheses * (num_hypotheses - 1)))


def _some(names: Iterable[str]) -> str:
    shown, limit = sorted(names), 8
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "") if shown else "none yet"
