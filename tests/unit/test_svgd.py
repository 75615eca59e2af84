"""Laws of the Stein direction, checked against a float64 double loop with autograd and against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bpt_dist import svgd
from bpt_dist.svgd import (
    KernelOptions,
    MedianTimes,
    PartialSums,
    direction,
    direction_terms,
    initial_particles,
    kernel_matrices,
    partial_sums,
    squared_distances,
    stein_direction,
    summarize,
    summarize_partial_sums,
)

KERNELS, SCOPES, FORMS = ("rbf", "imq"), ("prompt", "token"), ("svgd", "shared_scores", "repulsive_ensemble")


def cloud(num_particles: int, length: int, width: int, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_particles, length, width)
    particles, score = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return particles, score


def phi_of_rows(x: Tensor, s: Tensor, rows: slice, **options) -> Tensor:
    """Some rows of phi as a rank of the source stage computes them."""
    rule = KernelOptions(**options)
    return direction(x, s, kernel_matrices(squared_distances(x, rule.scope), rule), rule, rows)


# ---- the definition -------------------------------------------------------------------------------------------------


def kernel_value(x: Tensor, y: Tensor, h: float, kernel: str) -> Tensor:
    ratio = ((x - y) ** 2).sum() / h
    return torch.exp(-ratio) if kernel == "rbf" else (1 + ratio) ** -0.5


def numpy_bandwidth(x: Tensor) -> float:
    pairs = [float(((x[i] - x[j]) ** 2).sum()) for i in range(len(x)) for j in range(i)]
    return float(numpy.median(pairs)) / math.log(len(x) + 1)


def one_term(x_j: Tensor, x_i: Tensor, h: float, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """k(x_j, x_i) and its gradients by autograd with respect to x_j and to x_i."""
    x_j, x_i = x_j.clone().requires_grad_(), x_i.clone().requires_grad_()
    value = kernel_value(x_j, x_i, h, kernel)
    return (value.detach(), *torch.autograd.grad(value, (x_j, x_i)))


def direction_by_definition(x: Tensor, s: Tensor, h: float | str, kernel: str, form: str) -> Tensor:
    """The formulas of SVGD, of its scores alone and of repulsive ensembles, term by term, on flat particles [M, E]."""
    h = numpy_bandwidth(x) if h == "median" else h
    phi = torch.zeros_like(x)
    for i in range(len(x)):
        terms = [one_term(x[j], x[i], h, kernel) for j in range(len(x))]
        if form == "svgd":
            phi[i] = sum(k * s[j] + by_x_j for j, (k, by_x_j, _) in enumerate(terms)) / len(x)
        elif form == "shared_scores":
            phi[i] = sum(k * s[j] for j, (k, _, _) in enumerate(terms)) / len(x)
        else:
            phi[i] = s[i] - sum(by_x_i for _, _, by_x_i in terms) / sum(k for k, _, _ in terms)
    return phi


@pytest.mark.parametrize("bandwidth", ["median", 3.7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_particles", [2, 5, 18])  # 18 takes the matrix-product path
def test_direction_equals_its_definition(num_particles, kernel, scope, form, bandwidth):
    x, s = cloud(num_particles, length=2, width=3)
    expected = torch.zeros_like(x)
    if scope == "prompt":
        expected = direction_by_definition(x.flatten(1), s.flatten(1), bandwidth, kernel, form).view_as(x)
    else:
        for p in range(x.shape[1]):
            expected[:, p] = direction_by_definition(x[:, p], s[:, p], bandwidth, kernel, form)
    actual = stein_direction(x, s, kernel=kernel, scope=scope, bandwidth=bandwidth, form=form)
    torch.testing.assert_close(actual.phi, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(actual.driving + actual.repulsive, actual.phi, rtol=0, atol=0)


def test_bandwidth_is_the_median_over_pairs_by_numpys_rule_and_other_libraries_differ():
    """One fixed set whose even number of pairs has 9 and 16 in the middle; our convention must stay as it is."""
    x = torch.tensor([0.0, 1.0, -3.0, -4.0], dtype=torch.float64)[:, None, None]
    pairs = sorted(float((x[i] - x[j]) ** 2) for i in range(4) for j in range(i))
    assert pairs == [1.0, 1.0, 9.0, 16.0, 16.0, 25.0]
    whole_matrix = (x.flatten()[:, None] - x.flatten()) ** 2  # with its zero diagonal: the median is (1 + 9) / 2
    conventions = {  # each as the h of exp(-d2 / h)
        "ours": float(stein_direction(x, x).bandwidth),
        "Liu & Wang's code": float(numpy.median(whole_matrix)) / math.log(5),
        "BMAML": float(numpy.median(whole_matrix)) / math.log(4),
        "GSVGD": float(torch.tensor(pairs).median()) / math.log(4),  # torch takes the lower middle value
    }
    expected = {"ours": 7.7667, "Liu & Wang's code": 3.1067, "BMAML": 3.6067, "GSVGD": 6.4921}
    assert conventions == pytest.approx(expected, abs=1e-4)


def test_bandwidth_of_an_odd_number_of_pairs_is_the_middle_one():
    x = torch.tensor([0.0, 1.0, 5.0])[:, None, None]
    assert float(stein_direction(x, x).bandwidth) == pytest.approx(16 / math.log(4))


@pytest.mark.parametrize("factor", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("num_particles", [3, 18])
def test_equidistant_particles_have_the_kernel_that_a_multiple_of_the_median_rule_says(factor, num_particles):
    """d2 = h log(M + 1) for the rule's own h, so k = exp(-d2 / (x h)) = (M + 1)^(-1/x), whatever the scale of the prompts."""
    for scale in (1e-3, 50.0):
        x = scale * torch.eye(num_particles, dtype=torch.float64)[:, None, :]
        found = stein_direction(x, x, bandwidth=MedianTimes(factor))
        off_diagonal = found.kernel[~torch.eye(num_particles, dtype=torch.bool)]
        expected = torch.full_like(off_diagonal, (num_particles + 1) ** (-1 / factor))
        torch.testing.assert_close(off_diagonal, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_multiple_of_the_median_rule_is_the_same_direction_as_its_number(scope):
    x, s = cloud(4, length=1, width=6)
    number = 2.5 * numpy_bandwidth(x)
    relative = stein_direction(x, s, scope=scope, bandwidth=MedianTimes(2.5)).phi
    torch.testing.assert_close(relative, stein_direction(x, s, scope=scope, bandwidth=number).phi, rtol=1e-12, atol=0)
    once = stein_direction(x, s, scope=scope, bandwidth=MedianTimes(1.0)).phi
    assert torch.equal(once, stein_direction(x, s, scope=scope).phi)


def test_imq_at_the_bandwidth_is_one_over_root_two():
    x = torch.tensor([0.0, 2.0])[:, None, None]
    assert float(stein_direction(x, x, kernel="imq", bandwidth=4.0).kernel[0, 1]) == pytest.approx(2**-0.5)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan, MedianTimes(0.0), MedianTimes(math.inf)])
