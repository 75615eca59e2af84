"""The JSON of a request: what is refused as a whole, and what is the answer of its row alone."""

from __future__ import annotations

from typing import Any

import pytest

from bpt_dist.commands.serve.limits import MAX_DEPTH, Limits, Refused, decode, problem_of, rows_of

LIMITS = Limits(rows=3, characters=20)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: Expecting value at line 1 column 1"),
        (b'{"a": 1', "the body is not JSON: Expecting ',' delimiter"),
        (b'{"a": "\xff"}', r"byte 8 of the body is not UTF-8 (0xff); send UTF-8"),
        ('{"a": "ä"}'.encode("utf-16"), "byte 1 of the body is not UTF-8 (0xff)"),
        (b"[" * 100_000, "the JSON is nested too deeply"),
        (b"{} {}", "Extra data"),
    ],
    ids=range(6),
)
def test_what_is_no_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Refused) as refused:
        decode(body)
    assert refused.value.status == 400
    assert message in refused.value.message


def test_a_byte_order_mark_is_read_over() -> None:
    assert decode(b'\xef\xbb\xbf{"a": "\xc3\xa4"}') == {"a": "ä"}


def test_the_number_of_rows_is_limited() -> None:
    assert rows_of({"a": 1}, LIMITS) == [{"a": 1}]
    assert len(rows_of([1, 2, 3], LIMITS)) == 3
    for value, status in (([], 422), ([1, 2, 3, 4], 413), (decode(b"NaN"), 422)):
        with pytest.raises(Refused) as refused:
            rows_of(value, LIMITS)
        assert refused.value.status == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "field 'a' is in the row twice; leave one out"),
        ('{"fields": {"a": 1, "a": 2}}', "field 'a' is in the row twice; leave one out"),
        ('{"a": [NaN]}', "NaN is not JSON; write a finite number"),
        ('{"a": -Infinity}', "-Infinity is not JSON; write a finite number"),
        (f'{{"a": {"9" * 5000}}}', "a number has 5,000 digits; write a shorter one"),
        (f'{{"a": {"[" * MAX_DEPTH}{"]" * MAX_DEPTH}}}', "the row is nested more than 32 deep; give the columns of a task by name"),
        ('{"sentence": "12345678", "b": ["1234", "5"]}', "the row has 22 characters, at most 20 are read; shorten it"),
    ],
    ids=range(7),
)
def test_what_is_wrong_with_a_row_is_its_answer(text: str, message: str) -> None:
    good, bad = decode(f'[{{"a": "fine"}}, {text}]'.encode())
    assert problem_of(good, LIMITS) is None
    problem = problem_of(bad, LIMITS)
    assert problem is not None
    assert problem.error == message


@pytest.mark.parametrize(("own", "kept"), [('"r7"', "r7"), ("7", 7), ("1e999", None), ('"\\ud800"', None), ("[1]", None)])
def test_a_row_that_is_too_long_keeps_an_id_that_can_be_repeated(own: str, kept: Any) -> None:
    problem = problem_of(decode(f'{{"id": {own}, "sentence": "{"x" * 21}"}}'.encode()), LIMITS)
    assert problem is not None
    assert (problem.kind, problem.id) == ("fields", kept)
