"""The columns of a prepared split as they lie in its file: nothing is read before a row is asked for.

A file that is mapped into memory is shared by all ranks of a host, and the kernel reads only the pages that are used.
"""

from __future__ import annotations

import json
import operator
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, overload

import numpy as np

from bpt_dist.tasks.text_to_text import Example

T = TypeVar("T")
ENDS = ".ends"  # of the column that says where each row ends
ENCODING = "utf-8", "surrogatepass"  # half a surrogate pair, which JSON of a user may hold, comes back as it was


class _Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """Return an item, or a list of them."""
        places = range(len(self))
        if isinstance(index, slice):
            return [self._made(place) for place in places[index]]
        return self._made(places[operator.index(index)])

    @abstractmethod
    def _made(self, place: int) -> T:
        """Return the item at a place that is not negative."""


class Rows(_Lazy[T]):
    """Rows of any length, one behind the other; `ends[i]` is where row i ends."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray) -> None:
        self.flat, self.ends = flat, ends
        if len(ends) and (ends[-1] != len(flat) or ends[0] < 0):
            raise ValueError("a column is not as long as its rows")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ends)

    def _made(self, place: int) -> T:
        return self._decoded(self.flat[self.ends[place - 1] if place else 0 : self.ends[place]])

    def lengths(self) -> np.ndarray:
        """Return the length of every row."""
        return np.diff(self.ends, prepend=0)

    @abstractmethod
    def _decoded(self, row: np.ndarray) -> T:
        """Return what a row means."""


class IdRows(Rows[np.ndarray]):
    """Rows of token ids."""

    def _decoded(self, row: np.ndarray) -> np.ndarray:
        return row


class TextRows(Rows[str]):
    """Rows of text."""

    def _decoded(self, row: np.ndarray) -> str:
        return row.tobytes().decode(*ENCODING)


class ExampleRows(_Lazy[Example]):
    """The examples of a split, each made when it is asked for."""

    def __init__(self, sources: Sequence[str], targets: Sequence[str], row_ids: Sequence[str], facts: Sequence[str]) -> None:
        self.sources, self.targets, self.row_ids, self.facts = sources, targets, row_ids, facts

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.row_ids)

    def _made(self, place: int) -> Example:
        label, references, group = json.loads(self.facts[place])
        return Example(self.sources[place], self.targets[place], self.row_ids[place], label, tuple(references), group)


def lengths_of(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the length of every row; of stored ones without a look at the rows."""
    return rows.lengths() if isinstance(rows, IdRows) else np.array([len(row) for row in rows], dtype=np.int64)


def id_columns(name: str, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return rows of ids as they are stored: `IdRows(columns[name], columns[name + ENDS])` is equal to them."""
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *rows])
    return {name: flat, name + ENDS: np.cumsum([len(row) for row in rows], dtype=np.int64)}


def text_columns(name: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Return texts as they are stored: `TextRows(columns[name], columns[name + ENDS])` is equal to them."""
    rows = [text.encode(*ENCODING) for text in texts]
    return {
        name: np.frombuffer(b"".join(rows), dtype=np.uint8),
        name + ENDS: np.cumsum([len(row) for row in rows], dtype=np.int64),
    }


def fact_columns(name: str, examples: Iterable[Example]) -> dict[str, np.ndarray]:
    """Return what examples have beside their texts, as `ExampleRows` reads it."""
    return text_columns(
        name, (json.dumps([example.label, example.references, example.group], allow_nan=False) for example in examples)
    )


def stored_texts(columns: Mapping[str, np.ndarray], name: str) -> TextRows:
    """Return a column of texts."""
    return TextRows(columns[name], columns[name + ENDS])


def stored_ids(columns: Mapping[str, np.ndarray], name: str) -> IdRows:
    """Return a column of ids."""
    return IdRows(columns[name], columns[name + ENDS])
