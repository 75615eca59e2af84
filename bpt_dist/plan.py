"""Before anything is started: what a run computes, sends, stores and takes; what cannot fit is refused.

Shapes and FLOPs come from torch's meta device and the method's own tensors, the rate from a matrix product timed for a second.
Every text counts at its longest length, so times are upper estimates for data that are shorter.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpt_dist import config as configuration
from bpt_dist import mini
from bpt_dist.backbone_shapes import ShapeBackbone, T5Shape, shape_of
from bpt_dist.config import Config, Stage
from bpt_dist.data import tasks
from bpt_dist.data.prepared import specs as known_specs
from bpt_dist.data.tasks import TaskSpec
from bpt_dist.errors import ConfigError
from bpt_dist.mesh import Mesh
from bpt_dist.methods import base as methods
from bpt_dist.methods.base import Method
from bpt_dist.plan_device import RUNTIME_BYTES, Device, probe, processes_here
from bpt_dist.plan_methods import skip_preludes
from bpt_dist.plan_stages import PlannedWorld, StagePlan, stage_plan
from bpt_dist.plan_text import run_text, size, total_text

ASSUMED_TRAIN_ROWS = 10_000  # only scales the prior; no size depends on it
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Plan:
    """One run before it is started; bytes and FLOP/s are those of one process."""

    name: str
    method: str
    backbone: str
    dtype: str
    shard: str
    world_size: int
    ranks_here: int
    num_parameters: int
    weight_bytes: int
    sharers: int  # processes that hold one T5 between them
    resident_weight_bytes: int
    gathered_weight_bytes: int
    num_blocks: int
    stages: tuple[StagePlan, ...]
    device: Device
    disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Return the most memory a process needs at once: while it loads the whole T5, or in its largest stage."""
        largest = max((s.trained_bytes + s.optimizer_bytes + s.activation_bytes for s in self.stages), default=0)
        return RUNTIME_BYTES + max(self.weight_bytes, self.resident_weight_bytes + self.gathered_weight_bytes + largest)

    def step_seconds(self, stage: StagePlan) -> float:
        """Return the time of one step of a stage."""
        return self.device.seconds(stage.flops / self.world_size, stage.passes_per_step, self.num_blocks)

    def stage_seconds(self, stage: StagePlan) -> float:
        """Return the time of a stage, its evaluations included."""
        # A forward pass alone is about 0.4 of the host's work for forward and backward.
        evaluation = self.device.seconds(stage.evaluation_flops / self.world_size, 0.4 * stage.evaluation_passes, self.num_blocks)
        return stage.steps * self.step_seconds(stage) + evaluation

    @property
    def seconds(self) -> float:
        """Return the time of the whole run, starting up not included."""
        return sum(self.stage_seconds(stage) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers by name."""
        stages = [
            {**vars(stage), "collectives": [vars(each) for each in stage.collectives],
             "step_seconds": self.step_seconds(stage), "seconds": self.stage_seconds(stage)}
            for stage in self.stages
        ]  # fmt: skip
        device = {**vars(self.device), "utilisation": self.device.utilisation}
        return {**vars(self), "stages": stages, "device": device, "memory_bytes": self.memory_bytes, "seconds": self.seconds}


def plan(config: Config, world_size: int) -> str:
    """Return the plan of every run of a configuration as text.

    Raises ConfigError when a run cannot be arranged on `world_size` processes or does not fit this machine.
    """
    return plans_text(plans(config, world_size))


def plans_text(groups: Sequence[tuple[Plan, list[Config]]]) -> str:
    """Return what `plans` found as text."""
    texts = [run_text(found, [run.name for run in runs]) for found, runs in groups]
    return "\n".join(texts) + total_text([found for found, runs in groups for _ in runs])


def plans(config: Config, world_size: int, ranks_here: int | None = None) -> list[tuple[Plan, list[Config]]]:
    """Return the plan of each run with the runs it holds for: those that differ in nothing but their seed and name."""
    groups: dict[str, list[Config]] = {}
    for run in configuration.expand(config):
        groups.setdefault(configuration.fingerprint(run.model_copy(update={"seed": 0})), []).append(run)
    found = [(estimate(runs[0], world_size, ranks_here), runs) for runs in groups.values()]
    refuse_full_disk(config.directory, sum(one.disk_bytes * len(runs) for one, runs in found))
    return found


def estimate(config: Config, world_size: int, ranks_here: int | None = None) -> Plan:
    """Return the plan of one run; `ranks_here` of its processes share this machine (by default what the launcher says).

    Raises ConfigError when its mesh, its batches or its memory do not fit.
    """
    expected = config.distribution.expect_world_size
    if expected not in (None, world_size):
        raise ConfigError(
            f"distribution.expect_world_size is {expected}, the plan is for {world_size} process(es); give the same number"
        )
    settings = config.backbone
    path = str(mini.BACKBONE) if settings.path == "mini" else settings.path
    shape = shape_of(path, revision=settings.revision, dtype=settings.dtype)
    here = ranks_here or processes_here(world_size)
    stages = _stages(config, PlannedWorld(0, world_size), shape)
    sharers = {"none": 1}.get(config.distribution.shard, here if config.distribution.scope == "node" else world_size)
    found = Plan(
        name=config.name,
        method=config.method.name,
        backbone=settings.path,
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
        device=probe(shape.config.d_model, shape.config.d_ff, settings.dtype, here),
        disk_bytes=KEPT_CHECKPOINTS * sum(stage.checkpoint_bytes for stage in stages),
    )
    _refuse_small_memory(found)
    return found


def _stages(config: Config, world: PlannedWorld, shape: T5Shape) -> list[StagePlan]:
    """Let the method create the tensors of each stage in turn, as training does, and count them."""
    method = methods.load(config, ShapeBackbone(shape))
    known = known_specs(config.data)
    sources = [tasks.get(name, known) for name in config.data.source_tasks]
    targets = [tasks.get(name, known) for name in config.data.target_tasks]
    mesh_shape = config.distribution.mesh
    explicit = None if isinstance(mesh_shape, str) else (mesh_shape.particle, mesh_shape.data)
    found: list[StagePlan] = []
    carried = None
    if config.method.HAS_SOURCE_STAGE:
        method.begin_source(sources, Mesh())
        if config.source.posterior is None:
            mesh = world.mesh(method.num_particles, explicit, config.distribution.exchange)
            found += _with_preludes("source", config, config.source, method, mesh, sources, shape)
        else:
            skip_preludes(method)
        carried = method.end_source(Mesh())
    for group in [targets] if config.target.joint else [[target] for target in targets]:
        method.begin_target(carried, group, [config.data.max_train_rows or ASSUMED_TRAIN_ROWS] * len(group), Mesh())
        mesh = world.mesh(1, (1, world.size))
        found += _with_preludes(_target_name(config, group), config, config.target, method, mesh, group, shape)
    return found


def _with_preludes(
    name: str, config: Config, settings: Stage, method: Method, mesh: Mesh, specs: Sequence[TaskSpec], shape: T5Shape
) -> list[StagePlan]:
    """Return the stage just begun after the preludes its method wants."""
    found = []
    for prelude in method.preludes():
        shorter = prelude.settings(settings)
        found.append(stage_plan(f"{name}/{prelude.name}", config, shorter, method, mesh, specs, shape, evaluated=False))
        method.end_prelude(Mesh())
    return [*found, stage_plan(name, config, settings, method, mesh, specs, shape)]


def _target_name(config: Config, group: Sequence[TaskSpec]) -> str:
    return "target/joint" if config.target.joint else f"target/{group[0].name}"


def _refuse_small_memory(found: Plan) -> None:
    if found.memory_bytes <= found.device.memory:
        return
    largest = max(found.stages, key=lambda stage: stage.activation_bytes + stage.trained_bytes + stage.optimizer_bytes)
    raise ConfigError(
        f"{found.name}: a process needs {size(found.memory_bytes)} and has {size(found.device.memory)} "
        f"({found.device.name}, {found.ranks_here} on this machine): T5 {size(found.resident_weight_bytes)}, "
        f"activations of {largest.rows_at_once} rows in {largest.name} {size(largest.activation_bytes)}, "
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
