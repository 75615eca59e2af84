"""What the bench compares with: PEFT's prompt tuning in a loop, and other implementations of the SVGD direction."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.commands.bench.workload import Work
from bpt_dist.data.batches import Batch
from bpt_dist.errors import ConfigError
from bpt_dist.objective import sequence_log_likelihood

Direction = Callable[[Tensor, Tensor], Any]


class PeftLoop:
    """PEFT's prompt tuning over the weights of a backbone: only the prompt is trainable, texts are padded to the longest."""

    def __init__(self, backbone: T5Backbone, num_prompt: int) -> None:
        peft = import_peft()
        # PEFT's default for T5 is 2, which makes twice the numbers that are used.
        config = peft.PromptTuningConfig(
            task_type=peft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=num_prompt, num_transformer_submodules=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = peft.get_peft_model(backbone.model, config).to(backbone.device)
        self.stock: Any = backbone.model
        self.model.eval()

    @property
    def prompt(self) -> Tensor:
        """Return the trainable prompt [P, D], in float32."""
        weight: Tensor = self.model.prompt_encoder["default"].embedding.weight
        return weight

    def gradients(self, work: Work, *, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods [M, N] (mean over target tokens) and the gradient [M, P, D] of their sum."""
        self.model.train(dropout)
        log_likelihoods, gradients = [], []
        for particle in work.prompts:
            self.load(particle)
            log_likelihood = self._log_likelihood(work.texts)
            log_likelihood.sum().backward()
            log_likelihoods.append(log_likelihood.detach())
            gradients.append(self.prompt.grad)
        self.model.eval()
        return torch.stack(log_likelihoods), torch.stack([gradient for gradient in gradients if gradient is not None])

    def load(self, particle: Tensor) -> None:
        """Make `particle` [P, D] the prompt."""
        with torch.no_grad():
            self.prompt.copy_(particle)
        self.prompt.grad = None

    def _log_likelihood(self, texts: Batch) -> Tensor:
        start = self.stock._shift_right(texts.target_ids)
        logits = self.model(
            input_ids=texts.source_ids, attention_mask=texts.source_mask, decoder_input_ids=start, use_cache=False
        ).logits
        return sequence_log_likelihood(logits, texts.target_ids, "token_mean")

    @torch.no_grad()
    def generate(self, particle: Tensor, texts: Batch, num_tokens: int) -> Tensor:
        """Return the greedily decoded ids [N, U] under one prompt."""
        self.load(particle)
        ids: Tensor = self.model.generate(
            input_ids=texts.source_ids, attention_mask=texts.source_mask, max_new_tokens=num_tokens, num_beams=1, do_sample=False
        )
        return ids


def import_peft() -> Any:
    """Return the package, or raise ConfigError when it is not installed. Call it early: forked processes then share the import."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("bpt-dist bench: peft, the baseline, is not installed; run `pip install peft`") from error
    return peft


class Peer(NamedTuple):
    """One implementation of the direction; `tensors` is the peak number of M x M x E float32 tensors it holds at once."""

    name: str
    title: str
    run: Direction
    tensors: float


def peers() -> list[Peer]:
    """Return the implementations to compare with; a title tells if the package runs or its operations are repeated."""
    others = [Peer("naive", "all differences at once (M x M x PD)", naive, 2.5)]
    kind = "Pyro" if _pyro_kernel() else "Pyro's operations repeated (not installed)"
    others.append(Peer("pyro", kind, pyro_style, 7))
    if find_spec("blackjax") is not None:
        others.append(Peer("blackjax", "BlackJAX", BlackJax(), 4))
    return others


def naive(particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Return the direction from the tensor of all differences: the formula as it is written."""
    differences = particles[:, None] - particles[None]
    squared = differences.square().sum(-1)
    num_particles = len(particles)
    row, column = torch.triu_indices(num_particles, num_particles, offset=1, device=particles.device)
    bandwidth = statistics.median(squared[row, column].tolist()) / math.log(num_particles + 1)
    kernel = torch.exp(-squared / bandwidth)
    repulsive = 2 / bandwidth * torch.einsum("ij,ije->ie", kernel, differences)
    return (kernel @ score + repulsive) / num_particles


def pyro_style(particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Return the direction as pyro.infer.svgd does in its `multivariate` mode, which is that of the SVGD paper.

    Its kernel is dense, M x M x E, and has a bandwidth for every coordinate. Pyro's own kernel is called where Pyro is installed.
    """
    log_kernel, gradient = (_pyro_kernel() or _log_kernel_and_grad)(particles)
    kernel = log_kernel.sum(-1).exp()
    attractive = torch.mm(kernel, score)
    return (attractive + torch.einsum("nm,nm...->n...", kernel, gradient)) / len(particles)


class BlackJax:
    """The direction of blackjax.vi.svgd, imported and compiled at the first call: a process with jax cannot fork."""

    def __init__(self) -> None:
        self.step: Any = None

    def __call__(self, particles: Float[Tensor, "M E"], score: Float[Tensor, "M E"]) -> Tensor:
        """Return the direction."""
        if self.step is None:
            self.step = _compiled()
        return torch.from_numpy(self.step(particles.cpu().numpy(), score.cpu().numpy()).__array__())


def _log_kernel_and_grad(particles: Float[Tensor, "M E"]) -> tuple[Float[Tensor, "M M E"], Float[Tensor, "M M E"]]:
    """Repeat Pyro's RBF kernel, operation by operation, with its temporary tensors."""
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


def _compiled() -> Any:
    import jax
    import optax
    from blackjax.vi import svgd

    # BlackJAX asks for a function from a particle to its gradient. The scores are known, so each particle carries its score;
    # the kernel reads the particle alone.
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
