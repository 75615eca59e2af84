"""Stein Variational Gradient Descent (Liu & Wang 2016) on soft-prompt particles: pure tensor functions.

Conventions, fixed here once (other libraries differ; the golden test states their numbers beside ours):

- kernels of the squared distance d2 and the bandwidth h, which has units of *squared* distance:
  `rbf` k = exp(-d2/h), `imq` k = (1 + d2/h)^(-1/2);
- median bandwidth h = median over pairs i<j of d2, divided by log(M+1), never differentiated; an even number of
  pairs takes the mean of the two middle values (as numpy, not as torch); one particle gives h = 1; `MedianTimes(x)` is
  x times that h, for each kernel of scope `token` its own;
- scope `prompt`: one kernel for a whole prompt; `token`: an independent kernel for every prompt position;
- form `svgd`: phi_i = 1/M sum_j [k(x_j, x_i) s_j + grad_{x_j} k(x_j, x_i)];
  form `shared_scores`: phi_i = 1/M sum_j k(x_j, x_i) s_j, which is `svgd` without its repulsive term;
  form `repulsive_ensemble` (D'Angelo & Fortuin 2021): phi_i = s_i - sum_j grad_{x_i} k(x_i, x_j) / sum_j k(x_i, x_j).

Both kernels satisfy grad_{x_j} k(x_j, x_i) = g_ij (x_i - x_j) with a non-negative `slope` g_ij = -2 dk/d(d2).

Rows of the direction do not depend on how particles are split over ranks: every rank computes the whole M x M
kernel from the whole particle set, and each row of phi is summed in the one order j = 0 .. M-1. Up to PAIRWISE_LIMIT
particles every operation on the way is a single correctly rounded one, so this asks nothing of a BLAS; above it matrix
products run on aligned tiles of TILE_ROWS whole rows, so that a row always meets a product of the same shape.

Every function here also takes a slice [M, p, D] of the positions of all particles: squared distances of slices add up to
those of whole prompts, the kernel is made of the sums, and phi of a slice needs nothing but the slice and the kernel.
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
Form = Literal["svgd", "shared_scores", "repulsive_ensemble"]


class MedianTimes(NamedTuple):
    """A bandwidth of `factor` times what the median rule gives at every step."""

    factor: float


Bandwidth = Literal["median"] | float | MedianTimes
Place = tuple[slice, slice, slice]  # blocks, rows (counted among those asked for), coordinates

PAIRWISE_LIMIT = 16
TILE_ROWS = 32
# Numbers worked on at once. On a CPU they stay in the cache: temporaries as large as the particles cost three times the
# arithmetic, most of it in pages the system has to allocate again. A GPU wants few launches instead.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_ON_GPU = 1 << 17, 1 << 22
SHORTEST_CHUNK = 512
GRAM_ROWS = 64
# Coincident particles have median 0. 2/h must stay finite in float32 even when summed over thousands of particles,
# and no float32 prompts of any use are closer than 1e-15, so the floor never bites where it matters.
BANDWIDTH_FLOOR = 1e-30
# Above PAIRWISE_LIMIT particles x_i - x_j is a difference of float64 products, exact to 1e-16 of the cloud; with h below
# this share of the largest d2 its rounding, multiplied by 2/h, would push coincident particles apart.
RELATIVE_FLOOR = 1e-10


class KernelOptions(NamedTuple):
    """How distances and scores become a direction; `bandwidth` in units of squared distance."""

    kernel: Kernel = "rbf"
    scope: Scope = "prompt"
    bandwidth: Bandwidth = "median"
    form: Form = "svgd"


class KernelMatrices(NamedTuple):
    """What all pairs of particles mean to one another, S = 1 matrix for scope `prompt`, one a position for `token`.

    `kernel` is k, `slope` is g = -2 dk/d(d2); float64, as the squared distances are.
    """

    kernel: Float[Tensor, "S M M"]
    slope: Float[Tensor, "S M M"]
    bandwidth: Float[Tensor, " S"]
    squared_distances: Float[Tensor, "S M M"]


class Direction(NamedTuple):
    """The Stein direction with everything computed on the way, so that diagnostics cost nothing twice.

    `driving` and `repulsive` hold only the rows asked for (M of them by default); `kernel` and `squared_distances`
    always hold all pairs, with a leading position axis P when the scope is `token`; `bandwidth` likewise. `own` is the
    part of `driving` that comes from the particle's own score, at weight k(x, x) = 1: s_i / M in form `svgd`, s_i otherwise.
    """

    driving: Float[Tensor, "m P D"]
    own: Float[Tensor, "m P D"]
    repulsive: Float[Tensor, "m P D"]
    kernel: Float[Tensor, "*scope M M"]
    bandwidth: Float[Tensor, "*scope"]
    squared_distances: Float[Tensor, "*scope M M"]

    @property
    def phi(self) -> Float[Tensor, "m P D"]:
        """The direction itself, the sum of both terms."""
        return self.driving + self.repulsive


def stein_direction(
    particles: Float[Tensor, "M P D"],
    score: Float[Tensor, "M P D"],
    *,
    kernel: Kernel = "rbf",
    scope: Scope = "prompt",
    bandwidth: Bandwidth = "median",
    form: Form = "svgd",
    rows: slice | None = None,
) -> Direction:
    """Return the direction of steepest ascent towards the posterior whose `score` is given, for all or some `rows`.

    `score` is computed once per particle beforehand: the T5 runs M times, not M^2. Finite for every finite input of
    magnitude below 1e30, coincident particles included. No gradient flows through the result.
    """
    rule = KernelOptions(kernel, scope, bandwidth, form)
    with torch.no_grad():
        return direction_terms(particles, score, kernel_matrices(squared_distances(particles, scope), rule), rule, rows)


# --- the three parts: distances, kernel, combination ----------------------------------------------------------------------------


@torch.no_grad()
def squared_distances(particles: Float[Tensor, "M P D"], scope: Scope) -> Float[Tensor, "S M M"]:
    """Return float64 squared distances, symmetric with a zero diagonal: S = 1 for scope `prompt`, P for `token`.

    Few particles use explicit differences; many use the Gram matrix of centred particles, which needs no M x M x PD
    tensor. The raw expansion |x|^2 + |y|^2 - 2xy is never used: it was 20-fold wrong for close particles. Raises
    TypeError for particles in half precision.
    """
    if particles.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"particles are {particles.dtype}: half precision destroys their distances; keep float32")
    if len(particles) > PAIRWISE_LIMIT:
        upper = _centred_gram(_blocks(particles, scope))
    else:
        upper = _differences(_blocks(particles, "token"))
        # Positions are summed apart from coordinates even for whole prompts: torch cuts one long sum by threads.
        upper = upper if scope == "token" else upper.sum(0, keepdim=True)
    return upper + upper.mT


@torch.no_grad()
def kernel_matrices(squared: Float[Tensor, "S M M"], rule: KernelOptions) -> KernelMatrices:
    """Return kernel and slope of all pairs from their squared distances; ValueError for an impossible bandwidth."""
    width = _bandwidth(squared, rule.bandwidth)
    over = width[:, None, None]
    if rule.kernel == "rbf":
        value = (squared / -over).exp_()
        return KernelMatrices(value, 2 / over * value, width, squared)
    value = (squared / over).add_(1).rsqrt_()
    return KernelMatrices(value, value**3 / over, width, squared)


@torch.no_grad()
def direction_terms(
    particles: Float[Tensor, "M P D"],
    score: Float[Tensor, "M P D"],
    weights: KernelMatrices,
    rule: KernelOptions,
    rows: slice | None = None,
) -> Direction:
    """Return the direction of all or some `rows` from particles, scores and weights."""
    chosen = _chosen(rows, len(particles))
    blocks, scores = _blocks(particles, rule.scope), _blocks(score, rule.scope)
    driving, repulsive = torch.empty_like(blocks[:, chosen]), torch.empty_like(blocks[:, chosen])
    for place, drive, push in _terms(blocks, scores, weights, rule.form, chosen):
        driving[place], repulsive[place] = drive, push
    driving, repulsive = (_unblock(term, particles.shape) for term in (driving, repulsive))
    one = 0 if rule.scope == "prompt" else slice(None)
    own = score[chosen] if rule.form == "repulsive_ensemble" else score[chosen] / len(particles)
    return Direction(driving, own, repulsive, weights.kernel[one], weights.bandwidth[one], weights.squared_distances[one])


@torch.no_grad()
def direction(
    particles: Float[Tensor, "M P D"],
    score: Float[Tensor, "M P D"],
    weights: KernelMatrices,
    rule: KernelOptions,
    rows: slice | None = None,
) -> Float[Tensor, "m P D"]:
    """Return phi [m, P, D] of all or some `rows`: the bits of `direction_terms`, without keeping its two terms.

    For scope `prompt`, form `svgd` and the kernel `rbf` it is, with x = particles.flatten(1), s = score.flatten(1):

        d2 = (x[:, None] - x[None, :]).square().sum(-1)                        # [M, M]
        k = torch.exp(-d2 / h)                                                 # h = median(d2 of pairs) / log(M + 1)
        repulsive = (2 / h * k)[:, :, None] * (x[:, None] - x[None, :])        # grad_{x_j} k(x_j, x_i), [M, M, P * D]
        phi = (k @ s + repulsive.sum(1)) / M

    The code below computes the same numbers in pieces, without a tensor [M, M, P * D].
    """
    chosen = _chosen(rows, len(particles))
    blocks, scores = _blocks(particles, rule.scope), _blocks(score, rule.scope)
    phi = torch.empty_like(particles[chosen])
    into = _blocks(phi, rule.scope)
    for place, drive, push in _terms(blocks, scores, weights, rule.form, chosen):
        torch.add(drive, push, out=into[place])
    return phi


def median_bandwidth(squared: Float[Tensor, "*scope M M"]) -> Float[Tensor, "*scope"]:
    """Return median_{i<j}(d2) / log(M+1), at least BANDWIDTH_FLOOR; 1 for a single particle."""
    num_particles = squared.shape[-1]
    if num_particles == 1:
        return torch.ones_like(squared[..., 0, 0])
    return (median(pairs(squared)) / math.log(num_particles + 1)).clamp_min(BANDWIDTH_FLOOR)


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


def pairs(matrix: Float[Tensor, "*scope M M"]) -> Float[Tensor, "*scope pairs"]:
    """Return the entries above the diagonal."""
    row, column = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], offset=1, device=matrix.device)
    return matrix[..., row, column]


def median(values: Float[Tensor, "*scope n"]) -> Float[Tensor, "*scope"]:
    """Return the median of the last axis; for an even count the mean of the two middle values."""
    lower, upper = (values.kthvalue(place + 1).values for place in ((values.shape[-1] - 1) // 2, values.shape[-1] // 2))
    return (lower + upper) / 2


def _bandwidth(squared: Float[Tensor, "S M M"], bandwidth: Bandwidth) -> Float[Tensor, " S"]:
    """Return one bandwidth a block, of the median rule or the given number, not below what arithmetic can bear."""
    given = bandwidth.factor if isinstance(bandwidth, MedianTimes) else bandwidth
    if isinstance(given, str):
        width = median_bandwidth(squared)
    elif not 0 < given < math.inf:
        raise ValueError(
            f"bandwidth is {bandwidth}: give 'median', MedianTimes of a positive number, or a positive number (units of squared "
            "distance)"
        )
    elif isinstance(bandwidth, MedianTimes):
        width = (median_bandwidth(squared) * given).clamp_min(BANDWIDTH_FLOOR)
    else:
        width = torch.full_like(squared[:, 0, 0], given).clamp_min(BANDWIDTH_FLOOR)
    if squared.shape[-1] <= PAIRWISE_LIMIT:
        return width
    return torch.maximum(width, RELATIVE_FLOOR * squared.amax((-2, -1)))


def _chosen(rows: slice | None, num_particles: int) -> slice:
    chosen = slice(*(rows or slice(None)).indices(num_particles))
    assert chosen.step == 1, f"rows {rows} are not contiguous"
    assert chosen.start < chosen.stop, f"rows {rows} of {num_particles} particles"
    return chosen


# --- same numbers, in pieces ----------------------------------------------------------------------------------------------------


def _pieces(blocks: Float[Tensor, "S M E"], *, whole_rows: bool = False) -> Iterator[tuple[slice, slice]]:
    """Yield blocks and coordinates that are worked on at once: several whole blocks, or a part of the coordinates of one."""
    num_blocks, num_particles, num_coordinates = blocks.shape
    elements = CHUNK_ELEMENTS_ON_GPU if blocks.is_cuda else CHUNK_ELEMENTS
    several = elements // (num_particles * num_coordinates)
    length = num_coordinates if several or whole_rows else max(SHORTEST_CHUNK, elements // num_particles)
    for first in range(0, num_blocks, max(1, several)):
        for start in range(0, num_coordinates, length):
            yield slice(first, first + max(1, several)), slice(start, start + length)


def _differences(blocks: Float[Tensor, "P M D"]) -> Float[Tensor, "P M M"]:
    """Return the strict upper triangle of d2 by explicit differences, one particle against the later ones."""
    num_blocks, num_particles, _ = blocks.shape
    upper = blocks.new_zeros((num_blocks, num_particles, num_particles), dtype=torch.float64)
    for some, _ in _pieces(blocks, whole_rows=True):
        part = blocks[some].double()
        for i in range(num_particles - 1):
            upper[some, i, i + 1 :] = (part[:, i + 1 :] - part[:, i, None]).square_().sum(-1)
    return upper


def _centred_gram(blocks: Float[Tensor, "S M E"]) -> Float[Tensor, "S M M"]:
    """Return the strict upper triangle of d2 by float64 Gram matrices of centred coordinates, piece by piece."""
    num_blocks, num_particles, _ = blocks.shape
    gram = blocks.new_zeros((num_blocks, num_particles, num_particles), dtype=torch.float64)
    for some, coordinates in _pieces(blocks):
        centred = _centred(blocks[some, :, coordinates])
        for start in range(0, num_particles, GRAM_ROWS):  # what is below the diagonal is not computed
            gram[some, start : start + GRAM_ROWS, start:] += centred[:, start : start + GRAM_ROWS] @ centred[:, start:].mT
    norms = gram.diagonal(dim1=-2, dim2=-1)
    return (norms[:, :, None] + norms[:, None, :]).sub_(gram, alpha=2).clamp_min_(0).triu_(1)


def _centred(part: Float[Tensor, "S M e"]) -> Float[Tensor, "S M e"]:
    """Return coordinates in float64, relative to the first particle: coincident ones become exact zeros."""
    wide = part.double()
    return wide - wide[:, :1]


def _terms(
    blocks: Float[Tensor, "S M E"], scores: Float[Tensor, "S M E"], weights: KernelMatrices, form: Form, rows: slice
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Yield the driving and the repulsive term of the rows asked for, piece by piece, and where the piece belongs."""
    kernel, num_particles = weights.kernel.to(blocks.dtype), blocks.shape[1]
    sums = _sum_in_order if num_particles <= PAIRWISE_LIMIT else _sum_by_tiles
    partial_sums = kernel.sum(-1, keepdim=True)
    for place, driving, repulsive in sums(blocks, scores, kernel, weights.slope, rows):
        some, own, coordinates = place
        if form == "svgd":
            yield place, driving.div_(num_particles), repulsive.div_(num_particles)
        elif form == "shared_scores":
            yield place, driving.div_(num_particles), repulsive.zero_()
        else:
            yield place, scores[some, rows, coordinates][:, own], repulsive.div_(partial_sums[some, rows][:, own])


