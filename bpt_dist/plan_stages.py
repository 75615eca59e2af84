"""What one stage of a planned run computes, sends and stores; sizes are those of the method's own tensors, made without a T5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bpt_dist.backbone_shapes import T5Shape
from bpt_dist.config import Config, SourceStage, Stage, TargetStage
from bpt_dist.data.batches import Batch
from bpt_dist.data.tasks import TaskSpec
from bpt_dist.engine import OPTIMIZERS
from bpt_dist.errors import ConfigError
from bpt_dist.exchange import slices
from bpt_dist.mesh import Axis, Mesh, World
from bpt_dist.methods.base import Method
from bpt_dist.passes import Passes, sequences_at_once

ASSUMED_EVAL_ROWS = 1000  # the published split rule carves so many; data.max_eval_rows says otherwise
CHARACTERS_A_TOKEN = 3  # of label words; a T5 piece is longer on average
WORD = 8  # bytes of the float64 numbers that ranks agree on


@dataclass(frozen=True)
class Collective:
    """One kind of communication: how often in a step, and how many bytes a rank receives in the step."""

    name: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers: texts and rows of a step, `flops` of a step over all ranks, bytes of one rank."""

    name: str
    steps: int
    mesh: tuple[int, int]
    num_particles: int
    particles_per_rank: int
    texts: int
    rows: int
    rows_per_rank: int
    rows_at_once: int
    passes_per_step: int
    flops: int
    activation_bytes: int
    trainable_parameters: int
    trained_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int
    collectives: tuple[Collective, ...]
    evaluation_passes: int = 0
    evaluation_flops: int = 0


class PlannedWorld(World):
    """A world of which only the size is known; its meshes have no process groups."""

    def _make_axes(self, particle: int, data: int) -> tuple[Axis, Axis]:
        return Axis(0, particle), Axis(0, data)


