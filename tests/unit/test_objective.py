"""The objectives against loops, scipy densities, finite differences and closed-form gradients."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from bpt_dist.objective import (
    annealing,
    gaussian_penalty,
    low_rank_ones,
    low_rank_product,
    mixture_penalty,
    sequence_log_likelihood,
    sigma_from_relative,
    task_weights,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- log-likelihood -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
def test_log_likelihood_equals_a_loop_over_softmax_probabilities(reduction):
    logits = draw(3, 4, 7)
    targets = torch.tensor([[1, 2, 3, 0], [6, -100, -100, -100], [5, 0, -100, -100]])
    expected = []
    for n in range(3):
        probabilities = [logits[n, u].softmax(0)[t].log() for u, t in enumerate(targets[n]) if t >= 0]
        expected.append(sum(probabilities) / (len(probabilities) if reduction == "token_mean" else 1))
    torch.testing.assert_close(sequence_log_likelihood(logits, targets, reduction), torch.stack(expected))


def test_token_mean_over_one_sequence_is_minus_the_lm_loss_of_transformers():
    """T5's own loss is cross entropy over all target tokens; for one sequence that is our token_mean."""
    logits, targets = draw(1, 5, 11), torch.tensor([[3, 1, 10, -100, -100]])
    loss = torch.nn.CrossEntropyLoss(ignore_index=-100)(logits.view(-1, 11), targets.view(-1))
    torch.testing.assert_close(sequence_log_likelihood(logits, targets, "token_mean")[0], -loss)


def test_half_precision_logits_are_summed_in_float32():
    logits = (10 * draw(2, 400, 9)).to(torch.bfloat16)
    targets = torch.randint(0, 9, (2, 400), generator=torch.Generator().manual_seed(1))
    result = sequence_log_likelihood(logits, targets, "token_sum")
    assert result.dtype is torch.float32
    expected = sequence_log_likelihood(logits.double(), targets, "token_sum")
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)


def test_a_sequence_without_targets_counts_nothing():
    targets = torch.full((2, 3), -100)
    logits = draw(2, 3, 5).requires_grad_()
    for reduction in ("token_mean", "token_sum"):
        result = sequence_log_likelihood(logits, targets, reduction)
        (gradient,) = torch.autograd.grad(result.sum(), logits)
        assert not result.any()
        assert not gradient.any()


# ---- weights and annealing ------------------------------------------------------------------------------------------


def test_task_weights_are_scale_times_weight_and_dataset_means_the_number_of_examples():
    assert task_weights([100, 20], None, 1.0) == [1.0, 1.0]
    assert task_weights([100, 20], [0.5, 2.0], 3.0) == [1.5, 6.0]
    assert task_weights([100, 20], None, "dataset") == [100.0, 20.0]
    assert task_weights([100, 20], [0.5, 2.0], "dataset") == [50.0, 40.0]
    with pytest.raises(ValueError, match="zip"):
        task_weights([100, 20], [1.0], 1.0)


def test_annealing_runs_from_zero_to_one_and_stays_there():
    for kind in ("linear", "tanh"):
        values = [annealing(step, 100, kind) for step in range(130)]
        assert values[0] == 0
        assert values[100:] == [1.0] * 30
        assert all(later > earlier for earlier, later in itertools.pairwise(values[:101]))
        assert values[99] > 0.98
    assert [annealing(step, 100, "none") for step in (0, 50, 200)] == [1.0] * 3
    assert annealing(50, 100, "linear") == 0.5
    assert annealing(50, 100, "tanh") == pytest.approx(math.tanh(0.65) / math.tanh(1.3))


def test_cyclic_annealing_repeats_and_ends_at_one():
    values = [annealing(step, 100, "cyclic") for step in range(101)]
    assert values[:25] == values[25:50] == values[75:100]
    assert values[:25] == pytest.approx([step / 25 for step in range(25)])
    assert values[100] == 1.0


# ---- priors ---------------------------------------------------------------------------------------------------------


def test_penalties_are_minus_log_densities_without_the_gaussian_constant():
    theta, particles, sigma, num_examples = draw(2, 3), draw(4, 2, 3, seed=1), 0.7, 50
    constant = 3 * math.log(2 * math.pi * sigma**2)  # (P D / 2) log(2 pi sigma^2) with P D = 6
    flat, covariance = theta.flatten().numpy(), sigma**2 * numpy.eye(6)
    log_densities = [multivariate_normal(p.flatten().numpy(), covariance).logpdf(flat) for p in particles]
    gaussian = float(gaussian_penalty(theta, particles[0], sigma, num_examples))
    assert gaussian * num_examples == pytest.approx(-log_densities[0] - constant)
    mixture = float(mixture_penalty(theta, particles, sigma, num_examples))
    assert mixture * num_examples == pytest.approx(-math.log(numpy.exp(log_densities).mean()) - constant)


