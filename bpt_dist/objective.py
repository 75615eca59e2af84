"""From logits to the two objectives: log-likelihood, task weights and the priors of the target prompt.

The normalisation of every term, written down here and nowhere else:

- log-likelihood of one sequence, l_n: mean over its target tokens (`token_mean`, "the LM loss") or their sum
  (`token_sum`, the true log-probability). Everything below takes l_n as the unit of likelihood.
- source stage: the score of a particle is the gradient of c (K/kappa) sum_k w_k (1/B) sum_b l_kb, the sum running over
  the kappa tasks of the step. c w_k is `task_weights`; K/kappa and 1/B are in the weights of the batch. With c = 1 each
  task counts as one example; c = `dataset` multiplies task k by |D_k|: the untempered posterior.
- target stage: the likelihood is summed over the data set, the prior counts once:

      J(theta) = - sum_{n in D} l_n + penalty(theta)

  and J/|D| is what is optimised. Its estimate at one step is - (1/B) sum_{n in batch} l_n + penalty(theta)/|D|: the
  unbiased |D|/B times the batch sum, divided by |D|. Hence the penalties below take `num_examples` = |D| and are already
  divided by it, so that learning rates do not depend on the size of the data set while sigma keeps its meaning.
- distillation (MPT): for each sequence lambda (KL + encoder MSE + decoder MSE) joins -l_n under the same weights: the KL is reduced
  over tokens as l_n is, a squared difference of last hidden states is a mean over positions and width.
- targets trained together: sum_k p_k J_k/|D_k|, p_k being the share of target k in the texts of a step (1/K where all targets
  come at every step). The texts bring it in expectation; the penalty of target k is multiplied by p_k, or a sampling in
  proportion to |D_k| would press the prior on small tasks many times harder than the likelihood.
- penalties are negative log densities without the constant (P D / 2) log(2 pi sigma^2), which does not depend on the
  prompt; it is dropped from both, so the mixture of one particle *is* the Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional

Reduction = Literal["token_mean", "token_sum"]
Annealing = Literal["none", "linear", "tanh", "cyclic"]

IGNORED = -100
# D'Angelo & Fortuin (2021) use tanh((1.3 t/T)^p); ours is divided by its last value, so that it ends at exactly 1.
TANH_REACH = 1.3
CYCLES = 4  # of cyclic annealing


def sequence_log_likelihood(
    logits: Float[Tensor, "N U V"], target_ids: Int[Tensor, "N U"], reduction: Reduction, label_smoothing: float = 0.0
) -> Float[Tensor, " N"]:
    """Return log P(Y_n | X_n) of every sequence; targets of -100 are padding and count nothing.

    Accumulates in float32 at least, whatever the logits are. A sequence without target tokens gives 0. With `label_smoothing` e,
    each token counts (1 - e) log p(target) + e mean_v log p(v) (Szegedy et al. 2016): a training objective, no likelihood.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = functional.cross_entropy(
        logits.flatten(0, 1), target_ids.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    ).view_as(target_ids)
    if reduction == "token_sum":
        return -nll.sum(1)
    return -nll.sum(1) / (target_ids != IGNORED).sum(1).clamp_min(1)


def sequence_divergence(
    teacher: Float[Tensor, "N U V"], student: Float[Tensor, "N U V"], target_ids: Int[Tensor, "N U"], reduction: Reduction
) -> Float[Tensor, " N"]:
    """Return KL(teacher || student) of the next-token distributions of every sequence, reduced over its tokens as l_n is."""
    log_q, log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) for logits in (student, teacher))
    mask = target_ids != IGNORED
    total = ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum(1)
    return total if reduction == "token_sum" else total / mask.sum(1).clamp_min(1)


def state_distance(
    teacher: Float[Tensor, "N L D"], student: Float[Tensor, "N L D"], mask: Num[Tensor, "N L"] | Bool[Tensor, "N L"]
) -> Float[Tensor, " N"]:
    """Return the mean squared difference of hidden states of every sequence, over its unmasked positions and the width."""
    wide = torch.promote_types(student.dtype, torch.float32)
    squared = (student.to(wide) - teacher.to(wide)).square().mean(-1)
    return (squared * mask).sum(1) / mask.sum(1).clamp_min(1)


