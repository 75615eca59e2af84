"""Stein Variational Gradient Descent (Liu & Wang 2016) on soft-prompt particles: pure tensor functions.

Conventions, fixed here once (other libraries differ; the golden test states their numbers beside ours):

- kernels of the squared distance d2 and the bandwidth h, which has units of *squared* distance:
  `rbf` k = exp(-d2/h), `imq` k = (1 + d2/h)^(-1/2);
- median bandwidth h = median over pairs i<j of d2, divided by log(M+1), never differentiated; an even number of
  pairs takes the mean of the two middle values (as numpy, not as torch); one particle gives h = 1;
- scope `prompt`: one kernel for a whole prompt; `token`: an independent kernel for every prompt position;
- form `svgd`: phi_i = 1/M sum_j [k(x_j, x_i) s_j + grad_{x_j} k(x_j, x_i)];
  form `repulsive_ensemble` (D'Angelo & Fortuin 2021): phi_i = s_i - sum_j grad_{x_i} k(x_i, x_j) / sum_j k(x_i, x_j).

Both kernels satisfy grad_{x_j} k(x_j, x_i) = g_ij (x_i - x_j) with a non-negative `slope` g_ij = -2 dk/d(d2).

Rows of the direction do not depend on how particles are split over ranks: every rank computes the whole M x M
kernel from the whole particle set, and each row of phi is summed in the one order j = 0 .. M-1. Up to PAIRWISE_LIMIT
particles every operation on the way is a single correctly rounded one, so this asks nothing of a BLAS; above it matrix
products run on aligned tiles of TILE_ROWS whole rows, so that a row always meets a product of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Literal["rbf", "imq"]
Scope = Literal["prompt", "token"]
Form = Literal["svgd", "repulsive_ensemble"]

PAIRWISE_LIMIT = 16
TILE_ROWS = 16
CHUNK_ELEMENTS = 1 << 22
# Coincident particles have median 0. 2/h must stay finite in float32 even when summed over thousands of particles,
# and no float32 prompts of any use are closer than 1e-15, so the floor never bites where it matters.
BANDWIDTH_FLOOR = 1e-30
# Above PAIRWISE_LIMIT particles x_i - x_j is a difference of float64 products, exact to 1e-16 of the cloud; with h below
# this share of the largest d2 its rounding, multiplied by 2/h, would push coincident particles apart.
RELATIVE_FLOOR = 1e-10


class Direction(NamedTuple):
    """The Stein direction with everything computed on the way, so that diagnostics cost nothing twice.

    `phi = driving + repulsive` holds only the rows asked for (M of them by default); `kernel` and `squared_distances`
    always hold all pairs, with a leading position axis P when the scope is `token`; `bandwidth` likewise.
    """

    phi: Float[Tensor, "m P D"]
    driving: Float[Tensor, "m P D"]
    repulsive: Float[Tensor, "m P D"]
    kernel: Float[Tensor, "*scope M M"]
    bandwidth: Float[Tensor, "*scope"]
    squared_distances: Float[Tensor, "*scope M M"]


def stein_direction(
    particles: Float[Tensor, "M P D"],
    score: Float[Tensor, "M P D"],
    *,
    kernel: Kernel = "rbf",
    scope: Scope = "prompt",
    bandwidth: Literal["median"] | float = "median",
    form: Form = "svgd",
    rows: slice | None = None,
) -> Direction:
    """Return the direction of steepest ascent towards the posterior whose `score` is given, for all or some `rows`.

    `score` is computed once per particle beforehand: the T5 runs M times, not M^2. Finite for every finite input of
    magnitude below 1e30, coincident particles included. No gradient flows through the result.
    """
    if particles.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"particles are {particles.dtype}: half precision destroys their distances; keep float32")
    with torch.no_grad():
        blocks, scores = _blocks(particles, scope), _blocks(score, scope)
        squared = squared_distances(particles, scope)
        width = _bandwidth(squared, bandwidth)
        weights, slope = _kernel_and_slope(squared, width[:, None, None], kernel)
        weights = weights.to(particles.dtype)
        chosen = slice(*(rows or slice(None)).indices(len(particles)))
        assert chosen.step == 1, f"rows {rows} are not contiguous"
        assert chosen.start < chosen.stop, f"rows {rows} of {len(particles)} particles"
        driving, repulsive = _sum_over_particles(blocks, scores, weights, slope, chosen)
        if form == "svgd":
            driving, repulsive = driving / len(particles), repulsive / len(particles)
        else:
            driving, repulsive = scores[:, chosen].clone(), repulsive / weights.sum(-1)[:, chosen, None]
        driving, repulsive = (_unblock(term, particles.shape) for term in (driving, repulsive))
    if scope == "prompt":
        weights, width, squared = weights[0], width[0], squared[0]
    return Direction(driving + repulsive, driving, repulsive, weights, width, squared)


def stein_rows(
    particles: Float[Tensor, "M P D"],
    score: Float[Tensor, "M P D"],
    rows: slice,
    *,
    kernel: Kernel = "rbf",
    scope: Scope = "prompt",
    bandwidth: Literal["median"] | float = "median",
    form: Form = "svgd",
) -> Float[Tensor, "m P D"]:
    """Return the given `rows` of phi, bit-identical to that slice of the full result."""
    return stein_direction(particles, score, kernel=kernel, scope=scope, bandwidth=bandwidth, form=form, rows=rows).phi


def squared_distances(particles: Float[Tensor, "M P D"], scope: Scope) -> Float[Tensor, "S M M"]:
    """Return float64 squared distances, symmetric with a zero diagonal: S = 1 for scope `prompt`, P for `token`.

    Few particles use explicit differences; many use the Gram matrix of centred particles, which needs no M x M x PD
    tensor. The raw expansion |x|^2 + |y|^2 - 2xy is never used: it was 20-fold wrong for close particles.
    """
    if len(particles) > PAIRWISE_LIMIT:
        upper = _centred_gram(_blocks(particles, scope))
    else:
        upper = _differences(_blocks(particles, "token"))
        # Positions are summed apart from coordinates even for whole prompts: torch cuts one long sum by threads.
        upper = upper if scope == "token" else upper.sum(0, keepdim=True)
    return upper + upper.mT


def median_bandwidth(squared: Float[Tensor, "*scope M M"]) -> Float[Tensor, "*scope"]:
    """Return median_{i<j}(d2) / log(M+1), at least BANDWIDTH_FLOOR; 1 for a single particle."""
    num_particles = squared.shape[-1]
    if num_particles == 1:
        return torch.ones_like(squared[..., 0, 0])
    return (_median(_pairs(squared)) / math.log(num_particles + 1)).clamp_min(BANDWIDTH_FLOOR)


def diagnostics(direction: Direction, particles: Float[Tensor, "M P D"]) -> dict[str, float]:
    """Return the numbers logged at every step: is the cloud alive, and does repulsion matter beside the score?

    Distances are between whole prompts whatever the scope (0 without pairs). `bandwidth` and `kernel_off_diagonal` are
    means over positions for scope `token`. `driving_norm`, `repulsive_norm` and `mean_norm` are means over particles
    of Euclidean norms (the first two over the rows in `direction`). `spread` is the root mean square deviation of a
    coordinate from the mean particle, in the units of the prompt.
    """
    squared = direction.squared_distances
    whole = squared.reshape(-1, *squared.shape[-2:]).sum(0)
    distances, off_diagonal = _pairs(whole).sqrt(), _pairs(direction.kernel)
    has_pairs = distances.numel() > 0
    mean = particles.mean(0)
    return {
        "distance_min": float(distances.min()) if has_pairs else 0.0,
        "distance_median": float(_median(distances)) if has_pairs else 0.0,
        "distance_max": float(distances.max()) if has_pairs else 0.0,
        "bandwidth": float(direction.bandwidth.mean()),
        "kernel_off_diagonal": float(off_diagonal.mean()) if has_pairs else 0.0,
        "driving_norm": _mean_norm(direction.driving),
        "repulsive_norm": _mean_norm(direction.repulsive),
        "spread": float((particles - mean).double().square().mean().sqrt()),
        "norm_of_mean": _mean_norm(mean[None]),
        "mean_norm": _mean_norm(particles),
    }


def initial_particles(
    prompt: Float[Tensor, "P D"], num_particles: int, spread: float, generator: torch.Generator
) -> Float[Tensor, "M P D"]:
    """Return particles around one common prompt: prompt + spread * std(prompt) * N(0, 1).

    The noise is drawn for all particles at once, so every rank that owns the same generator state makes the same set.
    A single particle is the prompt itself: it has nothing to be spread from, and BPT with M = 1 must start where
    vanilla transfer starts. Averaging independent prompts instead would shrink the norm by sqrt(M).
    """
    if num_particles == 1:
        return prompt.clone()[None]
    noise = torch.randn((num_particles, *prompt.shape), generator=generator, dtype=prompt.dtype)
    return prompt + spread * prompt.std(correction=0) * noise.to(prompt.device)


def _blocks(tensor: Float[Tensor, "M P D"], scope: Scope) -> Float[Tensor, "S M E"]:
    """View particles as S independent kernel problems: one of P*D coordinates, or P of D."""
    return tensor.flatten(1)[None] if scope == "prompt" else tensor.transpose(0, 1)


def _unblock(blocks: Float[Tensor, "S m E"], shape: torch.Size) -> Float[Tensor, "m P D"]:
    """Undo `_blocks`."""
    return blocks.transpose(0, 1).reshape(-1, *shape[1:])


def _pairs(matrix: Float[Tensor, "*scope M M"]) -> Float[Tensor, "*scope pairs"]:
    """Return the entries above the diagonal."""
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], offset=1, device=matrix.device)
    return matrix[..., row, column]


def _median(values: Float[Tensor, "*scope n"]) -> Float[Tensor, "*scope"]:
    """Return the median of the last axis; for an even count the mean of the two middle values."""
    ordered, count = values.sort(dim=-1).values, values.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def _mean_norm(tensor: Float[Tensor, "m P D"]) -> float:
    """Return the mean over particles of the Euclidean norm, in float64 so that large prompts do not overflow."""
    return float(tensor.flatten(1).double().norm(dim=1).mean())


def _differences(blocks: Float[Tensor, "S M E"]) -> Float[Tensor, "S M M"]:
    """Return the strict upper triangle of d2 by explicit differences, one particle against the later ones."""
    num_blocks, num_particles, _ = blocks.shape
    upper = blocks.new_zeros((num_blocks, num_particles, num_particles), dtype=torch.float64)
    for i in range(num_particles - 1):
        difference = blocks[:, i + 1 :].double() - blocks[:, i, None].double()
        upper[:, i, i + 1 :] = difference.square().sum(-1)
    return upper


def _centred_gram(blocks: Float[Tensor, "S M E"]) -> Float[Tensor, "S M M"]:
    """Return the strict upper triangle of d2 by float64 Gram matrices of centred coordinates, chunk by chunk."""
    num_blocks, num_particles, _ = blocks.shape
    gram = blocks.new_zeros((num_blocks, num_particles, num_particles), dtype=torch.float64)
    for _, centred in _centred_chunks(blocks):
        gram += centred @ centred.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)
    return (norms[:, :, None] + norms[:, None, :] - 2 * gram).clamp_min(0).triu(1)


def _centred_chunks(blocks: Float[Tensor, "S M E"]) -> Iterator[tuple[slice, Float[Tensor, "S M e"]]]:
    """Yield pieces of the coordinates in float64, relative to the first particle: coincident ones become exact zeros."""
    num_blocks, num_particles, num_coordinates = blocks.shape
    chunk = max(1, CHUNK_ELEMENTS // (num_blocks * num_particles))
    for start in range(0, num_coordinates, chunk):
        coordinates = slice(start, start + chunk)
        part = blocks[..., coordinates].double()
        yield coordinates, part - part[:, :1]


def _bandwidth(squared: Float[Tensor, "S M M"], bandwidth: Literal["median"] | float) -> Float[Tensor, " S"]:
    """Return one bandwidth a block, the median heuristic or the given number, not below what arithmetic can bear."""
    if isinstance(bandwidth, str):
        width = median_bandwidth(squared)
    elif 0 < bandwidth < math.inf:
        width = torch.full_like(squared[:, 0, 0], bandwidth).clamp_min(BANDWIDTH_FLOOR)
    else:
        raise ValueError(f"bandwidth is {bandwidth}: give 'median' or a positive number (units of squared distance)")
    if squared.shape[-1] <= PAIRWISE_LIMIT:
        return width
    return torch.maximum(width, RELATIVE_FLOOR * squared.amax((-2, -1)))


def _kernel_and_slope(
    squared: Float[Tensor, "S M M"], width: Float[Tensor, "S 1 1"], kernel: Kernel
) -> tuple[Float[Tensor, "S M M"], Float[Tensor, "S M M"]]:
    """Return k and g = -2 dk/d(d2)."""
    if kernel == "rbf":
        value = torch.exp(-squared / width)
        return value, 2 / width * value
    value = torch.rsqrt(1 + squared / width)
    return value, value**3 / width


def _sum_over_particles(
    blocks: Float[Tensor, "S M E"],
    scores: Float[Tensor, "S M E"],
    weights: Float[Tensor, "S M M"],
    slope: Float[Tensor, "S M M"],
    rows: slice,
) -> tuple[Float[Tensor, "S m E"], Float[Tensor, "S m E"]]:
    """Return sum_j k_ij s_j and sum_j g_ij (x_i - x_j) for the rows i asked for."""
    if blocks.shape[1] <= PAIRWISE_LIMIT:
        return _sum_in_order(blocks, scores, weights, slope, rows)
    return _sum_by_tiles(blocks, scores, weights, slope, rows)


def _sum_in_order(
    blocks: Float[Tensor, "S M E"],
    scores: Float[Tensor, "S M E"],
    weights: Float[Tensor, "S M M"],
    slope: Float[Tensor, "S M M"],
    rows: slice,
) -> tuple[Float[Tensor, "S m E"], Float[Tensor, "S m E"]]:
    """Add one particle j after the other: exact for close pairs, and coincident particles get identical rows."""
    own = blocks[:, rows]
    weights, slope = weights[:, rows, :, None], slope[:, rows, :, None].to(blocks.dtype)
    driving, repulsive = torch.zeros_like(own), torch.zeros_like(own)
    for j in range(blocks.shape[1]):
        # Products and sums are separate operations: a fused multiply-add is used for some elements and not for others.
        driving += weights[:, :, j] * scores[:, j, None]
        repulsive += slope[:, :, j] * (own - blocks[:, j, None])
    return driving, repulsive


def _sum_by_tiles(
    blocks: Float[Tensor, "S M E"],
    scores: Float[Tensor, "S M E"],
    weights: Float[Tensor, "S M M"],
    slope: Float[Tensor, "S M M"],
    rows: slice,
) -> tuple[Float[Tensor, "S m E"], Float[Tensor, "S m E"]]:
    """Multiply whole aligned tiles of rows that cover `rows`, then cut: a row's bits cannot depend on the split."""
    first = rows.start // TILE_ROWS * TILE_ROWS
    tiles = [slice(start, start + TILE_ROWS) for start in range(first, rows.stop, TILE_ROWS)]
    cut = slice(rows.start - first, rows.stop - first)
    totals, repulsive = slope.sum(-1, keepdim=True), torch.empty_like(blocks[:, rows])
    for coordinates, centred in _centred_chunks(blocks):
        pushes = [totals[:, tile] * centred[:, tile] - slope[:, tile] @ centred for tile in tiles]
        repulsive[..., coordinates] = torch.cat(pushes, 1)[:, cut].to(blocks.dtype)
    return torch.cat([weights[:, tile] @ scores for tile in tiles], 1)[:, cut], repulsive
