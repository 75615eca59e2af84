"""Equal bits on repetition: the mode is on where a GPU computes, and off where nothing needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
import torch

from bpt_dist.distributed import environment
from bpt_dist.distributed.determinism import use_deterministic_kernels
from bpt_dist.distributed.mesh import World
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.storage.digest import digest_of

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave torch and the environment as they were."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    enabled, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_nothing_changes_on_a_cpu() -> None:
    use_deterministic_kernels(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert VARIABLE not in os.environ


def test_a_gpu_takes_deterministic_kernels_only() -> None:
    use_deterministic_kernels(torch.device("cuda", 0))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ[VARIABLE] == ":4096:8"


@pytest.mark.parametrize(("num_gpus", "given", "expected"), [(1, None, ":4096:8"), (1, ":16:8", ":16:8"), (0, None, None)])
def test_the_workspace_is_set_before_torch_is_imported(
    num_gpus: int, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "num_gpus", lambda: num_gpus)
    for name in environment._defaults(None):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored after the test, whatever prepare_process sets
    monkeypatch.delenv(VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(VARIABLE, given)
    environment.prepare_process()
    assert os.environ.get(VARIABLE) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: whether two runs on it give the same bits")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_gives_the_same_bits_twice(attention: str, dtype: str, tmp_path: Path) -> None:
    world_folder = tiny_run.world(tmp_path / "world")
    backbone = {"path": str(world_folder / "t5"), "attention": attention, "dtype": dtype}
    digests = set()
    for name in ("one", "two"):
        plain = tiny_run.settings(world_folder, {"name": "bpt"}, output=str(tmp_path / name), backbone=backbone)
        run = tiny_run.trained(tiny_run.load(tmp_path, plain), World.start(60))
        tensors = [read_tensors(file)[0] for file in sorted(run.rglob("*.safetensors"))]
        assert len(tensors) > 4
        digests.add(tuple(map(digest_of, tensors)))
    assert len(digests) == 1
