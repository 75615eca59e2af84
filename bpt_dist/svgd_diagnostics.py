"""The numbers logged about a cloud of particles: is it alive, and does repulsion matter beside the score?

They are made of sums over coordinates, so a rank that holds a slice of every prompt brings its share of each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.svgd import Direction, median, pairs


class Totals(NamedTuple):
    """Sums over coordinates, in float64: those of the slices of a prompt add up to those of whole prompts."""

    squared_distances: Float[Tensor, "M M"]  # between whole prompts, whatever the scope
    kernel: Float[Tensor, "M M"]  # mean over positions, as the bandwidth
    bandwidth: Float[Tensor, ""]
    driving: Float[Tensor, " m"]  # squared norms, one a particle, as the next two
    repulsive: Float[Tensor, " m"]
    particles: Float[Tensor, " M"]
    mean: Float[Tensor, ""]  # squared norm of the mean particle
    deviation: Float[Tensor, ""]  # squares of all coordinates' deviations from the mean particle


def diagnostics(direction: Direction, particles: Float[Tensor, "M P D"]) -> dict[str, float]:
    """Return the numbers of whole prompts.

    Distances are between whole prompts whatever the scope (0 without pairs). `bandwidth` and `kernel_off_diagonal` are
    means over positions for scope `token`. `driving_norm`, `repulsive_norm` and `mean_norm` are means over particles
    of Euclidean norms (the first two over the rows in `direction`). `spread` is the root mean square deviation of a
    coordinate from the mean particle, in the units of the prompt.
    """
    return diagnostics_of(totals(direction, particles, particles.shape[1]), particles[0].numel())


@torch.no_grad()
def totals(direction: Direction, particles: Float[Tensor, "M p D"], num_positions: int) -> Totals:
    """Return the sums of a slice of p of the `num_positions` P positions; p = P for whole prompts."""
    squared, kernel = (part.double() for part in (direction.squared_distances, direction.kernel))
    width, mean = direction.bandwidth.double(), particles.mean(0)
    share = particles.shape[1] / num_positions
    if width.dim() == 0:  # one kernel for whole prompts: each slice brings its share of what all slices know
        squared, kernel, width = squared * share, kernel * share, width * share
    else:
        squared, kernel, width = squared.sum(0), kernel.sum(0) / num_positions, width.sum(0) / num_positions
    driving, repulsive, norms = (_squared_norms(term) for term in (direction.driving, direction.repulsive, particles))
    deviation = _squared_norms(particles - mean).sum()
    return Totals(squared, kernel, width, driving, repulsive, norms, _squared_norms(mean[None])[0], deviation)


def diagnostics_of(found: Totals, num_coordinates: int) -> dict[str, float]:
    """Return what `diagnostics` does from the sums over all P*D `num_coordinates` of a prompt."""
    distances, off_diagonal = pairs(found.squared_distances).sqrt(), pairs(found.kernel)
    has_pairs = distances.numel() > 0
    return {
        "distance_min": float(distances.min()) if has_pairs else 0.0,
        "distance_median": float(median(distances)) if has_pairs else 0.0,
        "distance_max": float(distances.max()) if has_pairs else 0.0,
        "bandwidth": float(found.bandwidth),
        "kernel_off_diagonal": float(off_diagonal.mean()) if has_pairs else 0.0,
        "driving_norm": float(found.driving.sqrt().mean()),
        "repulsive_norm": float(found.repulsive.sqrt().mean()),
        "spread": math.sqrt(float(found.deviation) / (len(found.particles) * num_coordinates)),
        "norm_of_mean": math.sqrt(float(found.mean)),
        "mean_norm": float(found.particles.sqrt().mean()),
    }


def _squared_norms(tensor: Float[Tensor, "m P D"]) -> Float[Tensor, " m"]:
    """Return squared Euclidean norms, in float64 so that large prompts do not overflow."""
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).square()
