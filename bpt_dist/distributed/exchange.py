"""The Stein direction over several ranks: what they send each other, and which part each rank computes.

`all_gather`: every rank receives all particles and scores and computes the rows of its own particles. `coordinates`: every
rank receives a slice of the positions of all particles and scores (P positions in uneven slices), computes that slice of phi
for all particles and sends it back, so that bytes and work of a rank fall with the number of ranks. The kernel needs the
distances of whole prompts: those of the slices are summed in float64. Particles, scores and phi are sent in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.svgd import (
    KernelMatrices,
    KernelOptions,
    PartialSums,
    direction,
    direction_terms,
    kernel_matrices,
    partial_sums,
    squared_distances,
    summarize_partial_sums,
)

Arrival = Callable[[], Float[Tensor, "M p D"]]


class Snapshot(NamedTuple):
    """All particles at one step: the numbers of `svgd_diagnostics`, where they are, and their kernel (mean over positions)."""

    metrics: dict[str, float]
    projection: Float[Tensor, "M n"]
    kernel: Float[Tensor, "M M"]


class Layout(Protocol):
    """Which part of the cloud is on which rank while the direction is computed."""

    positions: slice  # of every prompt, that this rank receives
    rows: slice  # of phi, that it computes

    def start_gather(self, local: Float[Tensor, "m P D"]) -> Arrival:
        """Start to bring the part of all particles to this rank, and return what waits for it (collective)."""

    def sum_slices_(self, part: Tensor) -> Tensor:
        """Return the sum over the slices, which may replace `part` (collective)."""

    def scatter_back(self, phi: Float[Tensor, "n p D"]) -> Float[Tensor, "m P D"]:
        """Return the direction of this rank's particles from the part each rank has computed (collective)."""

    def takes_part(self) -> bool:
        """Return whether this rank has to take part in what is logged."""


class GatheredLayout:
    """Every rank along `particle` has all particles: alone it owns them, else they are gathered."""

    def __init__(self, mesh: Mesh, num_particles: int) -> None:
        self.mesh, self.positions, self.rows = mesh, slice(None), mesh.rows(num_particles)

    def start_gather(self, local: Float[Tensor, "m P D"]) -> Arrival:
        """Start a gather; the result stays what it is when `local` changes."""
        return self.mesh.start_gather_particles(local if self.mesh.particle.size > 1 else local.clone())

    def sum_slices_(self, part: Tensor) -> Tensor:
        """Return `part`: nothing is sliced."""
        return part

    def scatter_back(self, phi: Float[Tensor, "m P D"]) -> Float[Tensor, "m P D"]:
        """Return `phi`: each rank computes the rows it needs."""
        return phi

    def takes_part(self) -> bool:
        """Only rank 0, which has all particles."""
        return self.mesh.world.rank == 0


class SlicedLayout:
    """Every rank along `particle` has a slice of the positions of all particles."""

    def __init__(self, mesh: Mesh, num_particles: int, num_positions: int) -> None:
        self.mesh, self.num_local, self.rows = mesh, num_particles // mesh.particle.size, slice(0, num_particles)
        self.slices = slices(num_positions, mesh.particle.size)
        self.positions = self.slices[mesh.particle.index]

    def start_gather(self, local: Float[Tensor, "m P D"]) -> Arrival:
        """Start to send each rank its positions of this rank's particles."""
        own, width = self.positions.stop - self.positions.start, local.shape[2]
        wait = self.mesh.start_all_to_all(
            [local[:, positions] for positions in self.slices], [self.num_local * own * width] * len(self.slices)
        )
        return lambda: wait().view(-1, own, width)  # what comes, rank after rank, are the particles in their order

    def sum_slices_(self, part: Tensor) -> Tensor:
        """Sum over the ranks."""
        return self.mesh.sum_over_particles_(part)

    def scatter_back(self, phi: Float[Tensor, "M p D"]) -> Float[Tensor, "m P D"]:
        """Send each rank the rows of its particles, and join what arrives for the particles of this rank."""
        width, lengths = phi.shape[2], [positions.stop - positions.start for positions in self.slices]
        sizes = [self.num_local * length * width for length in lengths]
        parts = self.mesh.start_all_to_all(phi.chunk(len(lengths)), sizes)().split(sizes)
        return torch.cat([part.view(-1, length, width) for part, length in zip(parts, lengths, strict=True)], dim=1)

    def takes_part(self) -> bool:
        """Every rank, because each has a slice."""
        return True


