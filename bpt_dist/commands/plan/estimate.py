"""Before anything is started: what a run computes, sends, stores and takes; what cannot fit is refused.

Shapes and FLOPs come from torch's meta device and the method's own tensors, the rate from a matrix product timed for a second.
Every text counts at its longest length, so times are upper estimates for data that are shorter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.artifacts.hub import with_local_prompt
from bpt_dist.backbones.loading import shape_of
from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.commands.output import size
from bpt_dist.commands.plan.device import Device, check_name, named_device, probe, processes_here
from bpt_dist.commands.plan.stages import PlannedWorld, StagePlan, stage_plan
from bpt_dist.config import RunConfig, StageConfig
from bpt_dist.data.prepare import specs as known_specs
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods import base as methods
from bpt_dist.methods._counts import skip_preludes
from bpt_dist.methods.base import Method
from bpt_dist.tasks import catalogue, mini
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.training.sharding.passes import RUNTIME_BYTES, num_sharers

ASSUMED_TRAIN_ROWS = 10_000  # only scales the prior; no size depends on it
KEPT_CHECKPOINTS = 2  # of every stage; a third is there while it is published


@dataclass(frozen=True)
class Plan:
    """One run before it is started; bytes and FLOP/s are those of one process."""

    name: str
    method: str
    backbone: str
    family: str  # what its model is called: T5, or the backbone
    dtype: str
    shard: str
    world_size: int
    ranks_here: int
    num_parameters: int
    weight_bytes: int
    sharers: int  # processes that hold one backbone between them
    resident_weight_bytes: int
    gathered_weight_bytes: int
    num_blocks: int
    stages: tuple[StagePlan, ...]
    device: Device
    disk_bytes: int  # of tensors, the most at once
    kept_bytes: int  # of tensors, when the run has ended

    @property
    def memory_bytes(self) -> int:
        """Return the most memory a process needs at once: while it loads the whole backbone, or in its largest stage."""
        largest = max(map(stage_memory, self.stages), default=0)
        return RUNTIME_BYTES + max(self.weight_bytes, self.resident_weight_bytes + self.gathered_weight_bytes + largest)

    def step_seconds(self, stage: StagePlan) -> float:
        """Return the time of one step of a stage."""
        # Forward and backward each read the weights once.
        return self.device.seconds(stage.flops / self.world_size, stage.passes_per_step, self.num_blocks, 2 * self.weight_bytes)

    def exact_step_seconds(self, stage: StagePlan) -> float:
        """Return the time of one step of a stage with `distribution.exact`: the same FLOPs in many small passes."""
        passes, whole = stage.exact_passes_per_step, 2 * self.weight_bytes
        return self.device.seconds(stage.flops / self.world_size, passes, self.num_blocks, whole)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what the user should know of the device and of the stages, each text once."""
        found = (self.device.warning, *(stage.warning for stage in self.stages))
        return tuple(dict.fromkeys(warning for warning in found if warning is not None))

    def stage_seconds(self, stage: StagePlan) -> float:
        """Return the time of a stage, its evaluations included, and what it compares beside its steps."""
        # A forward pass alone is about 0.4 of the host's work for forward and backward.
        flops = stage.evaluation_flops + stage.comparison_flops
        passes = 0.4 * (stage.evaluation_passes + stage.comparison_passes)
        return stage.steps * self.step_seconds(stage) + self.device.seconds(flops / self.world_size, passes, self.num_blocks)

    @property
    def seconds(self) -> float:
        """Return the time of the whole run, without the start-up."""
        return sum(self.stage_seconds(stage) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers by name."""
        stages = [
            {**vars(stage), "collectives": [vars(collective) for collective in stage.collectives],
             "step_seconds": self.step_seconds(stage), "exact_step_seconds": self.exact_step_seconds(stage),
             "seconds": self.stage_seconds(stage)}
            for stage in self.stages
        ]  # fmt: skip
        device = {**vars(self.device), "utilisation": self.device.utilisation}
        return {**vars(self), "stages": stages, "device": device, "memory_bytes": self.memory_bytes, "seconds": self.seconds}


def stage_memory(stage: StagePlan) -> int:
    """Return the bytes a process needs for a stage beside the backbone: passes of training and those that predict alternate."""
    return stage.trained_bytes + stage.optimizer_bytes + max(stage.activation_bytes, stage.evaluation_bytes)


def disk_of(stages: Sequence[StagePlan]) -> tuple[int, int]:
    """Return the most bytes that stages one after the other have on disk at once, and those they leave."""
    most = kept = 0
    for stage in stages:
        # The newest is whole and read back before an older one is deleted.
        most = max(most, kept + min(stage.checkpoints, KEPT_CHECKPOINTS + 1) * stage.checkpoint_bytes)
        kept += min(stage.checkpoints, KEPT_CHECKPOINTS) * stage.checkpoint_bytes + stage.left_bytes
    return max(most, kept), kept


def plans(
    config: RunConfig, world_size: int, ranks_here: int | None = None, device: str | None = None
) -> list[tuple[Plan, list[RunConfig]]]:
    """Return the plan of each run with the runs it holds for: those that differ in nothing but their seed and name."""
    check_name(device)
    groups: dict[str, list[RunConfig]] = {}
    for run in configuration.expand(config):
        groups.setdefault(configuration.fingerprint(run.model_copy(update={"seed": 0}), with_paths=True), []).append(run)
    planned = [(estimate(runs[0], world_size, ranks_here, device), runs) for runs in groups.values()]
    kept, beside = (
        sum(plan.kept_bytes * len(runs) for plan, runs in planned),
        [plan.disk_bytes - plan.kept_bytes for plan, _ in planned],
    )
    if device is None:  # the disk of another machine is not this one's
        refuse_full_disk(config.directory, kept + max(beside, default=0))
    return planned


def estimate(config: RunConfig, world_size: int, ranks_here: int | None = None, device: str | None = None) -> Plan:
    """Return the plan of one run; `ranks_here` of its processes share a machine (by default what the launcher says).

    `device` is a name of the table, `cpu` for the processor of this machine, or None for what this machine has.
    Raises ConfigError when its mesh or its memory does not fit.
    """
    expected = config.distribution.expect_world_size
    if expected not in (None, world_size):
        raise ConfigError(
            f"distribution.expect_world_size is {expected}, the plan is for {world_size} process(es); give the same number"
        )
    settings = config.backbone
    path = mini.backbone_path(settings.path)
    shape = shape_of(path, revision=settings.revision, dtype=settings.dtype)
    here = ranks_here or processes_here(world_size, device)
    hosts = tuple(str(rank // here) for rank in range(world_size))
    sizes = (*shape.feed_forward, settings.dtype, here)
    used = probe(*sizes) if device is None else named_device(device, *sizes)
    stages = _stages(config, PlannedWorld(0, world_size, hosts=hosts), shape, used.memory)
    disk = disk_of(stages)
    sharers = num_sharers(config, hosts, world_size)
    plan = Plan(
        name=config.name,
        method=config.method.name,
        backbone=settings.path,
        family=shape.noun,
        dtype=settings.dtype,
        shard=config.distribution.shard,
        world_size=world_size,
        ranks_here=here,
        num_parameters=shape.num_parameters,
        weight_bytes=shape.weight_bytes,
        sharers=sharers,
        resident_weight_bytes=-(-shape.weight_bytes // sharers),
        gathered_weight_bytes=shape.gathered_bytes if sharers > 1 else 0,
        num_blocks=sum(shape.num_blocks),
        stages=tuple(stages),
        device=used,
        disk_bytes=disk[0],
        kept_bytes=disk[1],
    )
    _refuse_small_memory(plan)
    return plan


def _stages(config: RunConfig, world: PlannedWorld, shape: ModelShape, memory: int) -> list[StagePlan]:
    """Let the method create the tensors of each stage in turn, as training does, and count them."""
    backbone = shape.backbone()
    backbone.name = config.backbone.path
    method = methods.load(with_local_prompt(config), backbone)
    specs_of_data = known_specs(config.data)
    sources = [catalogue.get(name, specs_of_data) for name in config.data.source_tasks]
    targets = [catalogue.get(name, specs_of_data) for name in config.data.target_tasks]
    mesh_shape = config.distribution.mesh
    explicit = None if isinstance(mesh_shape, str) else (mesh_shape.particle, mesh_shape.data)
    stages: list[StagePlan] = []
    carried = None
    if config.method.HAS_SOURCE_STAGE:
        method.begin_source(sources, Mesh())
        if config.source.posterior is None:
            mesh = world.mesh(method.num_particles, explicit, config.distribution.exchange)
            count = partial(stage_plan, config=config, method=method, mesh=mesh, specs=sources, shape=shape, memory=memory)
            stages += _with_preludes("source", config.source, method, count)
        else:
            skip_preludes(method)
        carried = method.end_source(Mesh())
    for group in [targets] if config.target.joint else [[target] for target in targets]:
        method.begin_target(carried, group, [config.data.max_train_rows or ASSUMED_TRAIN_ROWS] * len(group), Mesh())
        mesh = world.mesh(1, (1, world.size))
        count = partial(
            stage_plan, config=config, method=method, mesh=mesh, specs=group, shape=shape, memory=memory, carried=carried
        )
        stages += _with_preludes(_target_name(config, group), config.target, method, count)
    return stages


def _with_preludes(name: str, settings: StageConfig, method: Method, count: Callable[..., StagePlan]) -> list[StagePlan]:
    """Return the auxiliary stages that the method wants, then the stage just begun; `count` is `stage_plan` of it."""
    stages = []
    for phase in method.auxiliary_phases():
        stages.append(count(f"{name}/{phase.name}", settings=phase.settings(settings), evaluated=False))
        method.end_auxiliary_phase(Mesh())
    return [*stages, count(name, settings=settings)]


def _target_name(config: RunConfig, group: Sequence[TaskSpec]) -> str:
    return "target/joint" if config.target.joint else f"target/{group[0].name}"


def _refuse_small_memory(plan: Plan) -> None:
    if plan.memory_bytes <= plan.device.memory:
        return
    largest, where = max(plan.stages, key=stage_memory), "this" if plan.device.source is None else "a"
    raise ConfigError(
        f"{plan.name}: a process needs {size(plan.memory_bytes)} and has {size(plan.device.memory)} "
        f"({plan.device.name}, {plan.ranks_here} on {where} machine): {plan.family} {size(plan.resident_weight_bytes)}, "
        f"activations of {largest.rows_at_once} rows in {largest.name} {size(largest.activation_bytes)}, evaluation "
        f"{size(largest.evaluation_bytes)}, "
        f"trained tensors and optimizer {size(largest.trained_bytes + largest.optimizer_bytes)}; lower batch_size or "
        "data.max_source_length, set backbone.dtype=bf16 or distribution.shard=deepspeed, or start on more machines"
    )


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise ConfigError when the checkpoints of a job cannot fit beside one another."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"output: {place} has {size(free)} free, the checkpoints take {size(needed)}; free some space or choose another output"
        )