def test_impossible_bandwidths_are_refused(bandwidth):
    x, s = cloud(3, 2, 2)
    with pytest.raises(ValueError, match="bandwidth is"):
        stein_direction(x, s, bandwidth=bandwidth)


def test_half_precision_is_refused():
    x, s = cloud(3, 2, 2, dtype=torch.float16)
    with pytest.raises(TypeError, match="keep float32"):
        stein_direction(x, s)


def test_direction_carries_no_gradient():
    x, s = cloud(3, 2, 2)
    assert not stein_direction(x.requires_grad_(), s).phi.requires_grad


# ---- symmetries and edge cases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bandwidth", ["median", MedianTimes(0.1), 1e-8, 1e8])
def test_one_particle_is_plain_gradient_ascent(kernel, scope, form, bandwidth):
    x, s = cloud(1, 100, 768, dtype=torch.float32)
    assert torch.equal(stein_direction(x, s, kernel=kernel, scope=scope, form=form, bandwidth=bandwidth).phi, s)


@pytest.mark.parametrize("num_particles", [5, 20])
@pytest.mark.parametrize("scope", SCOPES)
def test_permuting_the_particles_permutes_the_direction(scope, num_particles):
    x, s = cloud(num_particles, 4, 8)
    order = torch.randperm(num_particles, generator=torch.Generator().manual_seed(1))
    phi, permuted = (stein_direction(a, b, scope=scope).phi for a, b in ((x, s), (x[order], s[order])))
    torch.testing.assert_close(permuted, phi[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_particles", [5, 20])
def test_moving_all_particles_together_changes_nothing(num_particles):
    x, s = cloud(num_particles, 10, 64)
    phi, moved = stein_direction(x, s), stein_direction(x + 1000.0, s)
    torch.testing.assert_close(moved.phi, phi.phi, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_particles", [8, 20])
def test_distances_of_close_particles_far_from_the_origin_keep_their_digits(num_particles):
    """Past bug of others: |x|^2 + |y|^2 - 2xy was wrong by thousands here (offset 10, spread 1e-4, float32)."""
    x, s = cloud(num_particles, 100, 768, dtype=torch.float32)
    x = 10 + 1e-4 * x
    flat = x.flatten(1).double()
    expected = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(stein_direction(x, s).squared_distances, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_coincident_particles_stay_together(scope, form):
    x, s = cloud(5, 6, 32, dtype=torch.float32)
    x[3], s[3] = x[1], s[1]
    phi = stein_direction(x, s, scope=scope, form=form).phi
    assert torch.equal(phi[1], phi[3])
    assert not torch.equal(phi[1], phi[2])


@pytest.mark.parametrize("bandwidth", ["median", 1e-20])
def test_many_particles_of_which_most_coincide_are_not_pushed_by_rounding(bandwidth):
    """Past bug: repulsion as a difference of float32 products moved coincident particles by 1e16."""
    x, s = cloud(20, 4, 16, dtype=torch.float32)
    x[3:18], s[3:18] = x[3].clone(), s[3].clone()
    direction = stein_direction(x, s, bandwidth=bandwidth)
    # Everything else is infinitely far away at these bandwidths: 15 coincident particles share their score.
    torch.testing.assert_close(direction.phi[3:18], s[3:18] * 15 / 20, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_particles", [2, 16, 17, 300])
@pytest.mark.parametrize("bandwidth", ["median", MedianTimes(1e-3), 1e-45, 1e-300])
def test_identical_particles_stay_finite_and_share_the_mean_score(num_particles, bandwidth):
    x, s = cloud(num_particles, 2, 5, dtype=torch.float32)
    x[:] = x[0]
    phi = stein_direction(x, s, bandwidth=bandwidth).phi
    torch.testing.assert_close(phi, s.mean(0).expand_as(s), rtol=1e-5, atol=1e-6)


def degenerate_set(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random set with coincident, nearly coincident and astronomically distant particles."""
    draw = torch.randint(0, 1 << 30, (8,), generator=generator).tolist()
    num_particles, length, width = 1 + draw[0] % 20, 1 + draw[1] % 4, 1 + draw[2] % 5
    x, s = torch.randn((2, num_particles, length, width), generator=generator)
    x = x * 10.0 ** (draw[3] % 70 - 40) + (draw[4] % 2) * 10.0 ** (draw[5] % 30)
    x[: draw[6] % num_particles + 1] = x[0].clone()
    return x, s * 10.0 ** (draw[7] % 60 - 40)


def test_a_thousand_degenerate_sets_have_a_finite_direction():
    generator = torch.Generator().manual_seed(23)
    for trial in range(1000):
        x, s = degenerate_set(generator)
        options = {
            "kernel": KERNELS[trial % 2],
            "scope": SCOPES[trial // 2 % 2],
            "form": FORMS[trial // 4 % 3],
            "bandwidth": ("median", 1e-38, 1.0, 1e30)[trial // 12 % 4],
        }
        direction = stein_direction(x, s, **options)
        assert torch.isfinite(direction.phi).all(), (trial, options, x)
        assert all(map(math.isfinite, summarize(direction, x).values())), (trial, options)


@pytest.mark.parametrize("num_particles", [5, 40])
def test_the_four_lines_of_the_docstring_are_the_direction(num_particles):
    particles, score = cloud(num_particles, 4, 6)
    lines = [line.strip() for line in svgd.direction.__doc__.splitlines() if line.startswith("        ")]
    x, s, num = particles.flatten(1), score.flatten(1), num_particles
    names = {"torch": torch, "x": x, "s": s, "M": num, "h": numpy_bandwidth(x)}
    exec("\n".join(lines), names)
    assert len(lines) == 4
    found = phi_of_rows(particles, score, slice(None)).flatten(1)
    torch.testing.assert_close(found, names["phi"], rtol=1e-10, atol=1e-12)


# ---- rows of a rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("length", "width"), [(1, 3), (5, 7), (20, 64), (100, 768)])
def test_rows_do_not_depend_on_the_split_over_ranks(length, width, kernel, scope, form):
    x, s = cloud(6, length, width, dtype=torch.float32)
    options = {"kernel": kernel, "scope": scope, "form": form}
    whole = stein_direction(x, s, **options).phi
    for num_ranks in (1, 2, 3, 6):
        share = 6 // num_ranks
        rows = [phi_of_rows(x, s, slice(a * share, (a + 1) * share), **options) for a in range(num_ranks)]
        assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_particles", [24, 45, 96])
@pytest.mark.parametrize(("length", "width"), [(5, 7), (10, 768)])
def test_rows_of_many_particles_do_not_depend_on_the_split_either(length, width, num_particles, scope):
    x, s = cloud(num_particles, length, width, dtype=torch.float32)
    whole = stein_direction(x, s, scope=scope).phi
    for share in (divisor for divisor in range(1, num_particles + 1) if num_particles % divisor == 0):
        rows = [phi_of_rows(x, s, slice(a, a + share), scope=scope) for a in range(0, num_particles, share)]
        assert torch.equal(torch.cat(rows), whole), share


def test_rows_do_not_depend_on_the_number_of_threads():
    """Ranks of a smaller world often get more threads each; a long sum cut by threads would differ."""
    x, s = cloud(6, 100, 768, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append([stein_direction(x, s, scope=scope).phi for scope in SCOPES])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("chunk", "shortest"), [(1 << 17, 512), (64, 7), (1 << 30, 512)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_particles", [6, 20, 70])  # in order, by tiles, by several tiles of distances
def test_pieces_of_any_size_make_up_the_dense_formula(num_particles, scope, form, chunk, shortest, monkeypatch):
    monkeypatch.setattr(svgd, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(svgd, "SHORTEST_CHUNK", shortest)
    x, s = cloud(num_particles, 5, 12)
    blocks, scores = (t.flatten(1)[None] if scope == "prompt" else t.transpose(0, 1) for t in (x, s))
    squared = torch.cdist(blocks, blocks, compute_mode="donot_use_mm_for_euclid_dist").square()
    width = torch.stack([torch.as_tensor(numpy.median(d2[tuple(torch.triu_indices(*d2.shape, 1))])) for d2 in squared])
    width = width[:, None, None] / math.log(num_particles + 1)
    weights = torch.exp(-squared / width)
    push = torch.einsum("sij,sije->sie", 2 / width * weights, blocks[:, :, None] - blocks[:, None])
    of_form = {
        "svgd": (weights @ scores + push) / num_particles,
        "shared_scores": weights @ scores / num_particles,
        "repulsive_ensemble": scores + push / weights.sum(-1, True),
    }
    expected = of_form[form].transpose(0, 1).reshape(x.shape)
    torch.testing.assert_close(stein_direction(x, s, scope=scope, form=form).phi, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_particles", [1, 5, 40])
def test_slices_of_the_positions_make_up_the_whole(num_particles, kernel, scope, form):
    x, s = cloud(num_particles, 7, 24, dtype=torch.float32)
    rule, bounds = KernelOptions(kernel, scope, "median", form), (0, 3, 5, 7)
    parts = [(x[:, a:b].contiguous(), s[:, a:b].contiguous()) for a, b in itertools.pairwise(bounds)]
    squared = [squared_distances(part, scope) for part, _ in parts]
    squared = [sum(squared)] * 3 if scope == "prompt" else squared
    of_slice = [direction_terms(*part, kernel_matrices(d2, rule), rule) for part, d2 in zip(parts, squared, strict=True)]
    whole = stein_direction(x, s, **rule._asdict())
    phi = torch.cat([direction.phi for direction in of_slice], dim=1)
    assert (phi - whole.phi).norm() <= 4e-7 * whole.phi.norm()
    shares = [partial_sums(direction, part, 7) for direction, (part, _) in zip(of_slice, parts, strict=True)]
    added = PartialSums(*(sum(share) for share in zip(*shares, strict=True)))
    assert summarize_partial_sums(added, 7 * 24) == pytest.approx(summarize(whole, x), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_particles", [5, 40])
def test_phi_alone_has_the_bits_of_its_two_terms(num_particles, form):
    x, s = cloud(num_particles, 10, 768, dtype=torch.float32)
    for rows in (slice(None), slice(2, 4)):
        assert torch.equal(phi_of_rows(x, s, rows, form=form), stein_direction(x, s, form=form, rows=rows).phi)


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(result is argument for argument in args):
            expanded = 0 in result.stride()
            self.numel = max(self.numel, 0 if expanded else result.numel())
        return result


@pytest.mark.parametrize("num_particles", [16, 64, 1024])
def test_no_tensor_has_one_entry_for_every_pair_and_coordinate(num_particles):
    x, s = cloud(num_particles, 4, 64, dtype=torch.float32)
    with LargestTensor() as largest:
        direction = stein_direction(x, s)
    assert torch.isfinite(direction.phi).all()
    assert 0 < largest.numel <= max(num_particles**2, x.numel())


# ---- what SVGD is for -----------------------------------------------------------------------------------------------


def run_svgd(score_of, particles: Tensor, steps: int, rate: float, **options) -> Tensor:
    """Plain SVGD with the RMS scaling of the authors' code; particles [M, 1, 2]."""
    history = None
    for _ in range(steps):
        phi = stein_direction(particles, score_of(particles), **options).phi
        history = phi**2 if history is None else 0.9 * history + 0.1 * phi**2
        particles = particles + rate * phi / (1e-6 + history.sqrt())
    return particles


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gaussian_posterior_is_recovered(kernel):
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    precision = covariance.inverse()
    start, _ = cloud(50, 1, 2, seed=3)
    final = run_svgd(lambda x: -(x - mean) @ precision, start, steps=600, rate=0.03, kernel=kernel)[:, 0]
    torch.testing.assert_close(final.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(final.T.cov(), covariance, rtol=0, atol=0.25)


def test_both_modes_of_a_mixture_are_covered():
    """Slides: particles must be samples of the posterior, so both modes in proportion, from a start between them."""
    modes = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        offset = modes - x  # [M, 1, 2] against [2, 2] gives every particle to every mode
        weight = torch.softmax(-offset.square().sum(-1) / 2, dim=1)
        return (weight[..., None] * offset).sum(1, keepdim=True)

    start, _ = cloud(50, 1, 2, seed=4)
    final = run_svgd(score, start, steps=400, rate=0.05)[:, 0]
    nearest = torch.cdist(final, modes).argmin(1)
    assert 15 <= int((nearest == 0).sum()) <= 35
    for k in range(2):
        members = final[nearest == k]
        torch.testing.assert_close(members.mean(0), modes[k], rtol=0, atol=0.4)
        assert 0.4 < float(members.std(0).mean()) < 1.5


def test_repulsion_at_prompt_size_is_as_small_as_the_analysis_says():
    """Equidistant particles: k_off = 1/(M+1) and |repulsive| = 0.378 / distance for M = 5 (0.293 for M = 10)."""
    for num_particles, constant in ((5, 0.378), (10, 0.293)):
        x, s = cloud(num_particles, 100, 768, dtype=torch.float32)
        logged = summarize(stein_direction(x, s), x)
        assert logged["kernel_off_diagonal"] == pytest.approx(1 / (num_particles + 1), rel=0.02)
        assert logged["repulsive_norm"] == pytest.approx(constant / logged["distance_median"], rel=0.02)


# ---- diagnostics and start ------------------------------------------------------------------------------------------


def share_of_others(x: Tensor, s: Tensor, scope: str) -> float:
    """The share of the driving force that is another particle's, pair by pair: rbf, median rule, float64."""
    shares = []
    blocks = [slice(None)] if scope == "prompt" else [slice(p, p + 1) for p in range(x.shape[1])]
    widths = [numpy_bandwidth(x[:, block].flatten(1)) for block in blocks]
    for i in range(len(x)):
        own, others = torch.zeros_like(s[0]), torch.zeros_like(s[0])
        for j, (block, h) in itertools.product(range(len(x)), zip(blocks, widths, strict=True)):
            part = kernel_value(x[j, block], x[i, block], h, "rbf") * s[j, block]
            (own if i == j else others)[block] += part
        shares.append(float(others.norm() / (own.norm() + others.norm())))
    return sum(shares) / len(shares)


def test_the_share_of_others_has_its_closed_forms():
    x, s = cloud(5, 3, 4, dtype=torch.float32)
    # Coincident particles weigh each other fully: of five equal scores four are another's.
    same = summarize(stein_direction(x[:1].expand(5, -1, -1), s[:1].expand(5, -1, -1)), x)
    assert same["driving_by_others"] == pytest.approx(4 / 5)
    assert summarize(stein_direction(x, s, form="repulsive_ensemble"), x)["driving_by_others"] == 0
    assert summarize(stein_direction(x, s, bandwidth=1e-20), x)["driving_by_others"] < 1e-6
    assert summarize(stein_direction(x, torch.zeros_like(s)), x)["driving_by_others"] == 0
    assert summarize(stein_direction(x[:1], s[:1]), x[:1])["driving_by_others"] == 0


def test_the_relative_distance_does_not_depend_on_the_scale_of_the_prompts():
    x, s = cloud(3, 100, 64)
    large = summarize(stein_direction(50 * x, s), 50 * x)["distance_relative"]
    assert large == pytest.approx(summarize(stein_direction(x, s), x)["distance_relative"])
    assert large == pytest.approx(2**0.5, rel=0.02)  # independent prompts of mean zero
    zeros = torch.zeros_like(x)
    assert summarize(stein_direction(zeros, s), zeros)["distance_relative"] == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_diagnostics_equal_numpy(scope):
    x, s = cloud(5, 3, 4)
    direction = stein_direction(x, s, scope=scope)
    logged, flat = summarize(direction, x), x.flatten(1).numpy()
    distances = [numpy.linalg.norm(flat[i] - flat[j]) for i in range(5) for j in range(i)]
    kernel = direction.kernel.reshape(-1, 5, 5).numpy()
    assert logged == pytest.approx(
        {
            "distance_min": min(distances),
            "distance_median": numpy.median(distances),
            "distance_max": max(distances),
            "distance_relative": numpy.median([d / 12**0.5 for d in distances]) / numpy.sqrt((flat**2).mean()),
            "bandwidth": direction.bandwidth.numpy().mean(),
            "kernel_off_diagonal": (kernel.sum() / len(kernel) - 5) / 20,
            "driving_norm": numpy.linalg.norm(direction.driving.flatten(1).numpy(), axis=1).mean(),
            "driving_by_others": share_of_others(x, s, scope),
            "repulsive_norm": numpy.linalg.norm(direction.repulsive.flatten(1).numpy(), axis=1).mean(),
            "spread": numpy.sqrt(((flat - flat.mean(0)) ** 2).mean()),
            "norm_of_mean": numpy.linalg.norm(flat.mean(0)),
            "mean_norm": numpy.linalg.norm(flat, axis=1).mean(),
        }
    )


def test_initial_particles_surround_the_prompt_at_the_asked_spread():
    prompt = 7 + 3 * torch.randn(100, 768, generator=torch.Generator().manual_seed(0))

    def make(num_particles: int, spread: float) -> Tensor:
        return initial_particles(prompt, num_particles, spread, torch.Generator().manual_seed(1))

    particles = make(5, 0.05)
    offset = particles - prompt
    assert float(offset.std()) == pytest.approx(0.05 * 3, rel=0.01)
    assert float(offset.mean()) == pytest.approx(0, abs=0.001)
    assert torch.equal(particles, make(5, 0.05))
    assert torch.equal(make(3, 0.0), prompt.expand(3, -1, -1))
    assert torch.equal(make(1, 0.05)[0], prompt)


def test_the_limits_named_in_the_module_are_the_ones_tested_here():
    assert (svgd.PAIRWISE_LIMIT, svgd.TILE_ROWS, svgd.GRAM_ROWS) == (16, 32, 64)
