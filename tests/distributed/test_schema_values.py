"""Values that matter between ranks are run to the end by two of them; one process runs all others (tests/contract)."""

from __future__ import annotations

import json
import math
import os
import traceback
from pathlib import Path

import pytest
import ranks
import schema_walk
import tiny_run

from bpt_dist.distributed.mesh import World
from bpt_dist.storage import layout

NUM_RANKS = 2
CASES = schema_walk.two_ranks()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return schema_walk.make_world(tmp_path_factory.mktemp("world"))


def failures(mesh_world: World, shared: Path, folder: Path, cases: list[schema_walk.Case]) -> list[str]:
    """Run every case in this rank and return what went wrong: all of them, not only the first."""
    found = []
    for number, case in enumerate(cases):
        place = folder / str(number)
        try:
            plain = schema_walk.settings(shared, place, case, mesh_world.size)
            (folder / f"{number}-{mesh_world.rank}").mkdir(parents=True)
            config = tiny_run.load(folder / f"{number}-{mesh_world.rank}", plain)
            run = tiny_run.trained(config, mesh_world)
            results = json.loads((run / layout.RESULTS).read_text())
            assert {entry["task"] for entry in results} == set(config.data.target_tasks)
            assert all(math.isfinite(entry["value"]) for entry in results)
        except Exception:
            found.append(f"{case}: {traceback.format_exc(limit=-3)}")
    return found


@pytest.mark.parametrize("method", sorted({case.method for case in CASES}))
def test_two_ranks_run_every_value_that_matters_between_them(method: str, world: Path, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.method == method]
    for start in range(0, len(cases), 16):  # a batch of cases has to end within the limit of `ranks.run`
        batch = cases[start : start + 16]
        assert ranks.run(failures, NUM_RANKS, world, tmp_path / str(start), batch) == [[], []]
