"""What a task is: where its rows come from, how they are read, written as text, split and scored. Pure data, no heavy import."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

Protocol = Literal["fixed", "attempt"]
Kind = Literal["classification", "choice", "regression", "text"]
Form = Literal["fields", "choices", "options", "multirc", "wsc", "squad", "record"]
SplitKind = Literal["official", "halves", "carve"]
Unlabelled = Literal["drop", "refuse"]
EmptyText = Literal["keep", "drop", "refuse"]
Decoding = Literal["rank", "generate"]
CLOSED: tuple[Kind, ...] = ("classification", "choice")  # the right answer is one of the label words

METRICS_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews", "multirc_f1a", "multirc_em"),
    "choice": ("accuracy", "macro_f1"),
    "regression": ("pearson", "spearman"),
    "text": ("accuracy", "squad_em", "squad_f1", "record_em", "record_f1"),
}


@dataclass(frozen=True, kw_only=True)
class TextField:
    """One piece of the source text: the words printed before it and the (dotted) column it is read from."""

    label: str
    column: str


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How train, validation and test are made from the labelled splits that were published.

    `official`: the named splits as they are. `halves` (fewer than 10,000 rows): the published validation split is
    shuffled and cut in two. `carve` (larger): 1,000 shuffled training rows, or a tenth of a smaller train split,
    become validation and the split named by `test` is the test. Names are those of the hub. Under `protocol: fixed`
    a task with a group column is cut between groups, never inside one.
    """

    kind: SplitKind
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("validation",)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One text-to-text task. `label_words[i]` is the target text of class i, `label_values[i]` how rows write it.

    `unlabelled` and `empty_text` are read through `unlabelled_rows` and `empty_texts`, which know the default.
    """

    name: str
    summary: str
    kind: Kind
    metrics: tuple[str, ...]
    fields: tuple[TextField, ...] = ()
    form: Form = "fields"
    target_column: str = "label"
    label_words: tuple[str, ...] = ()
    label_values: tuple[int | str | bool, ...] = ()
    score_range: tuple[float, float, float] | None = None
    hub_name: str | None = None
    hub_configs: tuple[str | None, ...] = (None,)
    local_name: str | None = None
    folder: Path | None = None
    splits: SplitRule = field(default_factory=lambda: SplitRule(kind="official", test=("test",)))
    id_column: str | None = None
    group_column: str | None = None
    published_name: str | None = None
    max_source_length: int = 256
    max_target_length: int = 128
    unlabelled: Unlabelled | None = None
    empty_text: EmptyText | None = None

    @property
    def unlabelled_rows(self) -> Unlabelled:
        """Return what happens to rows without a label; those of published data cannot be fixed and are dropped by default."""
        return self.unlabelled or ("refuse" if self.hub_name is None else "drop")

    @property
    def empty_texts(self) -> EmptyText:
        """Return what happens to rows with an empty text; those of published data cannot be fixed and are kept by default."""
        return self.empty_text or ("refuse" if self.hub_name is None else "keep")

    @property
    def headline(self) -> str:
        """Return the metric that selects checkpoints and fills the results table."""
        return self.metrics[0]

    def words(self, protocol: Protocol) -> tuple[str, ...]:
        """Return the closed set of target texts, empty for free text; `attempt` writes classes as digits."""
        if protocol == "attempt" and self.kind in ("classification", "choice"):
            return tuple(str(index) for index in range(len(self.label_words)))
        return self.label_words

    def decoding(self, protocol: Protocol, asked: str = "auto") -> Decoding:
        """Return how the task is answered: closed sets are ranked under the fixed protocol, generated under the published one.

        `asked` is `evaluation.decode`; what has no label words is generated whatever was asked for.
        """
        if asked == "auto":
            return "rank" if self.kind in CLOSED and protocol == "fixed" else "generate"
        return "rank" if asked == "rank" and self.words(protocol) else "generate"

    def title(self, protocol: Protocol) -> str:
        """Return the word that opens every source text of the task."""
        return (self.published_name or self.name) if protocol == "attempt" else self.name

    def with_folder(self, folder: Path) -> TaskSpec:
        """Return the task reading train.jsonl, validation.jsonl and, if there, test.jsonl of one folder."""
        return replace(self, folder=Path(folder), hub_name=None, hub_configs=(None,))


def score_words(low: float, high: float, step: float) -> tuple[str, ...]:
    """Return the texts of an evenly spaced score scale, one decimal each: 0.0, 0.2 … 5.0."""
    return tuple(f"{low + index * step:.1f}" for index in range(round((high - low) / step) + 1))


def column(row: dict[str, object], path: str) -> object:
    """Return the value of a dotted column path ('idx.question'), None where a part is missing."""
    value: object = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
