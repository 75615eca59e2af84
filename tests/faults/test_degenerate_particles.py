"""F23: whatever the particles are, the direction is finite or refused; one particle is plain gradient ascent, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from fault_figures import record_figure

from bpt_dist.svgd import stein_direction


def drawn(rng: random.Random, generator: torch.Generator) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Return (kind, particles, score) of one random degenerate set."""
    num, length, width = rng.choice((1, 2, 3, 5, 8)), rng.choice((1, 3)), rng.choice((1, 4, 16))
    particles = torch.randn(num, length, width, generator=generator)
    score = torch.randn(num, length, width, generator=generator) * 10 ** rng.uniform(-8, 8)
    kind = rng.choice(("equal", "two equal", "far", "near", "huge", "tiny", "on a line", "zero", "half-precision range"))
    if kind == "equal":
        particles = particles[:1].expand_as(particles).clone()
    elif kind == "two equal":
        particles[-1] = particles[0]
    elif kind == "far":
        particles[-1] += 1e15
    elif kind == "near":
        particles = particles[:1] + 1e-20 * particles
    elif kind == "huge":
        particles *= 1e17
    elif kind == "tiny":
        particles *= 1e-30
    elif kind == "on a line":
        particles = torch.arange(num).float().view(-1, 1, 1) * particles[:1]
    elif kind == "zero":
        particles.zero_()
    else:
        particles *= 65504.0
    return kind, particles, score


def direction(particles: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return stein_direction(particles, score).phi


def test_a_thousand_random_sets() -> None:
    rng, generator = random.Random(23), torch.Generator().manual_seed(23)
    broken = []
    for _ in range(1000):
        kind, particles, score = drawn(rng, generator)
        if not torch.isfinite(direction(particles, score)).all():
            broken.append((kind, tuple(particles.shape)))
    record_figure("F23", "random degenerate sets", trials=1000, passed=1000 - len(broken), non_finite=len(broken))
    assert broken == []


def test_one_particle_is_gradient_ascent_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    same = 0
    for _ in range(100):
        particle, score = torch.randn(1, 3, 16, generator=generator), torch.randn(1, 3, 16, generator=generator)
        same += torch.equal(direction(particle, score), score)
    record_figure("F23", "one particle equals gradient ascent", trials=100, passed=same)
    assert same == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="keep float32"):
        direction(torch.randn(3, 2, 4).to(dtype), torch.randn(3, 2, 4).to(dtype))
