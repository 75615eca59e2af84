"""The SVGD direction as others compute it, given particles [M, E] and scores [M, E]; E = P·D coordinates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Direction = Callable[[Tensor, Tensor], Any]


class Peer(NamedTuple):
    """One way to the direction; `tensors` counts the M x M x E float32 tensors that are alive at once at its worst."""

    name: str
    title: str
    run: Direction
    tensors: float


def naive(particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Return the direction by all differences at once: what the formula says, written down."""
    differences = particles[:, None] - particles[None]
    squared = differences.square().sum(-1)
    num_particles = len(particles)
    row, column = torch.triu_indices(num_particles, num_particles, offset=1, device=particles.device)
    bandwidth = statistics.median(squared[row, column].tolist()) / math.log(num_particles + 1)
    kernel = torch.exp(-squared / bandwidth)
    repulsive = 2 / bandwidth * torch.einsum("ij,ije->ie", kernel, differences)
    return (kernel @ score + repulsive) / num_particles


def pyro_style(particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Return the direction as pyro.infer.svgd does in its `multivariate` mode, which is the SVGD of the paper.

    Its kernel is dense, M x M x E, and has a bandwidth for every coordinate. Where Pyro is installed its own kernel is called.
    """
    log_kernel, gradient = (_pyro_kernel() or _log_kernel_and_grad)(particles)
    kernel = log_kernel.sum(-1).exp()
    attractive = torch.mm(kernel, score)
    return (attractive + torch.einsum("nm,nm...->n...", kernel, gradient)) / len(particles)


def _log_kernel_and_grad(particles: Float[Tensor, "M E"]) -> tuple[Float[Tensor, "M M E"], Float[Tensor, "M M E"]]:
    """Do what Pyro's RBF kernel does, operation by operation and with its temporaries."""
    differences = particles.unsqueeze(0) - particles.unsqueeze(1)
    squared = differences.pow(2.0)
    index = torch.arange(len(particles), device=particles.device)
    pairs = squared[index > index.unsqueeze(-1), ...]
    bandwidth = pairs.median(dim=0)[0] / math.log(len(particles) + 1)
    return -(squared / bandwidth), 2.0 * differences / bandwidth


def _pyro_kernel() -> Any:
    if find_spec("pyro") is None:
        return None
    from pyro.infer.svgd import RBFSteinKernel

    return RBFSteinKernel().log_kernel_and_grad


class BlackJax:
    """The direction as blackjax.vi.svgd computes it, compiled at the first call, and imported then: jax bears no later fork."""

    def __init__(self) -> None:
        self.step: Any = None

    def __call__(self, particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Tensor:
        """Return the direction."""
        if self.step is None:
            self.step = _compiled()
        return torch.from_numpy(self.step(particles.cpu().numpy(), score.cpu().numpy()).__array__())


def _compiled() -> Any:
    import jax
    import optax
    from blackjax.vi import svgd

    # BlackJAX asks for a function from a particle to its gradient. The scores are known, so each particle carries its own along;
    # the kernel sees the particle alone.
    def kernel(x: Any, y: Any, length_scale: float = 1.0) -> Any:
        return svgd.rbf_kernel(x[0], y[0], length_scale)

    def gradient(carried: Any) -> Any:
        return carried[1], carried[1] * 0

    def direction(particles: Any, score: Any) -> Any:
        optimizer = optax.sgd(1.0)
        state = svgd.update_median_heuristic(svgd.init(particles, {"length_scale": 1.0}, optimizer))
        carried = state._replace(particles=(particles, score))
        return svgd.build_kernel(optimizer)(carried, gradient, kernel).particles[0] - particles

    return jax.jit(direction)


def peers() -> list[Peer]:
    """Return the opponents, and say of each whether it is the package itself or its operations repeated."""
    found = [Peer("naive", "all differences at once (M x M x PD)", naive, 2.5)]
    kind = "Pyro" if _pyro_kernel() else "Pyro's operations repeated (not installed)"
    found.append(Peer("pyro", kind, pyro_style, 7))
    if find_spec("blackjax") is not None:
        found.append(Peer("blackjax", "BlackJAX", BlackJax(), 4))
    return found