def _sum_in_order(
    blocks: Float[Tensor, "S M E"],
    scores: Float[Tensor, "S M E"],
    kernel: Float[Tensor, "S M M"],
    slope: Float[Tensor, "S M M"],
    rows: slice,
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Yield sum_j k_ij s_j and sum_j g_ij (x_i - x_j), one particle j after the other.

    Exact for close pairs, and coincident particles get identical rows.
    """
    kernel, slope = kernel[:, rows, :, None], slope[:, rows, :, None].to(blocks.dtype)
    for some, coordinates in _pieces(blocks):
        part, own, score = blocks[some, :, coordinates], blocks[some, rows, coordinates], scores[some, :, coordinates]
        driving, repulsive = torch.zeros_like(own), torch.zeros_like(own)
        for j in range(blocks.shape[1]):
            # Products and sums are separate operations: a fused multiply-add is used for some elements and not for others.
            driving += kernel[some, :, j] * score[:, j, None]
            repulsive += (own - part[:, j, None]).mul_(slope[some, :, j])
        yield (some, slice(None), coordinates), driving, repulsive


def _sum_by_tiles(
    blocks: Float[Tensor, "S M E"],
    scores: Float[Tensor, "S M E"],
    kernel: Float[Tensor, "S M M"],
    slope: Float[Tensor, "S M M"],
    rows: slice,
) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Multiply whole aligned tiles of rows that cover `rows`, then cut: a row's bits cannot depend on the split."""
    first = rows.start // TILE_ROWS * TILE_ROWS
    tiles = [slice(start, min(start + TILE_ROWS, blocks.shape[1])) for start in range(first, rows.stop, TILE_ROWS)]
    sums = slope.sum(-1, keepdim=True)
    for some, coordinates in _pieces(blocks):
        centred, score = _centred(blocks[some, :, coordinates]), scores[some, :, coordinates].contiguous()
        for tile in tiles:
            inside = slice(max(tile.start, rows.start), min(tile.stop, rows.stop))
            cut = slice(inside.start - tile.start, inside.stop - tile.start)
            push = (sums[some, tile] * centred[:, tile]).sub_(slope[some, tile] @ centred)
            own = slice(inside.start - rows.start, inside.stop - rows.start)
            yield (some, own, coordinates), (kernel[some, tile] @ score)[:, cut], push[:, cut].to(blocks.dtype)


class PartialSums(NamedTuple):
    """Sums over coordinates, in float64: those of the slices of a prompt add up to those of whole prompts."""

    squared_distances: Float[Tensor, "M M"]  # between whole prompts, whatever the scope
    kernel: Float[Tensor, "M M"]  # mean over positions, as the bandwidth
    bandwidth: Float[Tensor, ""]
    driving: Float[Tensor, " m"]  # squared norms, one a particle, as the next four
    own: Float[Tensor, " m"]  # of the part of `driving` from the particle's own score
    others: Float[Tensor, " m"]  # of the rest
    repulsive: Float[Tensor, " m"]
    particles: Float[Tensor, " M"]
    mean: Float[Tensor, ""]  # squared norm of the mean particle
    deviation: Float[Tensor, ""]  # squares of all coordinates' deviations from the mean particle


def summarize(direction: Direction, particles: Float[Tensor, "M P D"]) -> dict[str, float]:
    """Return the numbers of whole prompts.

    Distances are between whole prompts whatever the scope (0 without pairs). `bandwidth` and `kernel_off_diagonal` are
    means over positions for scope `token`. `driving_norm`, `repulsive_norm` and `mean_norm` are means over particles
    of Euclidean norms (the first two over the rows in `direction`). `spread` is the root mean square deviation of a
    coordinate from the mean particle, in the units of the prompt.

    `driving_by_others`, 0 to 1, is the share of the driving force that is another particle's. The driving term of particle i
    is own_i + others_i, own_i being the part j = i of its sum over j and others_i the parts j != i together; the share is the
    mean over i of |others_i| / (|own_i| + |others_i|), Euclidean norms over the whole prompt. It is 0 for one particle, where
    nothing drives, and in form `repulsive_ensemble`; float32 rounding hides what is below 1e-6.
    `distance_relative` is the median distance over the root mean square of the prompts, both per coordinate:
    median_{i<j} sqrt(d2_ij / PD) / sqrt(mean of all squared coordinates of all particles). Independent prompts of mean zero
    have sqrt(2), equal ones 0.
    """
    return summarize_partial_sums(partial_sums(direction, particles, particles.shape[1]), particles[0].numel())


@torch.no_grad()
def partial_sums(direction: Direction, particles: Float[Tensor, "M p D"], num_positions: int) -> PartialSums:
    """Return the sums of a slice of p of the `num_positions` P positions; p = P for whole prompts."""
    squared, kernel = (part.double() for part in (direction.squared_distances, direction.kernel))
    width, mean = direction.bandwidth.double(), particles.mean(0)
    share = particles.shape[1] / num_positions
    if width.dim() == 0:  # one kernel for whole prompts: each slice brings its share of what all slices know
        squared, kernel, width = squared * share, kernel * share, width * share
    else:
        squared, kernel, width = squared.sum(0), kernel.sum(0) / num_positions, width.sum(0) / num_positions
    return PartialSums(
        squared_distances=squared,
        kernel=kernel,
        bandwidth=width,
        driving=_squared_norms(direction.driving),
        own=_squared_norms(direction.own),
        others=_squared_norms(direction.driving - direction.own),
        repulsive=_squared_norms(direction.repulsive),
        particles=_squared_norms(particles),
        mean=_squared_norms(mean[None])[0],
        deviation=_squared_norms(particles - mean).sum(),
    )


def summarize_partial_sums(sums: PartialSums, num_coordinates: int) -> dict[str, float]:
    """Return what `summarize` does from the sums over all P*D `num_coordinates` of a prompt."""
    distances, off_diagonal = pairs(sums.squared_distances).sqrt(), pairs(sums.kernel)
    has_pairs = distances.numel() > 0
    middle, size = float(median(distances)) if has_pairs else 0.0, math.sqrt(float(sums.particles.mean()))
    own, others = sums.own.sqrt(), sums.others.sqrt()
    shares = others / (own + others).clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "distance_min": float(distances.min()) if has_pairs else 0.0,
        "distance_median": middle,
        "distance_max": float(distances.max()) if has_pairs else 0.0,
        "distance_relative": middle / size if size else 0.0,
        "bandwidth": float(sums.bandwidth),
        "kernel_off_diagonal": float(off_diagonal.mean()) if has_pairs else 0.0,
        "driving_norm": float(sums.driving.sqrt().mean()),
        "driving_by_others": float(shares.mean()),
        "repulsive_norm": float(sums.repulsive.sqrt().mean()),
        "spread": math.sqrt(float(sums.deviation) / (len(sums.particles) * num_coordinates)),
        "norm_of_mean": math.sqrt(float(sums.mean)),
        "mean_norm": float(sums.particles.sqrt().mean()),
    }


def _squared_norms(tensor: Float[Tensor, "m P D"]) -> Float[Tensor, " m"]:
    """Return squared Euclidean norms, in float64 so that large prompts do not overflow."""
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).square()
