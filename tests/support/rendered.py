"""The examples of many rows, as the tests of tasks, tokens and batches need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.text_to_text import Example, render


def render_all(
    spec: TaskSpec, rows: Iterable[dict[str, Any]], protocol: Any = "fixed", *, evaluation: bool = False
) -> list[Example]:
    """Return the examples of all rows in order."""
    return [example for row in rows for example in render(spec, row, protocol, evaluation=evaluation)]