def test_the_mixture_of_one_particle_is_the_gaussian():
    theta, particle = draw(5, 8), draw(1, 5, 8, seed=1)
    expected = gaussian_penalty(theta, particle[0], 0.3, 7)
    torch.testing.assert_close(mixture_penalty(theta, particle, 0.3, 7), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_the_mixture_gradient_is_responsibility_weighted(sigma):
    """d/d theta = sum_i r_i (theta - theta_i) / (sigma^2 |D|), r = softmax(-d2 / 2 sigma^2); finite even when far."""
    theta, particles = draw(3, 4).requires_grad_(), 2 * draw(5, 3, 4, seed=1)
    (actual,) = torch.autograd.grad(mixture_penalty(theta, particles, sigma, 20), theta)
    offset = theta.detach() - particles
    responsibility = torch.softmax(-offset.square().sum((1, 2)) / (2 * sigma**2), dim=0)
    torch.testing.assert_close(actual, (responsibility[:, None, None] * offset).sum(0) / (sigma**2 * 20))


@pytest.mark.parametrize("seed", range(20))
def test_jensens_bound_of_the_slides_holds_and_forgets_the_spread(seed):
    theta, particles = draw(3, 4, seed=seed), draw(5, 3, 4, seed=100 + seed)
    mean, sigma, num_examples = particles.mean(0), 0.5 + seed / 10, 10
    spread = (particles - mean).square().flatten(1).sum(1).mean() / (2 * sigma**2 * num_examples)
    bound = gaussian_penalty(theta, mean, sigma, num_examples) + spread
    each = torch.stack([gaussian_penalty(theta, particle, sigma, num_examples) for particle in particles])
    torch.testing.assert_close(bound, each.mean())
    assert float(mixture_penalty(theta, particles, sigma, num_examples)) < float(bound)


def test_relative_sigma_is_in_units_of_the_prompts_root_mean_square():
    mean = 3 * draw(4, 5)
    assert sigma_from_relative(mean, 0.5) == pytest.approx(0.5 * math.sqrt(float((mean**2).sum()) / 20))


# ---- low rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_factors_start_at_exactly_one_and_every_pair_can_move(rank):
    u, v = low_rank_ones(rank, 100, 768, torch.Generator().manual_seed(0))
    full = draw(100, 768, seed=1, dtype=torch.float32)
    assert (u.shape, v.shape) == ((rank, 100), (rank, 768))
    assert torch.equal(low_rank_product(full, u, v), full)
    # One step of gradient descent on a random linear function, then every factor has a gradient.
    direction = draw(100, 768, seed=2, dtype=torch.float32)
    for step in range(2):
        u, v = u.requires_grad_(), v.requires_grad_()
        du, dv = torch.autograd.grad((direction * low_rank_product(full, u, v)).sum(), (u, v))
        assert dv.abs().amax(1).min() > 0
        assert step == 0 or du.abs().amax(1).min() > 0
        u, v = (u - 0.1 * du).detach(), (v - 0.1 * dv).detach()
    assert torch.linalg.matrix_rank(u.double().T @ v.double()) == rank


def test_low_rank_product_equals_a_loop_and_tasks_share_the_full_factor():
    full, u, v = draw(3, 4), draw(2, 5, 3, seed=1), draw(2, 5, 4, seed=2)
    expected = torch.stack([full * sum(torch.outer(u[t, r], v[t, r]) for r in range(5)) for t in range(2)])
    torch.testing.assert_close(low_rank_product(full, u, v), expected)
    torch.testing.assert_close(low_rank_product(full, u[1], v[1]), expected[1])


# ---- the whole target objective -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["gaussian", "mixture"])
@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
def test_the_target_objective_has_the_gradient_of_finite_differences(reduction, prior):
    """J/|D| of F, u and v for a linear softmax model: likelihood, prior and low-rank product together."""
    num_examples, projection = (
        40,
        draw(6, 3, 4, 4, 5, seed=9),
    )  # 6 sequences of 4 target tokens, vocabulary of 5
    targets = torch.tensor([[1, 2, 4, -100]] * 3 + [[0, -100, -100, -100]] * 3)
    particles = draw(3, 3, 4, seed=7)

    def objective(full: Tensor, u: Tensor, v: Tensor) -> Tensor:
        theta = low_rank_product(full, u, v)
        logits = torch.einsum("npduv,pd->nuv", projection, theta)
        likelihood = sequence_log_likelihood(logits, targets, reduction).mean()
        if prior == "gaussian":
            return -likelihood + gaussian_penalty(theta, particles.mean(0), 0.8, num_examples)
        return -likelihood + mixture_penalty(theta, particles, 0.8, num_examples)

    parameters = [x.requires_grad_() for x in (draw(3, 4, seed=1), draw(2, 3, seed=2), draw(2, 4, seed=3))]
    assert torch.autograd.gradcheck(objective, parameters, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_step_estimate_of_the_target_objective_is_unbiased():
    """Average over all batches of (minus batch mean + penalty/|D|) = (minus sum over D + penalty) / |D|."""
    logits, targets = draw(12, 2, 5), torch.randint(0, 5, (12, 2), generator=torch.Generator().manual_seed(0))
    theta, mean = draw(2, 3, seed=1), draw(2, 3, seed=2)
    likelihood = sequence_log_likelihood(logits, targets, "token_sum")
    whole = -likelihood.sum() + (theta - mean).square().sum() / (2 * 0.5**2)
    steps = [-batch.mean() + gaussian_penalty(theta, mean, 0.5, 12) for batch in likelihood.split(3)]
    torch.testing.assert_close(torch.stack(steps).mean(), whole / 12)