def slices(num_positions: int, num_ranks: int) -> list[slice]:
    """Return the positions of each rank; ConfigError when there are fewer than ranks."""
    if num_positions < num_ranks:
        raise ConfigError(
            f"distribution.exchange: coordinates gives each of {num_ranks} ranks a slice of {num_positions} prompt position(s); "
            f"use all_gather, at most {num_positions} rank(s) along distribution.mesh.particle, or a longer prompt"
        )
    bounds = [num_positions * rank // num_ranks for rank in range(num_ranks + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class SteinExchange:
    """One source stage's Stein directions: from this rank's particles and scores to the direction of this rank's particles."""

    def __init__(self, mesh: Mesh, num_particles: int, num_positions: int, rule: KernelOptions) -> None:
        """Raise ConfigError when there are more ranks than positions to slice."""
        self.mesh, self.num_positions, self.rule = mesh, num_positions, rule
        sliced = mesh.exchange == "coordinates" and mesh.particle.size > 1
        self.layout: Layout = SlicedLayout(mesh, num_particles, num_positions) if sliced else GatheredLayout(mesh, num_particles)
        self.arriving: Arrival | None = None
        self._axes: Float[Tensor, "E n"] | None = None  # of the picture

    def begin(self, local: Float[Tensor, "m P D"]) -> None:
        """Start to send the particles, which runs beside the forward pass; they must not change until `direction` (collective)."""
        if self.arriving:
            self.arriving()  # of a step that was skipped
        self.arriving = self.layout.start_gather(local)

    def direction(self, local: Float[Tensor, "m P D"], score: Float[Tensor, "m P D"]) -> Float[Tensor, "m P D"]:
        """Return phi of this rank's particles (collective: every rank)."""
        arriving, self.arriving = self.arriving or self.layout.start_gather(local), None
        self.particles = arriving()
        scores = self.layout.start_gather(score)  # sent while the kernel is computed
        self.weights = self._weights()  # kept for the diagnostics: the kernel of many particles takes seconds
        self.score = scores()
        return self.layout.scatter_back(direction(self.particles, self.score, self.weights, self.rule, self.layout.rows))

    def _weights(self) -> KernelMatrices:
        squared = squared_distances(self.particles, self.rule.scope)
        return kernel_matrices(self.layout.sum_slices_(squared) if self.rule.scope == "prompt" else squared, self.rule)

    def diagnostics(self, draw_axes: Callable[[], Float[Tensor, "P D n"]]) -> Snapshot | None:
        """Return the diagnostics of the last direction and its particles, projected on the axes that `draw_axes` returns.

        A rank draws the axes once, and only if it has a part in the picture.

        Collective: every rank calls. With gathered particles only rank 0 returns a snapshot, and nothing is sent.
        """
        if not self.layout.takes_part():
            return None
        direction = direction_terms(self.particles, self.score, self.weights, self.rule)
        sums = partial_sums(direction, self.particles, self.num_positions)
        if self._axes is None:
            self._axes = draw_axes()[self.layout.positions].flatten(0, 1).to(self.particles)
        projection = self.particles.flatten(1) @ self._axes
        parts = [*sums, projection.double()]
        flat = self.layout.sum_slices_(torch.cat([part.reshape(-1) for part in parts]))
        whole = [piece.view_as(part) for piece, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
        total = PartialSums(*whole[:-1])
        return Snapshot(summarize_partial_sums(total, self.num_positions * self.particles.shape[2]), whole[-1], total.kernel)
