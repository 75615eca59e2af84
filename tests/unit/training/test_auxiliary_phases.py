"""Preludes: whatever ends a run inside or between them, the same command finishes it with the bits of an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from records import repeatable

from bpt_dist.config import RunConfig
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.storage.fault_injection import InjectedError

FAULTS = {
    "mpt": (
        "step.before_forward,stage=source/teachers,step=1", "step.after_update,stage=source/teachers,step=3",
        "step.before_forward,stage=source,step=0", "step.before_update,stage=source,step=3",
        "step.before_forward,stage=target/mood,step=1",
    ),
    "spot": (
        "step.after_update,stage=source/keys,step=2", "step.before_forward,stage=source,step=3",
        "posterior.before_write", "step.before_forward,stage=target/mood/probe,step=1",
        "step.after_update,stage=target/mood,step=1", "step.before_forward,stage=target/count/probe,step=0",
        "step.before_forward,stage=target/count,step=2",
    ),
    "attempt": (
        "step.before_forward,stage=source/prompts,step=2", "step.before_forward,stage=source,step=2",
        "step.before_forward,stage=target/count,step=2",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: str) -> RunConfig:
    folder.mkdir(exist_ok=True)
    options = {"prompt_steps": 3} if method == "attempt" else {}
    return tiny_run.load(folder, tiny_run.settings(world, {"name": method, **options}, output=str(folder / "runs")))


def left_by(run: Path) -> tuple[list[Any], Any, dict[str, Any]]:
    """Records, results and posterior: what a run is for."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    posterior, _ = read_tensors(run / "source" / "posterior" / "posterior.safetensors")
    return repeatable(records), json.loads((run / "results.json").read_text()), posterior


@pytest.fixture(scope="module", params=FAULTS)
def undisturbed(request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    config = configured(world, tmp_path_factory.mktemp("undisturbed"), request.param)
    return request.param, left_by(tiny_run.trained(config))


def test_a_run_that_fails_in_any_stage_resumes_with_the_same_bits(
    undisturbed: tuple[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, (records, results, posterior) = undisturbed
    for number, fault in enumerate(FAULTS[method]):
        config = configured(world, tmp_path / str(number), method)
        with monkeypatch.context() as patch, pytest.raises(InjectedError):
            patch.setenv("BPT_FAULT", f"{fault},raise")
            tiny_run.trained(config)
        found = left_by(tiny_run.trained(config))
        assert found[0] == records, fault
        assert found[1] == results, fault
        tiny_run.assert_same(found[2], posterior)


def test_a_prelude_counts_its_own_steps_and_is_not_validated(undisturbed: tuple[str, Any]) -> None:
    method, (records, _, _) = undisturbed
    name = {"mpt": "teachers", "spot": "keys", "attempt": "prompts"}[method]
    steps = [record["step"] for record in records if record["stage"] == f"source/{name}"]
    assert steps == [1, 2, 3]
    assert all(f"source/{name}/loss" in record["metrics"] for record in records if record["stage"] == f"source/{name}")
    assert [record["step"] for record in records if record["stage"] == "source"] == [1, 2, 3, 4]
    probes = [record for record in records if record["stage"] == "target/mood/probe"]
    assert [record["step"] for record in probes] == ([1, 2, 3] if method == "spot" else [])
    assert not any("validation" in key for record in probes for key in record["metrics"])
