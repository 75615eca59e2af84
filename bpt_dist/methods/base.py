"""The interface of a method: what is trainable, how it enters the frozen backbone, what is optimised, what the targets start from.

A method does not own the optimizer, the loop, the device, rank logic, files, logging or seeds.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bpt_dist.backbones.base import Backbone, Forward
from bpt_dist.backbones.prompts import embedding_rms
from bpt_dist.backbones.transfer import send
from bpt_dist.config import EvaluationConfig, MethodConfig, RunConfig, StageConfig
from bpt_dist.config.own_method import OwnMethod
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods import _own
from bpt_dist.objective import Reduction
from bpt_dist.tasks.spec import TaskSpec

Tensors = Mapping[str, Tensor]


class AuxiliaryPhase(NamedTuple):
    """A shorter stage that comes before the main one; `lr` None is the stage's own rate."""

    name: str
    steps: int
    lr: float | None = None

    def settings(self, stage: StageConfig) -> StageConfig:
        """Return the settings of this phase of `stage`: its own steps and rate, all tasks at every step, nothing validated."""
        rates = {"lr": self.lr, "lr_relative": None} if self.lr else {}
        values = {"steps": self.steps, "sampling": "all", **rates}
        unset = {"tasks_per_step": None, "eval_every": None, "patience": None, "annealing": "none", "annealing_steps": None}
        fields = type(stage).model_fields
        return stage.model_copy(update=values | {key: value for key, value in unset.items() if key in fields})


class SharedPrompt(NamedTuple):
    """A prompt [P, D] that targets trained together share, and the low-rank factors u [K, R, P], v [K, R, D] of each."""

    full: Tensor
    u: Tensor
    v: Tensor


class LowRankPairs(NamedTuple):
    """B A alpha / rank, added to linear layers of the backbone: by the layer's name, A [R, inputs] and B [outputs, R]."""

    alpha: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]


