"""Every value of every key is run to the end once: the configuration promises nothing that nobody has run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import schema_walk
import tiny_run

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.storage import layout
from bpt_dist.train import run_all


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return schema_walk.make_world(tmp_path_factory.mktemp("world"))


def test_every_key_of_the_schema_is_run_or_listed_with_a_reason() -> None:
    missing = schema_walk.every_key() - schema_walk.run_somewhere() - set(schema_walk.NOT_RUN)
    assert not missing, "add a sample to schema_walk.SAMPLES, or a reason to NOT_RUN"
    assert all(len(reason) > 10 for reason in schema_walk.NOT_RUN.values())


def test_the_tables_name_keys_that_exist() -> None:
    keys = {key.rpartition(" ")[2] for key in schema_walk.every_key()}
    for table in (schema_walk.SAMPLES, schema_walk.NEEDS, schema_walk.NOT_RUN, schema_walk.TWO_RANKS_ONLY):
        assert {name.partition("=")[0].rpartition(" ")[2] for name in table} <= keys
    assert set(schema_walk.ACROSS_METHODS) <= keys


@pytest.mark.parametrize("case", schema_walk.one_process(), ids=str)
def test_a_value_runs_to_the_end(case: schema_walk.Case, world: Path, tmp_path: Path) -> None:
    config = tiny_run.load(tmp_path, schema_walk.settings(world, tmp_path, case))
    assert run_all(config, fresh=True) == 0
    for run in configuration.expand(config):
        assert_finished(run)


def assert_finished(config: RunConfig) -> None:
    """Assert that a run has trained, and predicted and scored every target, with finite numbers."""
    assert json.loads((config.directory / layout.STATUS).read_text())["state"] == "finished"
    records = [json.loads(line)["metrics"] for line in (config.directory / layout.METRICS).read_text().splitlines()]
    losses = [value for metrics in records for name, value in metrics.items() if "loss" in name]
    assert all(map(math.isfinite, losses))
    assert losses or not (config.source.steps or config.target.steps)
    results = json.loads((config.directory / layout.RESULTS).read_text())
    assert all(math.isfinite(entry["value"]) for entry in results)
    reported = {(entry["task"], entry["split"], entry["predict"]) for entry in results}
    predicted = dict.fromkeys(("map", config.evaluation.predict))
    tasks, splits = config.data.target_tasks, config.evaluation.splits
    assert reported == {(task, split, predict) for task in tasks for split in splits for predict in predicted}
