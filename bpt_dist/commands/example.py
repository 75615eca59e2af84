"""`bpt-dist example`: the slides' counter-example, where the mean of all task optima misses the posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import typer
from jaxtyping import Float
from scipy import optimize
from torch import Tensor

from bpt_dist.artifacts.figures import GREY, INK, PALETTE, _mark, canvas
from bpt_dist.commands.output import print_list
from bpt_dist.svgd import initial_particles, stein_direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


# Every task: centre of its posterior, angle of its long axis in degrees, standard deviations along and across it.
TASKS = (((-2.0, -1.0), 48.0, 2.5, 0.35), ((0.0, -1.6), 84.0, 2.5, 0.35), ((2.2, -1.1), 128.0, 2.5, 0.35))
RMS_DECAY = 0.9
RMS_FLOOR = 1e-6


@dataclass(frozen=True)
class GaussianProduct:
    """What `run` computed: the closed form, what SVGD found, and what averages can reach.

    `paths` holds the particles at every recorded step, S of them from the start on. Distances are Euclidean.
    """

    means: Float[Tensor, "K 2"]
    covariances: Float[Tensor, "K 2 2"]
    product_mean: Float[Tensor, "2"]
    product_covariance: Float[Tensor, "2 2"]
    weights: list[float]
    paths: Float[Tensor, "S M 2"] = field(repr=False)

    @property
    def particles(self) -> Float[Tensor, "M 2"]:
        """Return the particles of the last step."""
        return self.paths[-1]

    @property
    def svgd_mean(self) -> Float[Tensor, "2"]:
        """Return the mean particle of the last step: what BPT hands over to its target tasks."""
        return self.particles.mean(0)

    @property
    def best_average(self) -> Float[Tensor, "2"]:
        """Return the convex combination of task optima that comes closest to the product's mean."""
        return torch.tensor(self.weights, dtype=self.means.dtype) @ self.means

    def points(self) -> dict[str, Float[Tensor, "2"]]:
        """Return the candidates for a start of the target prompt by name, in the order of a printed table."""
        distances = (self.means - self.product_mean).norm(dim=1)
        return {
            "closed form": self.product_mean,
            "mean of SVGD particles": self.svgd_mean,
            "best weighted average of task optima": self.best_average,
            "plain average of task optima": self.means.mean(0),
            "nearest task optimum": self.means[int(distances.argmin())],
        }

    @property
    def svgd_error(self) -> float:
        """Return the distance of the mean particle from the product's mean."""
        return float((self.svgd_mean - self.product_mean).norm())

    @property
    def average_error(self) -> float:
        """Return the distance by which every average of task optima misses the product's mean."""
        return float((self.best_average - self.product_mean).norm())


def run(seed: int = 0, num_particles: int = 50, steps: int = 500, rate: float = 0.1) -> GaussianProduct:
    """Sample the product of the task posteriors by SVGD and compare with the closed form and the best average.

    Particles start around the plain average of the task optima, where averaging methods would stop. The step
    falls linearly from `rate` to zero, so that they come to rest.
    """
    means, covariances = task_posteriors()
    precisions = covariances.inverse()
    product_mean, product_covariance = product(means, precisions)

    def score(particles: Float[Tensor, "M 1 2"]) -> Float[Tensor, "M 1 2"]:
        offsets = means[:, None, None] - particles  # [K, M, 1, 2]
        return torch.einsum("kde,kmpe->mpd", precisions, offsets)

    generator = torch.Generator().manual_seed(seed)
    particles = initial_particles(means.mean(0, keepdim=True), num_particles, 1.0, generator)
    paths, history = [particles], None
    for step in range(steps):
        phi = stein_direction(particles, score(particles)).phi
        history = phi**2 if history is None else RMS_DECAY * history + (1 - RMS_DECAY) * phi**2
        particles = particles + rate * (1 - step / steps) * phi / (RMS_FLOOR + history.sqrt())
        paths.append(particles)
    return GaussianProduct(
        means=means,
        covariances=covariances,
        product_mean=product_mean,
        product_covariance=product_covariance,
        weights=best_convex_weights(means, product_mean),
        paths=torch.stack(paths)[:, :, 0],
    )


def task_posteriors() -> tuple[Float[Tensor, "K 2"], Float[Tensor, "K 2 2"]]:
    """Return mean and covariance of every task of the example."""
    means = torch.tensor([centre for centre, *_ in TASKS], dtype=torch.float64)
    covariances = []
    for _, degrees, along, across in TASKS:
        angle = math.radians(degrees)
        axes = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
        covariances.append(axes @ torch.diag(torch.tensor([along, across], dtype=torch.float64) ** 2) @ axes.T)
    return means, torch.stack(covariances)


