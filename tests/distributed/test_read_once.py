"""Files of the backbone are hashed once a host, and a host holds no copy of them for each rank that moves or shards them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
import tiny_t5
import torch
from safetensors.torch import load_file, save_file

from bpt_dist.backbones import loading
from bpt_dist.backbones.checkpoint import Weights
from bpt_dist.distributed.mesh import World
from bpt_dist.train import run_all
from bpt_dist.training.sharding.placement import load_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def loaded(world: World, folder: Path, out: Path, hosts: tuple[str, ...], paths: tuple[str, ...]) -> tuple[int, str]:
    """Load the backbone on ranks that seem to be on `hosts`; return how often this rank hashed the files, and the hash."""
    hashed: list[Weights] = []
    identity: Any = Weights.identity.fget  # type: ignore[attr-defined]

    def counted(weights: Weights) -> str:
        hashed.append(weights)
        return str(identity(weights))

    Weights.identity = property(counted)  # type: ignore[assignment, method-assign]
    object.__setattr__(world, "hosts", hosts)
    plain = tiny_run.settings(folder, {"name": "prompt_tuning"}, backbone={"path": paths[world.rank]})
    (out / str(world.rank)).mkdir()
    backbone = load_backbone(tiny_run.load(out / str(world.rank), plain), world)
    return len(hashed), backbone.identity


@pytest.mark.parametrize(
    ("hosts", "expected"), [(("a", "a", "a"), [1, 0, 0]), (("a", "b", "a"), [1, 1, 0])], ids=["one host", "two hosts"]
)
def test_one_rank_of_each_host_hashes_the_files(hosts: tuple[str, ...], expected: list[int], folder: Path, tmp_path: Path) -> None:
    path = str(folder / "t5")
    found = ranks.run(loaded, 3, folder, tmp_path, hosts, (path,) * 3)
    assert [num for num, _ in found] == expected
    assert {identity for _, identity in found} == {loading.load(path).identity}


def test_a_rank_that_sees_other_files_under_the_name_of_its_host_hashes_its_own(folder: Path, tmp_path: Path) -> None:
    """As containers of one host name do."""
    shutil.copytree(folder / "t5", tmp_path / "t5")
    paths = (str(folder / "t5"), str(folder / "t5"), str(tmp_path / "t5"))
    found = ranks.run(loaded, 3, folder, tmp_path, ("a", "a", "a"), paths)
    assert [num for num, _ in found] == [1, 0, 1]
    assert len({identity for _, identity in found}) == 1


def test_another_backbone_on_one_host_is_refused_by_name(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        shutil.copytree(folder / "t5", tmp_path / f"host{rank}" / "t5")
    file = tmp_path / "host1" / "t5" / "model.safetensors"
    tensors = load_file(file)
    tensors["shared.weight"][5, 3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    plain = tiny_run.settings(folder, {"name": "prompt_tuning"}, backbone={"path": "./t5"}, output=str(tmp_path / "runs"))
    config = tiny_run.load(tmp_path, plain)

    def main() -> int:
        os.chdir(tmp_path / f"host{os.environ['RANK']}")
        return run_all(config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": "t5"})}))

    assert ranks.launch(main, 2) == [2, 2]
    assert "weights or tokenizer at t5 differ between rank 0 and rank 1 on " in capfd.readouterr().err


def files_behind(tensors: Iterable[torch.Tensor]) -> set[str]:
    """Return the names of the files whose pages hold the tensors; "" for memory of this process."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [(*(int(end, 16) for end in fields[0].split("-")), Path(fields[-1]).name) for fields in maps if "/" in fields[-1]]
    found = ({name for start, end, name in places if start <= tensor.data_ptr() < end} for tensor in tensors)
    return {name for names in found for name in names or {""}}


def test_weights_that_are_moved_on_stay_in_the_mapped_file(tmp_path: Path) -> None:
    path = str(tiny_t5.make(tmp_path / "t5"))
    mapped, own = loading.load(path, mapped=True), loading.load(path)
    assert files_behind(mapped.model.parameters()) == {"model.safetensors"}
    assert files_behind(own.model.parameters()) == {""}
    assert all(torch.equal(a, b) for a, b in zip(mapped.model.parameters(), own.model.parameters(), strict=True))
    halved = loading.load(path, mapped=True, dtype="bf16")
    assert files_behind(halved.model.parameters()) == {""}  # another type needs memory
