"""Particles of a step: few are in the record, many in files that figures read; a long run keeps few files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bpt_dist.artifacts.figures import draw_run, draw_steps
from bpt_dist.storage.files import encode_json
from bpt_dist.storage.snapshots import MOST_FILES, MOST_INLINE, keep_snapshot, with_snapshots

SVGD = ("distance_min", "distance_median", "distance_max", "bandwidth", "driving_norm", "repulsive_norm")


def tensors(num_particles: int, step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    points = torch.randn(num_particles, 8, generator=generator)
    return {"projection": points, "kernel": torch.exp(-torch.cdist(points, points).square() / 8)}


def record(run: Path, num_particles: int, step: int) -> dict[str, object]:
    metrics = {f"svgd/{name}": 1.0 + step for name in SVGD} | {"source/loss/colour": 1.0}
    particles = keep_snapshot(run, "source", step, tensors(num_particles, step))
    return {"step": step, "stage": "source", "metrics": metrics, "particles": particles}


def test_few_particles_are_written_into_the_record(tmp_path: Path) -> None:
    found = keep_snapshot(tmp_path, "source", 10, tensors(MOST_INLINE))
    assert found == {name: tensor.tolist() for name, tensor in tensors(MOST_INLINE).items()}
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_many_particles_is_a_short_line_and_reads_back(tmp_path: Path) -> None:
    written = record(tmp_path, 1024, 10)
    assert len(encode_json(written)) < 1000
    (found,) = with_snapshots([json.loads(encode_json(written))], tmp_path)
    expected = tensors(1024, 10)
    assert found["step"] == 10
    assert {name: value.tolist() for name, value in found["particles"].items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }


@pytest.mark.parametrize("num_particles", [3, MOST_INLINE + 1])
def test_pictures_are_drawn_from_records_and_from_files(num_particles: int, tmp_path: Path) -> None:
    """Records of earlier versions hold the kernel of any number of particles."""
    records = list(with_snapshots([record(tmp_path, num_particles, step) for step in (10, 20, 30)], tmp_path))
    old = [{**entry, "particles": {name: value.tolist() for name, value in tensors(num_particles, entry["step"]).items()}}
           for entry in records]  # fmt: skip
    for draw in (draw_run, draw_steps):
        drawn = {file.relative_to(tmp_path / "new"): file.read_bytes() for file in draw(records, tmp_path / "new")}
        assert drawn == {file.relative_to(tmp_path / "old"): file.read_bytes() for file in draw(old, tmp_path / "old")}
        assert len(drawn) >= 5


def test_files_of_a_long_run_are_thinned_out_and_their_records_lose_the_picture_only(tmp_path: Path) -> None:
    records = [record(tmp_path, MOST_INLINE + 1, step) for step in range(10, 2010, 10)]
    files = sorted((tmp_path / "source" / "particles").iterdir())
    steps = [int(file.stem.removeprefix("step-")) for file in files]
    assert MOST_FILES / 4 <= len(files) <= MOST_FILES
    assert (steps[0], steps[-1]) == (10, 2000)
    found = list(with_snapshots(records, tmp_path))
    assert [entry["metrics"] for entry in found] == [entry["metrics"] for entry in records]
    assert [entry["step"] for entry in found if "particles" in entry] == steps
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 200, gaps