def product(means: Float[Tensor, "K E"], precisions: Float[Tensor, "K E E"]) -> tuple[Float[Tensor, " E"], Float[Tensor, "E E"]]:
    """Return mean and covariance of the normalised product of Gaussians: precisions add (slides, page 5)."""
    total = precisions.sum(0)
    weighted = torch.einsum("kde,ke->d", precisions, means)
    return torch.linalg.solve(total, weighted), total.inverse()


def best_convex_weights(points: Float[Tensor, "K E"], goal: Float[Tensor, " E"]) -> list[float]:
    """Return the weights (>= 0, sum 1) whose average of `points` is nearest to `goal`.

    Exact, by non-negative least squares: minimise |sum_k v_k (p_k - goal)|^2 + (sum_k v_k - 1)^2 over v >= 0. For weights
    w at distance d and v = s w the minimum over s is d^2 / (1 + d^2), which grows with d: v / sum(v) is the answer.
    """
    shifted = (points - goal).double()
    system = torch.cat([shifted.T, torch.ones(1, len(points), dtype=torch.float64)]).numpy()
    right = [0.0] * shifted.shape[1] + [1.0]
    cone, _ = optimize.nnls(system, right)
    return (cone / cone.sum()).tolist()


def gaussian_product(result: GaussianProduct, path: Path) -> Path:
    """Draw the slides' counter-example: task posteriors, their product, particles on their way, and what averages reach."""
    with canvas((7.6, 5.8), path) as figure:
        _draw_product(figure.subplots(), result)
    return path


def _draw_product(axes: Axes, result: GaussianProduct) -> None:
    from matplotlib.patches import Polygon
    from scipy.spatial import ConvexHull

    means, paths = result.means.numpy(), result.paths.numpy()
    hull = means[ConvexHull(means).vertices]
    axes.add_patch(Polygon(hull, color=GREY, alpha=0.25, linewidth=0, label="all averages of optima"))
    for k, covariance in enumerate(result.covariances.numpy()):
        colour = PALETTE[k % len(PALETTE)]
        _ellipses(axes, means[k], covariance, edgecolor=colour)
        _mark(axes, means[k], color=colour, s=42, zorder=4, label=f"optimum of task {k}")
    for m in range(paths.shape[1]):
        axes.plot(*paths[:, m].T, color=GREY, alpha=0.35, linewidth=0.6, zorder=2)
    axes.scatter(paths[-1, :, 0], paths[-1, :, 1], color=PALETTE[4], s=9, zorder=3, label="SVGD particles")
    _ellipses(axes, result.product_mean.numpy(), result.product_covariance.numpy(), edgecolor=INK, zorder=4)
    best, goal = result.best_average.numpy(), result.product_mean.numpy()
    axes.plot(*numpy.stack([best, goal]).T, color=PALETTE[3], linestyle=(0, (4, 2)), linewidth=1.2, zorder=4)
    _mark(axes, result.svgd_mean, marker="*", facecolor="white", edgecolor=INK, s=300, zorder=5, label="mean SVGD particle")
    _mark(axes, goal, marker="+", color=INK, s=70, linewidth=1.6, zorder=6, label="mean of the product")
    _mark(axes, best, marker="X", color=PALETTE[3], edgecolor="white", s=95, zorder=6, label="best average of optima")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(
        f"From the mean of the product of task posteriors, SVGD's mean particle is {result.svgd_error:.1g} away,\n"
        f"the best weighted average of task optima {result.average_error:.2g}. Contours: 1 and 2 standard deviations"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _ellipses(axes: Axes, mean: numpy.ndarray, covariance: numpy.ndarray, **style: Any) -> None:
    """Draw the contours of a Gaussian at one (thick) and two (thin) standard deviations."""
    from matplotlib.patches import Ellipse

    variances, directions = numpy.linalg.eigh(covariance)
    angle = numpy.degrees(numpy.arctan2(directions[1, 1], directions[0, 1]))
    for level, linewidth in ((1, 1.6), (2, 0.8)):
        height, width = 2 * level * numpy.sqrt(variances)
        axes.add_patch(Ellipse((mean[0], mean[1]), width, height, angle=angle, facecolor="none", linewidth=linewidth, **style))
    axes.autoscale_view()


def print_gaussian_product(out: Path, seed: int) -> None:
    """Print candidates for a start of the target prompt with their distance from the product's mean, and draw them."""
    result = run(seed)
    rows = []
    for name, point in result.points().items():
        distance = float((point - result.product_mean).norm())
        rows.append((name, f"{point[0]:.3f}", f"{point[1]:.3f}", f"{distance:.4f}"))
    print_list(("start of the target prompt", "x", "y", "distance from the product's mean"), rows, right=(1, 2, 3))
    typer.echo(gaussian_product(result, out))
