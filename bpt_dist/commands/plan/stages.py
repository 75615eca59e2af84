"""What one stage of a planned run computes, sends and stores; sizes are those of the method's tensors, made without a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bpt_dist.backbones.attention import default_attention
from bpt_dist.backbones.base import DTYPES
from bpt_dist.backbones.shapes import NOTHING, ModelShape, RowCost
from bpt_dist.commands.plan.collectives import Collective, added, collectives, trained_bytes
from bpt_dist.config import RunConfig, SourceStageConfig, StageConfig, TargetStageConfig
from bpt_dist.distributed.exchange import slices
from bpt_dist.distributed.mesh import Axis, Mesh, World
from bpt_dist.methods.base import Method
from bpt_dist.storage.snapshots import MOST_FILES, MOST_INLINE
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.training.microbatches import MicroBatchLimits, assign, idle_ranks_warning, sequences_at_once, tokens_a_pass
from bpt_dist.training.optimizer import OPTIMIZERS
from bpt_dist.training.sharding.passes import num_sharers, sequences_that_fit
from bpt_dist.training.sharding.placement import padding_reason
from bpt_dist.training.start import MOST_ROWS

ASSUMED_EVAL_ROWS = 1000  # the published split rule carves so many; data.max_eval_rows says otherwise
CHARACTERS_A_TOKEN = 3  # of label words; a piece is longer on average
PROJECTED = 64  # numbers by which a picture places a particle


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers: texts and rows of a step, `flops` of a step over all ranks, bytes of one rank.

    `exact_passes_per_step` are the passes with `distribution.exact`, `activation_bytes` those of a pass of training,
    `evaluation_bytes` those of a pass that predicts; `warning` tells of ranks that have no texts.
    """

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
    exact_passes_per_step: int
    flops: int
    activation_bytes: int
    trainable_parameters: int
    trained_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int
    checkpoints: int  # written by the whole stage; the newest two stay
    left_bytes: int  # on disk, besides checkpoints
    evaluation_bytes: int
    collectives: tuple[Collective, ...]
    evaluation_passes: int = 0
    evaluation_flops: int = 0
    comparison_passes: int = 0  # of a rank in the whole stage, without gradients: where to start, and the loss at the mean
    comparison_flops: int = 0
    warning: str | None = None


class PlannedWorld(World):
    """A world of which only the size is known; its meshes have no process groups."""

    def _make_axes(self, particle: int, data: int) -> tuple[Axis, Axis]:
        return Axis(0, particle), Axis(0, data)


