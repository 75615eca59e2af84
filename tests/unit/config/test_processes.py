"""What cannot work on the processes of a job is refused for all rows at once, before any of them starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.config.processes import check_processes
from bpt_dist.distributed.mesh_shape import mesh_shape
from bpt_dist.errors import ConfigError

PLAIN: dict[str, Any] = {
    "name": "run",
    "method": {"name": "bpt", "sigma": 1.0, "num_particles": 4},
    "data": {"source_tasks": ["mini_nli"], "target_tasks": ["mini_rte"]},
    "source": {"steps": 4, "lr": 0.3},
    "target": {"steps": 4},
}


def runs(tmp_path: Path, *rows: dict[str, Any], **sections: Any) -> list[RunConfig]:
    file = tmp_path / "config.yaml"
    labelled = [{"label": f"row{number}", **row} for number, row in enumerate(rows)]
    file.write_text(yaml.safe_dump({**PLAIN, "output": str(tmp_path), **sections, **({"rows": labelled} if rows else {})}))
    return configuration.expand(configuration.load(file))


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_a_partition_in_a_single_unlaunched_process_is_refused(shard: str, tmp_path: Path) -> None:
    (run,) = runs(tmp_path, distribution={"shard": shard})
    with pytest.raises(ConfigError, match=f"distribution.shard: {shard} needs a process group"):
        check_processes([run], 1, launched=False)
    check_processes([run], 1, launched=True)
    check_processes([run], 2, launched=True)


def test_every_row_is_looked_at_and_named(tmp_path: Path) -> None:
    good, mesh = {}, {"distribution": {"mesh": {"particle": 4, "data": 2}}}
    shard, expecting = {"distribution": {"shard": "deepspeed"}}, {"distribution": {"expect_world_size": 8}}
    rows = runs(tmp_path, good, mesh, shard, expecting, copy.deepcopy(shard))  # YAML would name a shared value by an anchor
    with pytest.raises(ConfigError) as caught:
        check_processes(rows, 1, launched=False)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("distribution.mesh 4 x 2 does not fit 4 particle(s) on 1 process(es)")
    assert lines[0].endswith("(in row1)")
    assert lines[1].endswith("(in row2, row4)")
    assert lines[2].startswith("distribution.expect_world_size is 8")


def test_more_ranks_than_slices_of_a_prompt_are_refused(tmp_path: Path) -> None:
    method = {**PLAIN["method"], "length": 3}
    (run,) = runs(tmp_path, method=method, distribution={"exchange": "coordinates"})
    check_processes([run], 2, launched=True)
    with pytest.raises(ConfigError, match="slice of 3 prompt position"):
        check_processes([run], 4, launched=True)


def test_a_run_whose_source_stage_is_over_may_move_to_other_processes(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, distribution={"mesh": {"particle": 4, "data": 1}})
    with pytest.raises(ConfigError, match=r"distribution\.mesh 4 x 1"):
        check_processes([run], 2, launched=True)
    posterior = run.directory / "source" / "posterior"
    posterior.mkdir(parents=True)
    (posterior / "posterior.json").write_text("{}")
    check_processes([run], 2, launched=True)


@pytest.mark.parametrize(("num_particles", "num_ranks", "shape"), [(5, 8, (1, 8)), (6, 4, (2, 2)), (4, 4, (4, 1)), (1, 3, (1, 3))])
def test_the_automatic_mesh_has_the_largest_particle_axis_that_divides(
    num_particles: int, num_ranks: int, shape: tuple[int, int]
) -> None:
    assert mesh_shape(num_particles, num_ranks) == shape
