"""Shapes of the mesh: which (particle, data) grids a number of processes can form. Never imports torch."""

from __future__ import annotations

import math

from bpt_dist.errors import ConfigError


def mesh_shape(num_particles: int, num_ranks: int, explicit: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the axes (particle, data) of a mesh; their product is `num_ranks` and the first divides `num_particles`.

    Without an `explicit` shape the particle axis is gcd(M, W): equal work and no padding. Raises ConfigError naming the shapes that
    are possible when an explicit one divides neither the particles nor the world.
    """
    if explicit is None:
        particle = math.gcd(num_particles, num_ranks)
        return particle, num_ranks // particle
    particle, data = explicit
    if particle * data != num_ranks or num_particles % particle:
        possible = [(a, num_ranks // a) for a in range(1, num_ranks + 1) if num_ranks % a == 0 and num_particles % a == 0]
        raise ConfigError(
            f"distribution.mesh {particle} x {data} does not fit {num_particles} particle(s) on {num_ranks} process(es); "
            f"possible (particle x data): {', '.join(f'{a} x {c}' for a, c in possible)}"
        )
    return explicit
