"""Every shipped configuration, all rows of it, is planned on every usual number of processes without a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_decoder
import tiny_t5

from bpt_dist import config as configuration
from bpt_dist.backbones.loading import shape_of
from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.commands.plan import estimate as estimating
from bpt_dist.commands.plan.device import Device
from bpt_dist.commands.plan.estimate import Plan, estimate
from bpt_dist.config import RunConfig
from bpt_dist.config.processes import check_processes

ROOT = Path(__file__).parents[4]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "sweep" not in path.parts)
DECODERS = ("decoder/", "table/smollm2")  # the files of decoder-only backbones
SIZES = (1, 2, 4, 8, 16)
LARGE = Device("a large GPU", "cuda", 1e14, 80 << 30)


def rows(path: Path) -> list[RunConfig]:
    """Return the first seed of each row that differs in method or layout from the rows before."""
    seen: dict[str, RunConfig] = {}
    for run in configuration.expand(configuration.load(path)):
        few = run.data.target_tasks if run.target.joint else run.data.target_tasks[:2]  # single targets are arranged alike
        shorter = run.model_copy(update={"seed": 0, "data": run.data.model_copy(update={"target_tasks": few})})
        alike = shorter.model_copy(update={"target": run.target.model_copy(update={"lr": 1.0})})  # a rate arranges nothing
        seen.setdefault(configuration.fingerprint(alike), shorter)
    return list(seen.values())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, ModelShape]:
    """Return a narrow T5, and under True a narrow decoder-only model."""
    t5, decoder = (tmp_path_factory.mktemp(name) for name in ("t5", "decoder"))
    return {False: shape_of(str(tiny_t5.make(t5))), True: shape_of(str(tiny_decoder.make(decoder, num_hidden_layers=2)))}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_no_shipped_configuration_is_refused_for_its_number_of_processes(
    path: Path, shapes: dict[bool, ModelShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_decoder = str(path.relative_to(ROOT / "configs")).startswith(DECODERS)
    monkeypatch.setattr(estimating, "probe", lambda *_: LARGE)
    # The arrangement does not depend on the width of the backbone, and narrow tensors are made in no time.
    monkeypatch.setattr(estimating, "shape_of", lambda *_, **__: shapes[is_decoder])
    for run in rows(path):
        for size in SIZES:
            check_processes([run], size, launched=True)
            check_plan(estimate(run, size, ranks_here=min(size, 8)), size)


def check_plan(found: Plan, size: int) -> None:
    """Ranks without texts are told of, and only those."""
    for stage in found.stages:
        assert stage.mesh[0] * stage.mesh[1] == size
        assert stage.rows_per_rank >= stage.rows_at_once >= 1
        assert stage.rows_per_rank * size >= stage.rows
    assert all("have no texts" in warning for warning in found.warnings)