def task_weights(
    sizes: Sequence[int],
    weights: Sequence[float] | None,
    likelihood_scale: float | Literal["dataset"],
) -> list[float]:
    """Return c w_k of every source task, in the order of `sizes` = |D_k|; no `weights` means 1 for each task."""
    chosen = [1.0] * len(sizes) if weights is None else list(weights)
    scales = list(sizes) if likelihood_scale == "dataset" else [likelihood_scale] * len(sizes)
    return [float(weight * scale) for weight, scale in zip(chosen, scales, strict=True)]


def annealing(step: int, steps: int, kind: Annealing) -> float:
    """Return gamma(step), the factor on the score (never on the repulsion); 1 from `steps` on.

    `linear` rises from 0 to 1, `tanh` likewise along tanh(1.3 t/T), `cyclic` rises linearly CYCLES times
    (D'Angelo & Fortuin 2021, annealed SVGD). At gamma = 0 particles only repel each other.
    """
    if kind == "none" or step >= steps:
        return 1.0
    if kind == "linear":
        return step / steps
    if kind == "tanh":
        return math.tanh(TANH_REACH * step / steps) / math.tanh(TANH_REACH)
    return step * CYCLES % steps / steps


def gaussian_penalty(theta: Float[Tensor, "P D"], mean: Float[Tensor, "P D"], sigma: float, num_examples: int) -> Float[Tensor, ""]:
    """Return -log N(theta; mean, sigma^2 I) / num_examples without its constant: |theta - mean|^2 / (2 sigma^2 |D|)."""
    return (theta - mean).square().sum() / (2 * sigma**2 * num_examples)


def mixture_penalty(
    theta: Float[Tensor, "P D"], particles: Float[Tensor, "M P D"], sigma: float, num_examples: int
) -> Float[Tensor, ""]:
    """Return -log 1/M sum_i N(theta; theta_i, sigma^2 I) / num_examples, without the constant of the Gaussian.

    Exact by log-sum-exp; the slides bound it from above by Jensen, which turns it into the Gaussian penalty plus
    mean_i |theta_i - mean|^2 / (2 sigma^2 |D|) and so forgets the spread of the particles.
    """
    squared = (theta - particles).square().flatten(1).sum(1)
    log_density = torch.logsumexp(-squared / (2 * sigma**2), dim=0) - math.log(len(particles))
    return -log_density / num_examples


def sigma_from_relative(mean: Float[Tensor, "P D"], sigma_relative: float) -> float:
    """Return sigma = sigma_relative * RMS(mean): prompt scales differ 50-fold between backbones, so absolute ones do."""
    return sigma_relative * float(mean.double().square().mean().sqrt())


def low_rank_product(
    full: Float[Tensor, "*#task P D"], u: Float[Tensor, "*task R P"], v: Float[Tensor, "*task R D"]
) -> Float[Tensor, "*task P D"]:
    """Return F * sum_r u_r v_r^T (elementwise with F), one prompt for every leading task of u and v that shares F."""
    return full * (u.mT @ v)


def low_rank_ones(
    rank: int, length: int, width: int, generator: torch.Generator
) -> tuple[Float[Tensor, "R P"], Float[Tensor, "R D"]]:
    """Return u [R, P] and v [R, D] with sum_r u_r v_r^T = 1 exactly, so that the prompt starts at F.

    The first pair is all ones. The others are u_r ~ N(0, 1) and v_r = 0, as LoRA starts: v_r gets a gradient at once,
    u_r from the second step on, and the u_r differ from each other. Zeros in both would never move; splitting the
    ones as 1/R over equal pairs would keep all pairs equal, a rank of one for ever.
    """
    u, v = torch.ones(rank, length), torch.zeros(rank, width)
    u[1:] = torch.randn(rank - 1, length, generator=generator)
    v[0] = 1
    return u, v
