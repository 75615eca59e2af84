"""Bayesian prompt tuning (BPT; in print BMTPT): Lee et al., Findings of EMNLP 2023.

Source stage: M particles follow the Stein direction towards the posterior over all source tasks. Target stage: the MAP prompt under
a Gaussian prior around the particles' mean, theta = F o (sum_r u_r v_r^T) with F shared by the targets trained together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from bpt_dist.backbones.prompts import prepend_chosen, rows_of
from bpt_dist.config import StageConfig, refuse, without_effect
from bpt_dist.config.prompt_options import Bandwidth, FactoredPromptOptions, MedianTimes
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.exchange import SteinExchange
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import SharedPrompt, Tensors, generator
from bpt_dist.methods.vanilla_transfer import VanillaTransfer
from bpt_dist.objective import gaussian_penalty, low_rank_ones, low_rank_product, mixture_penalty, sigma_from_relative
from bpt_dist.svgd import KernelOptions, initial_particles
from bpt_dist.svgd import MedianTimes as TimesMedianRule
from bpt_dist.tasks.spec import TaskSpec

PROJECTED = 64  # coordinates of the particle picture


class Config(FactoredPromptOptions):
    """Options of Bayesian prompt tuning."""

    HAS_SOURCE_STAGE: ClassVar[bool] = True
    HAS_PARTICLES: ClassVar[bool] = True

    name: Literal["bpt"] = "bpt"
    num_particles: int = Field(5, ge=1, le=1024, description="Particles (M).")
    kernel: Literal["rbf", "imq"] = Field("rbf", description="Kernel between particles.")
    scope: Literal["prompt", "token"] = Field("prompt", description="One kernel for the prompt, or one a position.")
    bandwidth: Bandwidth = Field(
        "median",
        description="h in units of squared distance; `median` is median(d^2) / log(M + 1), `{median_times: x}` x times that.",
    )
    form: Literal["svgd", "shared_scores", "repulsive_ensemble"] = Field(
        "svgd",
        description="`svgd`: scores are shared and particles repel; `shared_scores`: the same without the repulsion; "
        "`repulsive_ensemble`: own scores, and a repulsion.",
    )
    particle_init: Literal["common", "independent"] = Field(
        "common", description="One initial prompt plus noise, or one for each particle."
    )
    spread: float = Field(0.05, ge=0, description="Noise of `common` in standard deviations of the initial prompt.")
    start: Literal["mean", "best"] = Field(
        "mean",
        description="Start of the target prompt: the mean of the particles, or the particle with the lowest loss on the target's "
        "training rows (1,024 at most). The prior stays what `prior` says.",
    )
    prior: Literal["gaussian", "mixture", "none"] = Field("gaussian", description="Prior of the target prompt.")
    sigma: float | None = Field(None, gt=0, description="Standard deviation of the prior; or give sigma_relative.")
    sigma_relative: float | None = Field(None, gt=0, description="Sigma in units of RMS(mean prompt).")
    rank: int = Field(1, ge=0, le=128, description="Rank of the factor of the target prompt (R); 0 leaves it out.")

    @field_validator("start", mode="before")
    @classmethod
    def _every_particle(cls, value: Any) -> Any:
        if value == "ensemble":
            raise ValueError(
                "should be 'mean' or 'best' (got 'ensemble'); evaluation.predict: ensemble starts from every particle and averages "
                "their predictions, beside the prompt of the start"
            )
        return value

    @model_validator(mode="after")
    def _particles(self) -> "Config":
        problems = without_effect(self, "with num_particles 1", "start") if self.num_particles == 1 else []
        if self.particle_init == "independent":
            problems += without_effect(self, "with particle_init independent", "spread")
            if self.init in ("text", "file") and self.num_particles > 1:
                problems.append(f"particle_init: independent gives equal particles with init {self.init}; use common")
        refuse(problems)
        return self

    @model_validator(mode="after")
    def _prior(self) -> "Config":
        problems = []
        if self.prior == "none":
            problems = without_effect(self, "with prior none", "sigma", "sigma_relative")
        elif self.sigma is None and self.sigma_relative is None:
            problems = [f"sigma: is missing, prior {self.prior} needs it; give sigma or sigma_relative"]
        elif self.sigma is not None and self.sigma_relative is not None:
            problems = ["sigma: is given beside sigma_relative; set one of them to null"]
        if self.rank == 0:
            problems += without_effect(self, "with rank 0", "lr_low_rank")
        refuse(problems)
        return self


class BayesianPromptTuning(VanillaTransfer):
    """M particles of the source posterior, then the MAP prompt. 77,668 numbers a target for P = 100, R = 1 on T5-base."""

    paper = "Lee et al. 2023 (BMTPT)"
    summary = "SVGD over M source prompts, then MAP adaptation around their mean"
    particle_tensors = frozenset({"particles", "u", "v"})
    reference_tensors = frozenset({"starts", "deviations"})
    source_tensors: ClassVar[dict[str, str]] = {"particles": "M P D", "mean": "P D"}
    config: Config

    @property
    def num_particles(self) -> int:
        """M of the source stage; a target has one MAP prompt."""
        return self.config.num_particles

    # --- source stage -----------------------------------------------------------------------------------------------------------

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Start this rank's block of the particles; every rank draws all of them from the same generators."""
        config, num_particles = self.config, self.num_particles
        common = self.start("source")
        if config.particle_init == "independent":
            others = [self.start("source", particle) for particle in range(1, num_particles)]
            particles = torch.stack([common, *others])
        else:
            particles = initial_particles(common, num_particles, config.spread, generator(self.seed, "particles"))
        self.own(particles[mesh.rows(num_particles)])
        given = config.bandwidth
        bandwidth = TimesMedianRule(given.median_times) if isinstance(given, MedianTimes) else given
        rule = KernelOptions(config.kernel, config.scope, bandwidth, config.form)
        self.exchange = SteinExchange(mesh, num_particles, particles.shape[1], rule)
        self.stage = "source"

    def begin_step(self, mesh: Mesh) -> None:
        """Send the particles out: theta is known now, the Stein direction needs it after the backward pass."""
        if self.stage == "source":
            self.exchange.begin(self.particles.detach())

    def precondition_(self, mesh: Mesh) -> None:
        """Turn the gradients of the source loss into minus the Stein direction (collective: every rank)."""
        if self.stage != "source":
            return
        assert self.particles.grad is not None
        phi = self.exchange.direction(self.particles.detach(), score=-self.particles.grad)
        self.particles.grad.copy_(-phi)

    def comparison(self, mesh: Mesh) -> dict[str, Float[Tensor, "P D"]]:
        """Return the mean of the particles, which targets start from: it may lie where no particle does (collective)."""
        if self.stage != "source" or self.num_particles == 1:
            return {}
        return {"svgd/loss_at_mean": mesh.gather_particles(self.particles.detach()).mean(dim=0)}

    def diagnostics(self) -> dict[str, Any]:
        """Return SVGD's numbers over all particles, and a picture of where they are, as of the last step's start (collective)."""
        if self.stage != "source":
            return {}
        snapshot = self.exchange.diagnostics(self._projection_axes)
        if snapshot is None:
            return {}
        return {
            "metrics": {f"svgd/{name}": value for name, value in snapshot.metrics.items()},
            "particles": {"projection": snapshot.projection, "kernel": snapshot.kernel},
        }

    def _projection_axes(self) -> Float[Tensor, "P D n"]:
        """Draw the fixed random axes of the picture: they keep distances (Johnson-Lindenstrauss)."""
        shape = (*self.particles.shape[1:], PROJECTED)
        axes = torch.randn(shape[0] * shape[1], PROJECTED, generator=generator(0, "projection")) / PROJECTED**0.5
        return axes.view(shape)

    # --- target stage -----------------------------------------------------------------------------------------------------------

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Start at the posterior mean: F = mean, u v^T = 1 for each target; for an ensemble, also at every particle.

        With `start: best` F then moves to the best particle (`start_from`); the prior stays where `prior` puts it.
        """
        assert source is not None
        config, device = self.config, self.backbone.device
        mean, cloud = (source[name].to(device, torch.float32) for name in ("mean", "particles"))
        self.stage, self.target_tasks, self.num_examples = "target", [task.name for task in tasks], list(num_examples)
        self.starts = torch.cat([mean[None], cloud]) if self.adapts_particles else mean[None]
        self.deviations = cloud - mean
        self.candidates, self.start_particle = cloud if config.start == "best" else None, None
        self.num_adapted, self.predicting = len(self.starts) - 1, [0] * len(tasks)
        if config.prior != "none":
            self.prior_std = config.sigma or sigma_from_relative(mean, config.sigma_relative or 1.0)
        self.own(self.starts)
        if config.rank:
            factors = [
                low_rank_ones(config.rank, mean.shape[0], mean.shape[1], generator(self.seed, "low_rank", task.name))
                for task in tasks
            ]
            copies = len(self.starts)
            self.u = nn.Parameter(torch.stack([u for u, _ in factors]).repeat(copies, 1, 1, 1).to(device))
            self.v = nn.Parameter(torch.stack([v for _, v in factors]).repeat(copies, 1, 1, 1).to(device))

    def candidate_starts(self) -> Float[Tensor, "m P D"] | None:
        """Return the source particles where the target is to start from the best of them."""
        return self.candidates

    @torch.no_grad()
    def start_from(self, candidate: int) -> None:
        """Move F of the MAP prompt to a source particle; u v^T is 1 still, so that the prompt is this particle."""
        assert self.candidates is not None
        self.start_particle = candidate
        self.particles[0].copy_(self.candidates[candidate])

    @property
    def adapts_particles(self) -> bool:
        """Whether every particle is adapted beside the MAP prompt, to be averaged over or chosen from at prediction."""
        return self.evaluation.predict != "map" and self.evaluation.num_samples is None

    def predict_with(self, task: int, particle: int) -> None:
        """Let `best` predict a target task with one of the adapted particles."""
        self.predicting[task] = particle

    def num_predicting(self, predict: str) -> int:
        """Return the numbers of one prompt, or for an ensemble of adapted particles those of all of them."""
        copies = len(self.starts)  # the MAP prompt's own first
        return self.num_trainable() // copies * (max(1, copies - 1) if predict == "ensemble" else 1)

    def target_prompts(self, particles: slice = slice(None)) -> Float[Tensor, "m K P D"]:
        """Return the effective prompt theta of each target task for some `particles`; the first is the MAP prompt."""
        full = rows_of(self.particles, particles)[:, None]
        if not self.config.rank:
            return full.expand(-1, len(self.num_examples), -1, -1)
        return low_rank_product(full, rows_of(self.u, particles), rows_of(self.v, particles))

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Put each of the particles before every text; on targets, its task's prompt."""
        if self.stage == "source" or not self.config.rank:
            return super().input_embeds(embeds, batch, particles)
        return prepend_chosen(self.target_prompts(particles), batch.task_index, embeds)

    def prediction_inputs(self, embeds: Float[Tensor, "N T D"], batch: Batch, predict: str) -> Float[Tensor, "m N L D"]:
        """Put the MAP prompt before every text; for `best` the chosen particle; for an ensemble adapted particles or samples."""
        if predict == "best":
            copies = torch.tensor(self.predicting, device=embeds.device) + 1
            chosen = self.target_prompts()[copies, torch.arange(len(copies), device=embeds.device)]
            return prepend_chosen(chosen[None], batch.task_index, embeds)
        prompts = self.target_prompts(slice(1)) if predict == "map" else self._hypotheses()
        return prepend_chosen(prompts, batch.task_index, embeds)

    def _hypotheses(self) -> Float[Tensor, "m K P D"]:
        """Return the prompts of an ensemble: the adapted particles, or samples around the MAP prompt of each target.

        Samples have the covariance of the source particles: the posterior's own directions.
        """
        if self.adapts_particles:
            return self.target_prompts(slice(1, None))
        num_samples, num_particles = self.evaluation.num_samples or 0, len(self.deviations)
        noise = torch.randn(num_samples, num_particles, generator=generator(self.seed, "samples")).to(self.deviations.device)
        offsets = torch.einsum("sm,mpd->spd", noise, self.deviations) / max(num_particles - 1, 1) ** 0.5
        return self.target_prompts(slice(1)) + offsets[:, None]

    def penalty(self) -> Float[Tensor, ""] | None:
        """Return minus the log prior of each effective prompt, as objective.py scales it, weighted as the target's likelihood is.

        The prior of an adapted particle is centred at that particle, that of the MAP prompt at the mean.
        """
        if self.stage == "source" or self.config.prior == "none":
            return None
        shares = self.target_shares or (1 / len(self.num_examples),) * len(self.num_examples)
        terms = []
        for start, prompts in zip(self.starts, self.target_prompts(), strict=True):
            for theta, size, share in zip(prompts, self.num_examples, shares, strict=True):
                if self.config.prior == "gaussian":
                    terms.append(share * gaussian_penalty(theta, start, self.prior_std, size))
                else:
                    terms.append(share * mixture_penalty(theta, self.starts[0] + self.deviations, self.prior_std, size))
        return torch.stack(terms).sum()

    def param_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        """Return two speeds on targets: the full-rank matrix and the low-rank factors."""
        if self.stage == "source":
            return super().param_groups(stage)
        rate = self.prompt_rate(self.config.lr_full, self.config.lr_full_relative)
        groups: list[dict[str, Any]] = [{"params": [self.particles], "lr": rate}]
        return groups + ([{"params": [self.u, self.v], "lr": self.config.lr_low_rank}] if self.config.rank else [])

    @classmethod
    def shared_prompt(cls, trained: Tensors) -> SharedPrompt | None:
        """Return F and the targets' factors of the MAP prompt; without low-rank factors there are none to share it."""
        # The MAP prompt comes first; copies beside it are the particles of an ensemble.
        return SharedPrompt(*(trained[name][0] for name in ("particles", "u", "v"))) if "u" in trained else None

    def prompts(self) -> dict[str, Float[Tensor, "P D"]]:
        """Return the effective MAP prompt of each target task."""
        return dict(zip(self.target_tasks, self.target_prompts(slice(1))[0].detach().cpu(), strict=True))

    def ensemble_prompts(self) -> dict[str, Float[Tensor, "m P D"]] | None:
        """Return the prompts of each target task that `evaluation.predict: ensemble` averages over."""
        if self.evaluation.predict != "ensemble":
            return None
        return dict(zip(self.target_tasks, self._hypotheses().detach().cpu().unbind(1), strict=True))

    def best_prompts(self) -> dict[str, Float[Tensor, "P D"]] | None:
        """Return the adapted particle of each target task that `evaluation.predict: best` chose."""
        if self.evaluation.predict != "best":
            return None
        of_tasks = self.target_prompts().detach().cpu()
        return {name: of_tasks[self.predicting[task] + 1, task] for task, name in enumerate(self.target_tasks)}