class Method(nn.Module):
    """One way to adapt a frozen backbone. Owns exactly the tensors training may change, and nothing else.

    Every method implements `begin_target`. The hooks below are grouped by who needs them: every method, a method with a source
    stage, one with particles, one whose targets have a prior or are trained together, one that can be exported.
    """

    # Of every method: the paper with its year, and half a sentence about what is trained.
    paper: ClassVar[str]
    summary: ClassVar[str]

    # Why the method is nothing without an encoder; None for the others, which work on any backbone.
    needs_encoder: ClassVar[str | None] = None

    # Whether every text has a prompt of its own, so that none can be read once for several texts.
    prompt_of_each_text: ClassVar[bool] = False

    # With a source stage. What a target stage needs of it: tensor name to axes, "K P D", where D is the width of the backbone. A
    # method that names nothing starts from its own posteriors only.
    source_tensors: ClassVar[Mapping[str, str]] = {}
    # The tasks along axis K of those tensors, in order; set once a source stage has begun or its posterior was read.
    source_tasks: tuple[str, ...] = ()
    # Names of trainable tensors whose first axis counts separate problems that every rank keeps: clipped row by row.
    independent_rows: frozenset[str] = frozenset()

    # With particles. Names of the trainable tensors whose first axis counts them: sharded over the mesh, clipped one by one.
    particle_tensors: frozenset[str] = frozenset()

    # Of every method that needs them. Names of tensors that are read and not trained, such as the centres of a prior: compared
    # between replicas at the start of a stage.
    reference_tensors: frozenset[str] = frozenset()

    # For targets trained together. The share of each in the texts of a step, in expectation, which weighs its likelihood; () is
    # equal shares.
    target_shares: tuple[float, ...] = ()

    # Which of `candidate_starts` the target stage has started from; None where there was nothing to choose.
    start_particle: int | None = None

    # How many particles a target stage adapts beside its prompt; `evaluation.predict: best` chooses one of them for each target.
    num_adapted: int = 0

    backbone: Backbone

    def __init__(
        self,
        config: MethodConfig,
        backbone: Backbone,
        *,
        seed: int,
        reduction: Reduction,
        evaluation: EvaluationConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.reduction = config, seed, reduction
        self.evaluation = evaluation or EvaluationConfig()
        # Not a sub-module: the backbone's weights are not this method's parameters.
        object.__setattr__(self, "backbone", backbone)

    # --- every method: what is trained, how it enters the backbone, what is optimised ---------------------------------------------

    def begin_target(self, source: Tensors | None, tasks: Sequence[TaskSpec], num_examples: Sequence[int], mesh: Mesh) -> None:
        """Create the trainable tensors of a target stage from what `end_source` returned; `num_examples` is |D| of each task."""
        raise NotImplementedError

    def input_embeds(
        self, embeds: Float[Tensor, "N T D"], batch: Batch, particles: slice = slice(None)
    ) -> Float[Tensor, "m N L D"]:
        """Return the inputs of the backbone for each of this rank's `particles`; by default the word embeddings, unchanged.

        A method without `particle_tensors` has one hypothesis and may leave the last parameter out. With them, what is built for
        particles that a pass does not read would cost a rank the square of their number.
        """
        return embeds[None]

    def forward(self, batch: Batch, particles: slice = slice(None)) -> Forward:
        """Return log-likelihoods [m, N] of the batch's targets for the `particles` (counted on this rank)."""
        chosen = (particles,) if self.particle_tensors else ()
        return self.backbone.log_likelihood(batch, lambda embeds: self.input_embeds(embeds, batch, *chosen), self.reduction)

    def loss(self, forward: Forward, batch: Batch) -> Float[Tensor, ""]:
        """Return minus the weighted log-likelihood, summed over this rank's texts and particles: each particle sees its own sum."""
        weight = send(batch.weight, forward.log_likelihood.device).to(forward.log_likelihood.dtype)
        return -(forward.log_likelihood * weight).sum()

    def param_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
        """Return the optimizer's groups; two-speed learning rates live here (collective where the backbone is partitioned)."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": self.stage_rate(stage)}]

    def stage_rate(self, stage: StageConfig) -> float | None:
        """Return the peak learning rate that `stage` gives; None where it gives none, because it takes no steps."""
        return self.prompt_rate(stage.lr, stage.lr_relative)

    def prompt_rate(self, absolute: float | None, relative: float | None) -> float | None:
        """Return a learning rate of soft prompts: `absolute`, or `relative` times the RMS of the backbone's word embeddings.

        Only a method whose options say RATE_IS_OF_PROMPTS is given a relative rate; the configuration refuses it elsewhere.
        """
        return absolute if relative is None else relative * embedding_rms(self.backbone)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of the trainable tensors as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def replicated_tensors(self) -> dict[str, Tensor]:
        """Return what must be equal on all ranks that own the same particles: trained tensors and `reference_tensors`.

        The weights of a partitioned backbone differ from rank to rank and are left out.
        """
        present = {name: getattr(self, name, None) for name in self.reference_tensors}
        references = {name: tensor for name, tensor in present.items() if tensor is not None}
        if self.config.TRAINS_BACKBONE and self.backbone.partition is not None:
            return references
        return {**references, **{name: parameter.detach() for name, parameter in self.named_parameters()}}

    @torch.no_grad()
    def restore(self, tensors: Tensors) -> None:
        """Put back what `snapshot` returned."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])

    def num_trainable(self) -> int:
        """Return how many numbers training may change in the current stage."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def num_predicting(self, predict: str) -> int:
        """Return how many of the trained numbers a prediction uses; `predict` is `map`, `ensemble` or `best`."""
        return self.num_trainable()

    def end(self) -> None:
        """Leave the backbone as it was before this method."""
        self.backbone.detach()

    # --- every method: how it predicts --------------------------------------------------------------------------------------------

    def prediction_inputs(self, embeds: Float[Tensor, "N T D"], batch: Batch, predict: str) -> Float[Tensor, "m N L D"]:
        """Return the inputs of each hypothesis a prediction averages over; `predict` is `map`, `ensemble` or `best`."""
        return self.input_embeds(embeds, batch)

    def rank(self, batch: Batch, candidates: Int[Tensor, "C U"], predict: str) -> Float[Tensor, "m N C"]:
        """Return the log-likelihood, summed over tokens, of each candidate target (-100 pads) under each hypothesis."""
        return self.backbone.rank(batch, candidates, lambda embeds: self.prediction_inputs(embeds, batch, predict))

    def generate(self, batch: Batch, max_new_tokens: int, predict: str = "map") -> list[str]:
        """Return the greedily decoded target of each text: of the MAP hypothesis, or of the mean over those of an `ensemble`."""
        inputs = lambda embeds: self.prediction_inputs(embeds, batch, predict)  # noqa: E731
        return self.backbone.generate(batch, inputs, max_new_tokens, average=predict == "ensemble")[0]

    # --- methods with a source stage, or shorter phases before a stage ------------------------------------------------------------

    def begin_source(self, tasks: Sequence[TaskSpec], mesh: Mesh) -> None:
        """Create the trainable tensors of the source stage; identical on every world size."""
        raise NotImplementedError(f"{type(self).__name__} has no source stage")

    def end_source(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return what the source stage hands over, whole, on every rank (collective: every rank)."""
        raise NotImplementedError(f"{type(self).__name__} has no source stage")

    def auxiliary_phases(self) -> Sequence[AuxiliaryPhase]:
        """Return the stages to train before the one just begun, on the same tasks; `begin_...` has set up the first.

        Every step of a phase has texts of all tasks, whatever the sampling, and the main stage continues behind them.
        """
        return ()

    def end_auxiliary_phase(self, mesh: Mesh) -> None:
        """Keep what the phase just trained has learned and set up the next one, or the main stage (collective: every rank)."""
        raise NotImplementedError(f"{type(self).__name__} has no auxiliary phases")

    @property
    def extra_forwards(self) -> int:
        """Passes of every text without gradients that a step of the current stage takes beside the one it learns from."""
        return 0

    def candidate_starts(self) -> Float[Tensor, "m P D"] | None:
        """Return the prompts one of which a target stage is to start from, or None where there is nothing to choose.

        Asked for after `begin_target`; `start_from` is then told which has the lowest loss on the targets' training rows.
        """
        return None

    def start_from(self, candidate: int) -> None:
        """Start the target stage from one of `candidate_starts`, counted from 0, and remember it in `start_particle`."""
        raise NotImplementedError(f"{type(self).__name__} names no candidates")

    def predict_with(self, task: int, particle: int) -> None:
        """Let `best` predict a target task of the stage with one of `num_adapted` particles, both counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} adapts no particles")

    # --- particles: hypotheses trained side by side -------------------------------------------------------------------------------

    @property
    def num_particles(self) -> int:
        """M of the source stage: how many hypotheses are trained side by side."""
        return 1

    def begin_step(self, mesh: Mesh) -> None:
        """Start what may run beside the forward pass, such as the gather of the particles (collective: every rank)."""

    def precondition_(self, mesh: Mesh) -> None:
        """Change the gradients before the update (collective: every rank); by default they stay."""

    def diagnostics(self) -> dict[str, Any]:
        """Return what the last step should log besides the losses (collective: every rank; what rank 0 returns counts)."""
        return {}

    def comparison(self, mesh: Mesh) -> Mapping[str, Float[Tensor, "P D"]]:
        """Return prompts whose loss on the step's texts is logged, by the metric's name; nothing is learnt from them (collective).

        Asked for at steps that end with a record only, before the update; every rank returns the same bits.
        """
        return {}

    # --- targets with a prior, and targets trained together -----------------------------------------------------------------------

    def penalty(self) -> Float[Tensor, ""] | None:
        """Return minus the log prior on the scale of the loss, or None; added once, after the sum over texts."""
        return None

    # --- export -------------------------------------------------------------------------------------------------------------------

    def prompts(self) -> dict[str, Float[Tensor, "P D"]] | None:
        """Return the finished soft prompt of each target task, or None when the method is not a prompt."""
        return None

    def ensemble_prompts(self) -> dict[str, Float[Tensor, "m P D"]] | None:
        """Return the prompts that an `ensemble` averages over, by target task, or None without an ensemble of prompts."""
        return None

    def best_prompts(self) -> dict[str, Float[Tensor, "P D"]] | None:
        """Return the prompt that `best` predicts each target task with (`predict_with`), or None where there is no such choice."""
        return None

    @classmethod
    def shared_prompt(cls, trained: Tensors) -> SharedPrompt | None:
        """Return what of the trained tensors of a joint stage makes its prompts F o (sum_r u_r v_r^T), or None."""
        return None

    def low_rank_pairs(self) -> LowRankPairs | None:
        """Return what is added to linear layers, or None when the method adds no such thing."""
        return None

    @classmethod
    def options_of_stored(cls, options: Mapping[str, Any], trained: Tensors) -> dict[str, Any]:
        """Return options under which `begin_target` makes room for stored tensors without files their start was read from."""
        return dict(options)


def load(config: RunConfig, backbone: Backbone) -> Method:
    """Return the method named in the configuration: the one Method subclass of the file of that name.

    Raises ConfigError for a method that needs an encoder where the backbone has none, and for a file outside the package that
    cannot be imported or has no such class.
    """
    chosen = class_of(config.method)
    if chosen.needs_encoder is not None and "encoder" not in backbone.num_blocks:
        raise ConfigError(
            f"method.name: {config.method.name} {chosen.needs_encoder}, and {backbone.name} has no encoder; choose another method, "
            "or a backbone of the T5 family"
        )
    options = config.method.as_options_of(options_class(chosen))
    return chosen(options, backbone, seed=config.seed, reduction=config.reduction, evaluation=config.evaluation)


def class_of(config: MethodConfig) -> type[Method]:
    """Return the Method subclass of these options. Raises ConfigError for a file outside the package without one, or with two."""
    if not isinstance(config, OwnMethod):
        return method_class(config.name)
    found = _classes_in(_own.imported(config))
    if len(found) != 1:
        has = f"has {len(found)} ({', '.join(sorted(value.__name__ for value in found))})" if found else "has none"
        raise ConfigError(f"method.path: {config.path}: {has}, and a method is one class that derives from Method; keep one")
    if found[0].begin_target is Method.begin_target:
        raise ConfigError(f"method.path: {config.path}: {found[0].__name__} has no begin_target, which every method needs; add it")
    return found[0]


def own_digest(method: type[Method]) -> str | None:
    """Return the SHA-256 of the file of a method outside the package, None for a method of the package."""
    return _own.digest_of_module(method.__module__)


def method_class(name: str) -> type[Method]:
    """Return the Method subclass of `methods/<name>.py`; the configuration checked the name against the directory."""
    module = importlib.import_module(f"bpt_dist.methods.{name}")
    (defined_here,) = _classes_in(module)
    return defined_here


def _classes_in(module: ModuleType) -> list[type[Method]]:
    """Return the Method subclasses that a module defines itself."""
    classes = {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method)}
    return [value for value in classes if value.__module__ == module.__name__]


def options_class(method: type[Method]) -> type[MethodConfig]:
    """Return the options of a method: the class `Config` of its file."""
    options: type[MethodConfig] = vars(sys.modules[method.__module__])["Config"]
    return options


def generator(seed: int, *keys: object) -> torch.Generator:
    """Return a generator that depends on the seed and what it is for, never on how much was drawn before."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
