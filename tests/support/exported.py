"""Rows of the tiny tasks as a user of `bpt-dist predict` has them, and what a run predicted for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(world: Path, task: str, split: str = "test") -> list[dict[str, Any]]:
    """Return the rows of a split, with the name of their task."""
    lines = (world / "tasks" / task / f"{split}.jsonl").read_text().splitlines()
    return [{"task": task, **json.loads(line)} for line in lines]


def predictions(run: Path, task: str, predict: str = "map") -> list[dict[str, Any]]:
    """Return what a run predicted for the rows of the test split."""
    name = "predictions.jsonl" if predict == "map" else f"predictions-{predict}.jsonl"
    return [json.loads(line) for line in (run / "target" / task / name).read_text().splitlines()]


def _numbers(probabilities: list[float] | dict[str, float]) -> list[float]:
    return list(probabilities.values()) if isinstance(probabilities, dict) else probabilities


def assert_equal(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert that answers are a run's predictions, probabilities to 1e-5."""
    assert [answer["prediction"] for answer in answers] == [entry["prediction"] for entry in expected]
    for answer, entry in zip(answers, expected, strict=True):
        found, wanted = (_numbers(one.get("probabilities", [])) for one in (answer, entry))
        assert len(found) == len(wanted)
        assert max((abs(a - b) for a, b in zip(found, wanted, strict=True)), default=0.0) <= 1e-5
