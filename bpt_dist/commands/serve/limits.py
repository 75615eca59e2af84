"""What a client may send: sizes, times and the JSON of a request; everything else is refused with what to change."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from bpt_dist.artifacts.inference.lines import BYTE_ORDER_MARK
from bpt_dist.artifacts.inference.predictor import ID, Answer

JSON = "application/json"
MAX_DEPTH = 32  # of lists and objects in a row
READ_AWAY = 8  # times the largest body, so that a client that sends too much still reads why it is refused
CONNECTIONS = 512
SMALL_BODY = 4096  # bytes of a request that holds no rows


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes and times that one client cannot exceed."""

    body_bytes: int = 1 << 20
    rows: int = 256  # of one request
    characters: int = 20_000  # of one row
    waiting_rows: int = 4096  # of all requests
    body_seconds: float = 10.0
    head_seconds: float = 10.0


@dataclass
class Refused(Exception):
    """A request that is not answered: the status, and the kind and the message of its error."""

    status: int
    kind: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wrong:
    """A value of the JSON that cannot be used; its row is answered by the error, the other rows are answered."""

    what: str


async def read_body(request: Request, limits: Limits, most: int) -> bytes:
    """Return the body of a request, at most `most` bytes of JSON.

    Raises Refused for another type, for too many bytes and for a body that is too slow, ClientDisconnect where nobody is left.
    """
    kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if kind != JSON:
        raise Refused(415, "body", f"the content type is {kind[:60]!r}; send JSON with the header `content-type: {JSON}`")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "body", "the body is compressed; send it as it is")
    large = Refused(413, "body", f"the body has more than {most:,} bytes; send fewer rows at once", {"connection": "close"})
    if int(request.headers.get("content-length", "0")) > most * READ_AWAY:
        raise large
    try:
        async with asyncio.timeout(limits.body_seconds):
            body, size = bytearray(), 0
            async for part in request.stream():
                size += len(part)
                if size > most * READ_AWAY:
                    raise large
                body += part if size <= most else b""
    except TimeoutError:
        message = f"the body was not sent within {limits.body_seconds:g} s; send it faster, or fewer rows at once"
        raise Refused(408, "body", message, {"connection": "close"}) from None
    if size > most:
        raise large
    return bytes(body)


def decode(body: bytes) -> Any:
    """Return the JSON value of a body. Raises Refused where it is none."""
    try:
        text = body.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise Refused(400, "body", f"byte {error.start + 1} of the body is not UTF-8 ({found:#04x}); send UTF-8") from None
    try:
        return json.loads(text, parse_constant=_constant, parse_int=_integer, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise Refused(400, "body", f"the body is not JSON: {error.msg} at {place}; send a row or a list of rows") from None
    except RecursionError:
        raise Refused(400, "body", "the JSON is nested too deeply; send a row or a list of rows") from None


def rows_of(value: Any, limits: Limits) -> list[Any]:
    """Return the rows of a body, one or a list. Raises Refused where there are none or too many."""
    if isinstance(value, _Wrong):
        raise Refused(422, "row", value.what)
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise Refused(422, "body", "the list has no rows; send at least one")
    if len(rows) > limits.rows:
        raise Refused(413, "body", f"the request has {len(rows):,} rows; send at most {limits.rows:,} at once")
    return rows


def problem_of(row: Any, limits: Limits) -> Answer | None:
    """Return the answer to a row that no prompt is asked for: too long, too deep, or with values that are no JSON."""
    characters, left = 0, [(row, 1)]
    problem = None
    while left and problem is None:
        value, depth = left.pop()
        if isinstance(value, _Wrong):
            problem = Answer(kind="row", error=value.what)
        elif isinstance(value, str):
            characters += len(value)
        elif isinstance(value, dict | list) and depth > MAX_DEPTH:
            problem = Answer(kind="row", error=f"the row is nested more than {MAX_DEPTH} deep; give the columns of a task by name")
        elif isinstance(value, dict):
            characters += sum(map(len, value))
            left += [(one, depth + 1) for one in value.values()]
        elif isinstance(value, list):
            left += [(one, depth + 1) for one in value]
    if problem is None and characters > limits.characters:
        what = f"the row has {characters:,} characters, at most {limits.characters:,} are read; shorten it"
        problem = Answer(kind="fields", error=what, id=_short_id(row))
    return problem


def _short_id(row: Any) -> Any:
    """Return the id of a row where every JSON writer can repeat it."""
    own = row.get(ID) if isinstance(row, dict) else None
    is_number = isinstance(own, int) or (isinstance(own, float) and math.isfinite(own))
    return own if is_number or (isinstance(own, str) and own.isascii()) else None


def _constant(name: str) -> _Wrong:
    return _Wrong(f"{name} is not JSON; write a finite number")


def _integer(digits: str) -> int | _Wrong:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than 4,300 digits
        return _Wrong(f"a number has {len(digits):,} digits; write a shorter one")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Wrong:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    names = [name for name, _ in pairs]
    twice = next(name for place, name in enumerate(names) if name in names[:place])
    return _Wrong(f"field {twice[:60]!r} is in the row twice; leave one out")
