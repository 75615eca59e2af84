"""The opponents of the SVGD step compute what their papers say, and what would not fit is left out by name."""

from __future__ import annotations

import math

import pytest
import torch

from bpt_dist.commands.bench import baselines, svgd
from bpt_dist.commands.bench.timing import Clock

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_particles", [2, 5, 20])
def test_naive_and_ours_agree_with_float64(num_particles: int) -> None:
    particles, score = svgd.cloud(num_particles, 300, 0, CPU)
    for direction in (baselines.naive, svgd.ours):
        assert svgd.direction_error(direction(particles, score), particles, score) < 1e-5


def test_the_error_is_one(monkeypatch) -> None:
    particles, score = svgd.cloud(6, 300, 0, CPU)
    found = svgd.ours(particles, score)
    assert svgd.direction_error(found * 1.01, particles, score) == pytest.approx(0.01, rel=0.01)
    found[0, 0] += found.norm()
    assert svgd.direction_error(found, particles, score) > 0.5


def test_pyros_kernel_has_a_bandwidth_for_every_coordinate() -> None:
    particles, score = (part.double() for part in svgd.cloud(4, 3, 1, CPU))
    expected = torch.zeros_like(particles)
    bandwidth = []
    for coordinate in range(3):
        squares = sorted(
            float((particles[i, coordinate] - particles[j, coordinate]) ** 2) for i in range(4) for j in range(i + 1, 4)
        )
        bandwidth.append(squares[2] / math.log(5))  # torch's median: the lower of the two middle values
    for i in range(4):
        for j in range(4):
            difference = particles[i] - particles[j]
            kernel = math.exp(-sum(float(difference[c]) ** 2 / bandwidth[c] for c in range(3)))
            repulsion = torch.tensor([2 * float(difference[c]) / bandwidth[c] for c in range(3)])
            expected[i] += kernel * (score[j] - repulsion) / 4
    torch.testing.assert_close(baselines.pyro_style(particles, score), expected)


def test_what_would_not_fit_is_left_out_and_named(monkeypatch) -> None:
    monkeypatch.setattr(svgd, "available_bytes", lambda _device: 10_000_000)
    monkeypatch.setattr(baselines, "find_spec", lambda _name: None)
    report = svgd.run_svgd([3, 40], 1000, Clock(CPU), 2, lambda _text: None)
    assert set(report["sizes"]["3"]) == {"ours", "naive", "pyro"}
    assert set(report["sizes"]["40"]) == {"ours"}
    assert [note for note in report["notes"] if note.startswith("M = 40, Pyro's operations repeated (not installed): needs about")]
    assert report["sizes"]["3"]["naive"]["ours_is_faster_by"]["median"] > 0
    assert len(svgd.svgd_rows(report)) == 4
