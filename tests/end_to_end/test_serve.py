"""`bpt-dist serve` as a process, asked by many clients at once: the answers of the run, and of the Predictor under 100 prompts."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import exported
import pytest
import served
import tiny_run

from bpt_dist.artifacts.inference.backbone import load_backbone
from bpt_dist.artifacts.inference.exports import read_exports
from bpt_dist.artifacts.inference.predictor import Predictor

TASKS = ["mood", "count", "colour", "truth"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    plain = tiny_run.settings(world, {"name": "vanilla_transfer"}, data={"target_tasks": TASKS})
    return tiny_run.trained(tiny_run.load(world, plain))


def under_load(client: served.Client, requests: Sequence[list[dict[str, Any]]], clients: int = 16) -> list[list[dict[str, Any]]]:
    """Return the answers to requests that several clients send at the same time."""
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(client.predict, requests))
    assert [reply.status for reply in replies] == [200] * len(requests)
    return [reply.value for reply in replies]


def test_many_clients_get_the_predictions_of_the_run(world: Path, run: Path, tmp_path: Path) -> None:
    rows = [(task, place, row) for task in TASKS for place, row in enumerate(exported.rows(world, task))] * 6
    random.Random(0).shuffle(rows)
    expected = {task: exported.predictions(run, task) for task in TASKS}
    requests = [rows[first : first + 3] for first in range(0, len(rows), 3)]
    with served.process(tmp_path, str(run), "--wait-ms", "20") as server:
        found = under_load(server.client, [[row for _, _, row in request] for request in requests])
        passes, batched = server.client.metric("bpt_batch_rows_count"), server.client.metric("bpt_batch_rows_sum")
        assert server.stop() == 0
        assert server.log.read_text() == ""
    for request, answers in zip(requests, found, strict=True):
        assert [answer["id"] for answer in answers] == [row["id"] for _, _, row in request]
        exported.assert_equal(answers, [expected[task][place] for task, place, _ in request])
    assert batched == len(rows)
    assert passes < len(requests), "rows of several clients share passes"


def test_a_hundred_prompts_are_served_at_once(world: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    names = served.many(run / "target" / "mood" / "adapter", tmp_path / "exports", 100)
    exports = read_exports(tmp_path / "exports")
    predictor = Predictor(load_backbone(exports[0], device="cpu"), exports)
    texts = [row["sentence"] for row in exported.rows(world, "mood")]
    requests = [[{"task": name, "sentence": text} for text in texts] for name in names]
    expected = [answer.as_json() for request in requests for answer in predictor.predict(request)]
    assert len({tuple(one["probabilities"].values()) for one in expected}) > 500, "the prompts differ"
    with served.process(tmp_path, str(tmp_path / "exports")) as server:
        found = under_load(server.client, requests)
        assert len(server.client.ask("GET", "/tasks").value) == 100
        assert server.stop(signal.SIGINT) == 0
    exported.assert_equal([answer for answers in found for answer in answers], expected)
