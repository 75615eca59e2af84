"""How much of a task's text a tokenizer does not know, by field: such text reaches the backbone as `<unk>`.

The share is counted in characters, without blanks: a run of unknown characters is one unknown piece, however long it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bpt_dist.data.tokens import PlainEncoder, TokenisedTask, unknown_spans
from bpt_dist.errors import DataError
from bpt_dist.tasks.spec import Protocol, TaskSpec
from bpt_dist.tasks.text_to_text import Row, field_texts

log = logging.getLogger(__name__)
REPORTED_SHARE = 0.01
REFUSED_SHARE = 0.5
SHOWN = 5
SHOWN_CHARACTERS = 12


@dataclass(frozen=True)
class UnknownText:
    """The unknown text of one field of one split; `examples` are its most frequent characters (or words), at most five."""

    field: str
    num_unknown: int
    num_characters: int
    examples: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the share of the field's characters that become the unknown piece, 0 to 1."""
        return self.num_unknown / self.num_characters if self.num_characters else 0.0


def measure(
    spec: TaskSpec, rows: Sequence[Row], owners: Sequence[int], tokens: TokenisedTask, encoder: PlainEncoder, protocol: Protocol
) -> tuple[UnknownText, ...]:
    """Return the fields with unknown text, in the order of the source text; `owners[i]` is the row of example i."""
    if encoder.unknown_id is None:
        return ()
    affected = {
        owner
        for owner, source, target in zip(owners, tokens.source_ids, tokens.target_ids, strict=True)
        if np.any(source == encoder.unknown_id) or np.any(target == encoder.unknown_id)
    }
    if not affected:
        return ()
    num_characters: Counter[str] = Counter()
    num_unknown: Counter[str] = Counter()
    examples: dict[str, Counter[str]] = {}
    for number, row in enumerate(rows):
        texts = field_texts(spec, row, protocol)
        for name, text in texts:
            num_characters[name] += _num_visible(text)
        if number in affected:
            spans = unknown_spans(encoder, [text for _, text in texts])
            for (name, text), places in zip(texts, spans, strict=True):
                _count(name, [text[start:end] for start, end in places], encoder, num_unknown, examples)
    return tuple(
        UnknownText(name, num_unknown[name], num_characters[name], tuple(text for text, _ in examples[name].most_common(SHOWN)))
        for name in num_characters
        if num_unknown[name]
    )


def _count(
    name: str, texts: Iterable[str], encoder: PlainEncoder, num_unknown: Counter[str], examples: dict[str, Counter[str]]
) -> None:
    for text in texts:
        num_unknown[name] += _num_visible(text)
        parts = [character for character in text if not character.isspace()] if encoder.splits_words else [text.strip()]
        examples.setdefault(name, Counter()).update(part[:SHOWN_CHARACTERS] for part in parts)


def _num_visible(text: str) -> int:
    return len("".join(text.split()))


def describe(by_split: Mapping[str, Sequence[UnknownText]], least_share: float = REPORTED_SHARE) -> str | None:
    """Return which fields have at least that share of unknown text in a split, and which characters; None if none has."""
    described = []
    fields = dict.fromkeys(field.field for fields in by_split.values() for field in fields)
    for name in fields:
        shares = {split: field for split, fields in by_split.items() for field in fields if field.field == name}
        if max(field.share for field in shares.values()) >= least_share:
            percent = ", ".join(f"{100 * field.share:.3g} % of {split}" for split, field in shares.items())
            texts = dict.fromkeys(text for field in shares.values() for text in field.examples)
            described.append(f"field {name!r} ({percent}): {' '.join(map(repr, list(texts)[:SHOWN]))}")
    return "; ".join(described) or None


def refuse(task: str, by_split: Mapping[str, Sequence[UnknownText]]) -> None:
    """Raise DataError if half of a field's characters or more are unknown in a split: nothing can be learnt from such text."""
    described = describe(by_split, REFUSED_SHARE)
    if described is not None:
        raise DataError(
            f"task {task!r}: {100 * REFUSED_SHARE:.0f} % or more of the characters of a field become <unk>, nothing was trained: "
            f"{described}; choose a backbone whose tokenizer knows them, or add them to its tokenizer as ordinary tokens"
        )


def report(task: str, by_split: Mapping[str, Sequence[UnknownText]]) -> None:
    """Warn, in one line, of fields with a noticeable share of unknown text."""
    described = describe(by_split)
    if described is not None:
        log.warning("task %r: characters that the tokenizer does not know become <unk>: %s", task, described)
