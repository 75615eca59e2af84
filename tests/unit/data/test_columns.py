"""Columns give back the rows they were made of, and nothing is read before a row is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from bpt_dist.data.columns import (
    ENDS,
    ExampleRows,
    IdRows,
    fact_columns,
    id_columns,
    lengths_of,
    stored_ids,
    stored_texts,
    text_columns,
)
from bpt_dist.tasks.text_to_text import Example

TEXTS = ["", "a cat", "été \N{PILE OF POO}", "half a pair \ud83d", ""]
EXAMPLES = [
    Example("a", "yes", "train:1", 0),
    Example("b", "3.7", "train:2", 3.7, ("x", "\ud83d"), "q1"),
    Example("", "text", "train:3", None, ()),
]


def test_texts_come_back_also_what_utf_8_cannot_write() -> None:
    assert list(stored_texts(text_columns("text", TEXTS), "text")) == TEXTS
    assert list(stored_texts(text_columns("text", []), "text")) == []


def test_rows_are_indexed_like_a_list() -> None:
    rows = stored_texts(text_columns("text", TEXTS), "text")
    assert (len(rows), rows[-2], rows[1:3]) == (5, TEXTS[-2], TEXTS[1:3])
    assert rows[np.int64(1)] == "a cat"
    with pytest.raises(IndexError):
        rows[5]


def test_ids_are_views_of_the_column_and_their_lengths_need_no_rows() -> None:
    made = [np.array(row, dtype=np.int32) for row in ([3, 1], [], [7])]
    rows = stored_ids(id_columns("ids", made), "ids")
    assert [row.tolist() for row in rows] == [[3, 1], [], [7]]
    assert np.shares_memory(rows[0], rows.flat)
    assert lengths_of(rows).tolist() == lengths_of(made).tolist() == [2, 0, 1]
    assert not len(stored_ids(id_columns("none", []), "none"))


def test_examples_come_back_with_the_types_of_their_labels() -> None:
    texts = [
        stored_texts(text_columns(part, [getattr(example, part) for example in EXAMPLES]), part)
        for part in ("source", "target", "row_id")
    ]
    found = ExampleRows(*texts, stored_texts(fact_columns("facts", EXAMPLES), "facts"))
    assert list(found) == found[:] == EXAMPLES
    assert [type(example.label) for example in found] == [int, float, type(None)]


def test_a_column_that_does_not_fit_its_rows_is_refused() -> None:
    columns = id_columns("ids", [np.arange(3, dtype=np.int32)])
    with pytest.raises(ValueError, match="not as long as its rows"):
        IdRows(columns["ids"][:2], columns["ids" + ENDS])