def stage_plan(
    name: str,
    config: Config,
    settings: Stage,
    method: Method,
    mesh: Mesh,
    specs: Sequence[TaskSpec],
    shape: T5Shape,
    *,
    evaluated: bool = True,
) -> StagePlan:
    """Count one stage of a run; `method` holds the tensors of this stage, whole, as one process would.

    A prelude is not `evaluated`.
    """
    drawn = settings.tasks_per_step if isinstance(settings, SourceStage) and settings.tasks_per_step else len(specs)
    texts = drawn * settings.batch_size
    copies, positions = _added(method)
    is_source = isinstance(settings, SourceStage)
    if mesh.exchange == "coordinates":
        slices(positions, mesh.particle.size)
    own = copies // mesh.particle.size if is_source else copies
    refuse_idle_ranks(name, texts * own if config.deals_cells(settings) else texts, mesh)
    own_texts = -(-texts // mesh.data.size)
    together = not isinstance(settings, SourceStage) or settings.shared_texts
    trains_weights = config.method.TRAINS_BACKBONE
    again = config.distribution.activation_checkpointing
    costs = [shape.row_cost(positions, *lengths(spec, config), trains_weights=trains_weights, recomputed=again) for spec in specs]
    in_parts = trains_weights and config.distribution.shard != "none"
    trained, whole = _bytes(method, mesh) // (mesh.world.size if in_parts else 1), _bytes(method, Mesh())
    states = num_optimizer_states(settings)
    keeps_best = isinstance(settings, TargetStage) and evaluated
    passes, evaluation_flops = (
        evaluation(config, settings, mesh, copies, [cost.forward_flops for cost in costs])
        if isinstance(settings, TargetStage) and evaluated
        else (0, 0)
    )
    longest = max(positions + sum(lengths(spec, config)) for spec in specs)
    particles_at_once, texts_at_once = at_once(config, settings, own if together else 1, own_texts, longest)
    num_passes = -(-own // particles_at_once) * -(-own_texts // texts_at_once)
    return StagePlan(
        name=name,
        steps=settings.steps,
        mesh=(mesh.particle.size, mesh.data.size),
        num_particles=copies,
        particles_per_rank=own,
        texts=texts,
        rows=texts * copies,
        rows_per_rank=own * own_texts,
        rows_at_once=particles_at_once * texts_at_once,
        passes_per_step=num_passes,
        flops=round(copies * texts * flops_of_a_text([c.flops + method.extra_forwards * c.forward_flops for c in costs], settings)),
        activation_bytes=particles_at_once * texts_at_once * max(cost.activation_bytes for cost in costs),
        trainable_parameters=method.num_trainable(),
        trained_bytes=trained * (2 + keeps_best),
        optimizer_bytes=trained * states,
        checkpoint_bytes=whole * (1 + states + keeps_best),
        collectives=tuple(_collectives(method, mesh, len(specs), copies, num_passes, config, shape)) if settings.steps else (),
        evaluation_passes=passes,
        evaluation_flops=evaluation_flops,
    )


def at_once(config: Config, settings: Stage, particles: int, texts: int, longest: int) -> tuple[int, int]:
    """Return how many particles and texts meet in one pass through the T5 when all texts are as long as the longest."""
    if config.distribution.exact:
        return 1, 1
    together = config.distribution.shard != "none"
    return sequences_at_once(particles, texts, longest, Passes(size=settings.pass_size, together=together))


def lengths(spec: TaskSpec, config: Config) -> tuple[int, int]:
    """Return the longest source and target of a task in tokens, end token included; label words count by their characters."""
    source = config.data.max_source_length or spec.max_source_length
    words = spec.words(config.data.protocol)
    return source, max((-(-len(word) // CHARACTERS_A_TOKEN) + 1 for word in words), default=spec.max_target_length)


def flops_of_a_text(flops: Sequence[int], settings: Stage) -> float:
    """Return the FLOPs of a text: the mean over the tasks, or of a mixture, whose shares only the data know, the most."""
    return sum(flops) / len(flops) if settings.sampling == "all" else max(flops)


def refuse_idle_ranks(stage: str, sequences: int, mesh: Mesh) -> None:
    """Raise ConfigError where a step has fewer sequences to deal than the data axis has ranks."""
    if sequences >= mesh.data.size:
        return
    raise ConfigError(
        f"{stage.partition('/')[0]}.batch_size: a step of {stage} has {sequences} sequence(s) for {mesh.data.size} ranks of the "
        f"data axis; raise it, or start at most {sequences * mesh.particle.size} processes"
    )


def num_optimizer_states(stage: Stage) -> int:
    """Return how many numbers the optimizer of a stage keeps for each trained one."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    optimizer = OPTIMIZERS[stage.optimizer]([{"params": [weight], "lr": 1.0}], stage)
    optimizer.step()
    return sum(value.shape == weight.shape for value in optimizer.state[weight].values())


def evaluation(config: Config, settings: TargetStage, mesh: Mesh, copies: int, forward_flops: Sequence[int]) -> tuple[int, int]:
    """Return the passes of a rank, and the FLOPs of all ranks, in the validations and final evaluations of a target stage."""
    every, rows = settings.eval_every or settings.steps, config.data.max_eval_rows or ASSUMED_EVAL_ROWS
    validations = math.ceil(settings.steps / every) if settings.steps else 0
    ensemble = config.evaluation.predict == "ensemble"
    num_splits = len(config.evaluation.splits)
    hypotheses = (config.evaluation.num_samples or copies - 1) if ensemble else 0
    at_once = 1 if config.distribution.exact else config.evaluation.batch_size
    passes = -(-rows // (mesh.world.size * at_once)) * (validations + num_splits * (1 + ensemble))
    rows_forward = rows * (validations + num_splits * (1 + hypotheses))
    return passes * len(forward_flops), rows_forward * sum(forward_flops)


def _added(method: Method) -> tuple[int, int]:
    """Return how many particles a method puts before a text, and how many positions each adds."""
    one = torch.zeros(1, 1, dtype=torch.long)
    batch = Batch(0, one, one, one, torch.zeros(1, dtype=torch.long), ("plan",), torch.ones(1))
    with torch.no_grad():
        inputs = method.encoder_inputs(torch.zeros(1, 1, method.backbone.width), batch)
    return inputs.shape[0], inputs.shape[2] - 1


def _bytes(method: Method, mesh: Mesh, particles: int | None = None) -> int:
    """Return the bytes of one copy of what a rank of `mesh` trains, or of so many of its particles."""
    total = 0
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            split = mesh.particle.size if name in method.particle_tensors else 1
            if name in method.particle_tensors and particles is not None:
                split = len(parameter) // particles
            total += parameter.numel() * parameter.element_size() // split
    return total


def _collectives(
    method: Method, mesh: Mesh, num_tasks: int, copies: int, num_passes: int, config: Config, shape: T5Shape
) -> list[Collective]:
    """Return what the ranks send one another in every step."""
    if mesh.world.size == 1:
        return []
    exact = config.distribution.exact
    # Calls made, step, seconds, stop, not finite, whose rows; and for each task (with `exact` of each particle) a sum and a count.
    kept = num_tasks * (copies if exact else 1)
    found = [Collective("all-gather of flags and losses", 1, mesh.world.size * WORD * (6 + 2 * kept))]
    if mesh.data.size > 1 and exact:
        one = _bytes(method, mesh, particles=1) + 4  # the gradient of one particle, and its loss
        found.append(Collective("all-gather of gradients over data, pass by pass", num_passes, num_passes * mesh.data.size * one))
    elif mesh.data.size > 1:
        found.append(Collective("all-reduce of gradients over data", 1, _bytes(method, mesh)))
    if mesh.particle.size > 1 and mesh.exchange == "coordinates":
        num_positions = _added(method)[1]
        of_position = _bytes(method, Mesh()) // num_positions
        widest = max(each.stop - each.start for each in slices(num_positions, mesh.particle.size))
        received = 2 * widest * of_position + _bytes(method, mesh)
        found.append(Collective("all-to-all of particles, of scores and of directions", 3, received))
        if getattr(config.method, "scope", "prompt") == "prompt":
            found.append(Collective("all-reduce of squared distances", 1, WORD * copies**2))
    elif mesh.particle.size > 1:
        found.append(Collective("all-gather of particles and of scores", 2, 2 * _bytes(method, Mesh())))
    if config.distribution.shard != "none":
        gathers = (2 + method.extra_forwards) * num_passes
        name = "all-gather of T5 blocks, forward and backward"
        found.append(Collective(name, gathers * sum(shape.num_blocks), gathers * shape.weight_bytes))
    return found