def stage_plan(
    name: str,
    config: RunConfig,
    settings: StageConfig,
    method: Method,
    mesh: Mesh,
    specs: Sequence[TaskSpec],
    shape: ModelShape,
    memory: int,
    *,
    evaluated: bool = True,
    carried: Mapping[str, Tensor] | None = None,
) -> StagePlan:
    """Count one stage of a run; `method` holds the tensors of this stage, whole, as one process would.

    `memory` is that of a process, in bytes. A prelude is not `evaluated`. `carried` is what a target gets of the source stage.
    """
    drawn = settings.tasks_per_step if isinstance(settings, SourceStageConfig) and settings.tasks_per_step else len(specs)
    texts = drawn * settings.batch_size
    copies, positions, num_prompts = added(method, len(specs))
    is_source = isinstance(settings, SourceStageConfig)
    if mesh.exchange == "coordinates":
        slices(positions, mesh.particle.size)
    own = copies // mesh.particle.size if is_source else copies
    sharing = own if config.particles_share_texts(settings) else 1
    shape_of_mesh = (mesh.particle.size, mesh.data.size)
    trains_weights = config.method.TRAINS_BACKBONE
    prompt, costs = costs_of(config, method, specs, shape, positions, num_prompts)
    in_parts = trains_weights and config.distribution.shard != "none"
    sharers = mesh.world.size if in_parts else 1
    trained, whole = trained_bytes(method, mesh) // sharers, trained_bytes(method, Mesh())
    values = value_bytes(config, trained, shape.weight_bytes // sharers)
    states = num_optimizer_states(settings)
    keeps_best = isinstance(settings, TargetStageConfig) and evaluated
    passes, evaluation_flops = (
        evaluation(config, settings, mesh, copies, [cost.forward_flops for cost in costs], prompt.forward_flops)
        if isinstance(settings, TargetStageConfig) and evaluated
        else (0, 0)
    )
    longest = max(positions + sum(lengths(spec, config)) for spec in specs)
    settings = settings.model_copy(
        update={"pass_size": pass_size(config, settings, mesh, specs, shape, memory, positions, sharing * texts)}
    )
    work = work_of_a_rank(config, settings, own, texts, mesh.data.size, longest)
    # Each text may have a prompt of its own at most.
    num_read = min(mesh.world.size * work.prompts * num_prompts, copies * texts)
    of_prompts = num_read * (prompt.flops + method.extra_forwards * prompt.forward_flops)
    flops_of_texts = copies * texts * flops_of_a_text([c.flops + method.extra_forwards * c.forward_flops for c in costs], settings)
    looked_up = -(-work.rows // max(1, work.prompts_at_once)) * (longest - positions)
    sent = collectives(method, mesh, len(specs), copies, work.passes, looked_up, config, shape)
    prompts_at_once = min(work.prompts_at_once * num_prompts, work.rows_at_once)
    return StagePlan(
        name=name,
        steps=settings.steps,
        mesh=shape_of_mesh,
        num_particles=copies,
        particles_per_rank=own,
        texts=texts,
        rows=texts * copies,
        rows_per_rank=work.rows,
        rows_at_once=work.rows_at_once,
        passes_per_step=work.passes,
        exact_passes_per_step=own * -(-texts // mesh.data.size),
        flops=round(of_prompts + flops_of_texts),
        activation_bytes=prompts_at_once * prompt.activation_bytes
        + work.rows_at_once * max(cost.activation_bytes for cost in costs),
        trainable_parameters=method.num_trainable(),
        trained_bytes=values + trained * (1 + keeps_best),
        optimizer_bytes=trained * states,
        checkpoint_bytes=whole * (1 + states + keeps_best),
        checkpoints=math.ceil(settings.steps / settings.checkpoint_every),
        left_bytes=left_behind(method, settings, whole, carried) if evaluated else 0,
        evaluation_bytes=predicting_bytes(config, method, shape, specs, positions, copies, mesh) if keeps_best else 0,
        collectives=tuple(sent) if settings.steps else (),
        evaluation_passes=passes,
        evaluation_flops=evaluation_flops,
        **comparison_work(config, settings, method, mesh, [lengths(spec, config) for spec in specs], shape, positions),
        warning=idle_ranks_warning(name.partition("/")[0], texts, sharing, shape_of_mesh) if settings.steps else None,
    )


def pass_size(
    config: RunConfig,
    settings: StageConfig,
    mesh: Mesh,
    specs: Sequence[TaskSpec],
    shape: ModelShape,
    memory: int,
    num_prompt: int,
    most: int,
) -> int | None:
    """Return the `pass_size` of a stage: what is set, or what fits into the memory where the backbone is partitioned."""
    if settings.pass_size is not None or config.distribution.shard == "none":
        return settings.pass_size
    sources, targets = zip(*(lengths(spec, config) for spec in specs), strict=True)
    sharers = num_sharers(config, mesh.world.hosts, mesh.world.size)
    return sequences_that_fit(config, shape, memory, sharers, (num_prompt, max(sources), max(targets)), most)


def costs_of(
    config: RunConfig, method: Method, specs: Sequence[TaskSpec], shape: ModelShape, num_prompt: int, num_shared: int
) -> tuple[RowCost, list[RowCost]]:
    """Return what reading a prompt costs, once a pass, and what a text of each task costs; `num_shared` prompts are in a pass."""
    again, trained = config.distribution.activation_checkpointing, config.method.TRAINS_BACKBONE
    if num_shared and may_pack(config, method) and method.backbone.reads_prompts_once:
        pairs = [shape.shared_costs(num_prompt, *lengths(spec, config), recomputed=again) for spec in specs]
        return max((prompt for prompt, _ in pairs), key=lambda cost: cost.flops), [text for _, text in pairs]
    return NOTHING, [shape.row_cost(num_prompt, *lengths(spec, config), trains_weights=trained, recomputed=again) for spec in specs]


def value_bytes(config: RunConfig, trained: int, weights: int) -> int:
    """Return the bytes of trained values.

    A trained backbone holds them itself unless they are copied in float32, and beside it are the pretrained weights.
    """
    if not config.method.TRAINS_BACKBONE:
        return trained
    has_copies = config.backbone.dtype != "fp32" or config.distribution.shard == "deepspeed"
    return has_copies * trained + weights


def may_pack(config: RunConfig, method: Method) -> bool:
    """Return whether the run reads texts by the family's own pass."""
    return config.backbone.forward != "stock" and padding_reason(config, method.backbone) is None


def predicting_bytes(
    config: RunConfig, method: Method, shape: ModelShape, specs: Sequence[TaskSpec], num_prompt: int, copies: int, mesh: Mesh
) -> int:
    """Return the bytes of a pass that predicts: all hypotheses of a prediction read all texts of an evaluation batch at once."""
    at_once = 1 if config.distribution.exact else config.evaluation.batch_size
    hypotheses = num_hypotheses(config, copies)
    rows = config.data.max_eval_rows or ASSUMED_EVAL_ROWS
    texts = min(at_once, -(-rows // mesh.world.size))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    usual, given = default_attention(torch.device(kind), DTYPES[config.backbone.dtype]), config.backbone.attention
    attention = usual if given == "auto" else given
    longest, nodes = max(lengths(spec, config)[0] for spec in specs), max(num_nodes(spec, config) for spec in specs)
    chosen = attention if may_pack(config, method) else "eager"
    return texts * max(1, hypotheses) * shape.prediction_bytes(num_prompt, longest, nodes, chosen, kind)


def comparison_work(
    config: RunConfig,
    settings: StageConfig,
    method: Method,
    mesh: Mesh,
    sizes: Sequence[tuple[int, int]],
    shape: ModelShape,
    positions: int,
) -> dict[str, int]:
    """Return the passes of a rank and the FLOPs of all ranks in which the stage compares prompts and learns nothing.

    These are the loss at the mean, at every record of a source stage, and the choice of the particle that a target starts from.
    `sizes` are the longest source and target of each task; every prompt is read with every text.
    """
    flops = [shape.row_cost(positions, *each).forward_flops for each in sizes]
    longest, size = positions + max(map(sum, sizes)), mesh.world.size

    def passes(prompts: int, texts: int) -> int:
        return work_of_a_rank(config, settings, prompts, texts, size, longest).passes if texts else 0

    if isinstance(settings, SourceStageConfig):
        prompts = len(method.comparison(Mesh())) if settings.steps else 0
        if not prompts:
            return {}
        drawn = settings.tasks_per_step or len(sizes)
        texts, times = drawn * settings.batch_size, num_records(settings) * (1 if settings.shared_texts else method.num_particles)
        of_texts = times * prompts * texts * flops_of_a_text(flops, settings)
        return {"comparison_passes": times * passes(prompts, texts), "comparison_flops": round(of_texts)}
    candidates = method.candidate_starts()
    if candidates is None:
        return {}
    rows, at_once = min(MOST_ROWS, config.data.max_train_rows or MOST_ROWS), config.evaluation.batch_size * size
    full, rest = divmod(rows * len(sizes), at_once)
    num_passes = full * passes(len(candidates), at_once) + passes(len(candidates), rest)
    return {"comparison_passes": num_passes, "comparison_flops": len(candidates) * rows * sum(flops)}


def num_records(settings: StageConfig) -> int:
    """Return how many steps of a stage end with a record: the first, every `log_every`-th, and the last."""
    steps, every = settings.steps, settings.log_every
    return steps // every + (every > 1) + (steps % every > 0 and steps > 1) if steps else 0


def num_hypotheses(config: RunConfig, copies: int) -> int:
    """Return how many hypotheses predict beside the MAP prompt; `copies` counts the MAP prompt."""
    if config.evaluation.predict == "map":
        return 0
    if config.evaluation.predict == "best":
        return 1
    return config.evaluation.num_samples or copies - 1


def left_behind(method: Method, settings: StageConfig, trained: int, carried: Mapping[str, Tensor] | None) -> int:
    """Return the bytes of tensors that a finished stage leaves besides its checkpoints, of `trained` bytes of weights."""
    if isinstance(settings, SourceStageConfig):
        return sum(tensor.nbytes for tensor in method.end_source(Mesh()).values()) + _snapshot_bytes(method, settings)
    prompts = method.prompts()
    if prompts is not None:
        return sum(prompt.nbytes for prompt in prompts.values())
    pairs = method.low_rank_pairs()
    folders = 0 if pairs is None else sum(tensor.nbytes for pair in pairs.pairs.values() for tensor in pair)
    return folders + trained + sum(tensor.nbytes for tensor in (carried or {}).values())


def _snapshot_bytes(method: Method, settings: StageConfig) -> int:
    """Return the bytes of the files that show where many particles are, of which no more than MOST_FILES are kept."""
    num_particles = method.num_particles
    if num_particles <= MOST_INLINE:
        return 0
    files = min(MOST_FILES, 1 + math.ceil(settings.steps / settings.log_every))
    return files * num_particles * (PROJECTED + num_particles) * torch.float32.itemsize


class RankWork(NamedTuple):
    """What the rank with the most work does in a step: sequences in all, the most in one pass, passes.

    `prompts` are read in its passes, a particle's once a pass, `prompts_at_once` in one pass.
    """

    rows: int
    rows_at_once: int
    passes: int
    prompts: int
    prompts_at_once: int


def work_of_a_rank(
    config: RunConfig, settings: StageConfig, particles: int, texts: int, num_sharers: int, longest: int
) -> RankWork:
    """Return the work of a rank that owns `particles` and shares `texts` with other ranks, all texts `longest` tokens long."""
    of_rank = -(-texts // num_sharers)
    if config.distribution.exact:
        return RankWork(particles * of_rank, 1, particles * of_rank, particles * of_rank, 1)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    limits = MicroBatchLimits(size=settings.pass_size, together=config.distribution.shard != "none", tokens=tokens_a_pass(kind))
    own_texts = isinstance(settings, SourceStageConfig) and not settings.shared_texts
    if limits.together and not own_texts:
        assigned = assign([longest] * texts, particles, num_sharers, limits)
        sizes = [[(some.stop - some.start) * len(share) for some, share in of_each] for of_each in assigned]
        prompts = [[some.stop - some.start for some, _ in of_each] for of_each in assigned]
        return RankWork(
            max(map(sum, sizes)), max(max(each, default=0) for each in sizes), max(map(len, sizes)),
            max(map(sum, prompts)), max(max(each, default=0) for each in prompts),
        )  # fmt: skip
    together = 1 if own_texts else particles
    particles_at_once, texts_at_once = sequences_at_once(together, of_rank, longest, limits)
    parts = -(-of_rank // texts_at_once)
    passes = -(-particles // particles_at_once) * parts
    return RankWork(particles * of_rank, particles_at_once * texts_at_once, passes, particles * parts, particles_at_once)


def lengths(spec: TaskSpec, config: RunConfig) -> tuple[int, int]:
    """Return the longest source and target of a task in tokens, end token included; label words count by their characters."""
    source = config.data.max_source_length or spec.max_source_length
    words = spec.words(config.data.protocol)
    return source, max((-(-len(word) // CHARACTERS_A_TOKEN) + 1 for word in words), default=spec.max_target_length)


def num_nodes(spec: TaskSpec, config: RunConfig) -> int:
    """Return how many tokens of the candidates of a task are scored at once; one where text is generated."""
    words = spec.words(config.data.protocol)
    return 1 + sum(-(-len(word) // CHARACTERS_A_TOKEN) for word in words)


def flops_of_a_text(flops: Sequence[int], settings: StageConfig) -> float:
    """Return the FLOPs of a text: the mean over the tasks, or of a mixture, whose shares only the data know, the most."""
    return sum(flops) / len(flops) if settings.sampling == "all" else max(flops)


def num_optimizer_states(stage: StageConfig) -> int:
    """Return how many numbers the optimizer of a stage keeps for each trained one."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    optimizer = OPTIMIZERS[stage.optimizer]([{"params": [weight], "lr": 1.0}], stage)
    optimizer.step()
    return sum(value.shape == weight.shape for value in optimizer.state[weight].values())


def evaluation(
    config: RunConfig, settings: TargetStageConfig, mesh: Mesh, copies: int, forward_flops: Sequence[int], prompt_flops: int
) -> tuple[int, int]:
    """Return the passes of a rank, and the FLOPs of all ranks, in the validations and final evaluations of a target stage."""
    every, rows = settings.eval_every or settings.steps, config.data.max_eval_rows or ASSUMED_EVAL_ROWS
    validations = math.ceil(settings.steps / every) if settings.steps else 0
    beside, hypotheses = config.evaluation.predict != "map", num_hypotheses(config, copies)
    num_splits = len(config.evaluation.splits)
    validations += copies - 1 if config.evaluation.predict == "best" else 0  # the choice among the particles
    at_once = 1 if config.distribution.exact else config.evaluation.batch_size
    of_split = -(-rows // (mesh.world.size * at_once))
    passes, readings = of_split * (validations + num_splits * (1 + beside)), validations + num_splits * (1 + hypotheses)
    of_prompts = mesh.world.size * of_split * readings * prompt_flops * len(forward_flops)
    return passes * len(forward_flops), rows * readings * sum(forward_flops) + of_prompts
