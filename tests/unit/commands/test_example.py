"""The slides' counter-example: the check that the mathematics of BPT is right."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy import integrate, optimize

from bpt_dist.commands.example import best_convex_weights, product, run, task_posteriors


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_particle_approaches_the_product_and_every_average_misses_it(seed):
    result = run(seed)
    assert result.svgd_error < 0.01
    assert result.average_error > 5 * result.svgd_error
    # Visible in units of the posterior too: several standard deviations away.
    assert result.average_error > 5 * float(result.product_covariance.diagonal().max().sqrt())


def test_the_particles_have_the_covariance_of_the_product():
    result = run(num_particles=100)
    torch.testing.assert_close(result.particles.T.cov(), result.product_covariance, rtol=0.2, atol=0.005)


def test_the_closed_form_is_the_mean_of_the_multiplied_densities():
    """Numerical integration of the product of the three densities, no precision matrix involved."""
    means, covariances = (value.numpy() for value in task_posteriors())
    inverses = [numpy.linalg.inv(covariance) for covariance in covariances]

    def density(y: float, x: float) -> float:
        offsets = numpy.array([x, y]) - means
        return float(numpy.exp(-sum(o @ inverse @ o for o, inverse in zip(offsets, inverses, strict=True)) / 2))

    grid = numpy.linspace(-4, 4, 401)
    values = numpy.array([[density(y, x) for y in grid] for x in grid])
    mass = integrate.simpson(integrate.simpson(values, x=grid), x=grid)
    first = integrate.simpson(integrate.simpson(values * grid[:, None], x=grid), x=grid) / mass
    second = integrate.simpson(integrate.simpson(values * grid[None], x=grid), x=grid) / mass
    mean, _ = product(*(torch.from_numpy(a) for a in (means, numpy.stack(inverses))))
    assert mean.tolist() == pytest.approx([first, second], abs=1e-8)


def test_equal_covariances_are_the_case_where_averaging_works():
    """The slides: only then is the product's mean an average of the optima."""
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    precision = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    mean, covariance = product(means, precision.expand(3, 2, 2))
    torch.testing.assert_close(mean, means.mean(0))
    torch.testing.assert_close(covariance, precision.inverse() / 3)
    assert best_convex_weights(means, mean) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("seed", range(10))
def test_best_average_equals_a_general_constrained_solver(seed):
    generator = torch.Generator().manual_seed(seed)
    points, goal = (
        torch.randn((6, 3), generator=generator).double(),
        torch.randn(3, generator=generator).double(),
    )
    goal = goal * (1 + seed)  # inside the hull for some seeds, far outside for others
    weights = numpy.array(best_convex_weights(points, goal))
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    solved = optimize.minimize(
        lambda w: ((w @ points.numpy() - goal.numpy()) ** 2).sum(),
        numpy.full(6, 1 / 6),
        method="SLSQP",
        bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    ours = ((weights @ points.numpy() - goal.numpy()) ** 2).sum()
    assert ours == pytest.approx(solved.fun, rel=1e-6, abs=1e-9)


def test_the_same_seed_gives_the_same_particles():
    assert torch.equal(run(1, num_particles=5, steps=20).paths, run(1, num_particles=5, steps=20).paths)


def test_points_are_named_and_ordered_for_the_printed_table():
    result = run(num_particles=10, steps=50)
    errors = [float((point - result.product_mean).norm()) for point in result.points().values()]
    assert list(result.points())[:3] == [
        "closed form",
        "mean of SVGD particles",
        "best weighted average of task optima",
    ]
    assert errors[0] == 0
    assert errors[2] == min(errors[2:]) == result.average_error
