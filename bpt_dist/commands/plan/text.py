"""Lay out a plan as text: units a person reads, columns that line up."""

from __future__ import annotations

from collections.abc import Sequence

from bpt_dist.commands.output import duration, size
from bpt_dist.commands.plan.estimate import Plan, plans
from bpt_dist.commands.plan.stages import StagePlan
from bpt_dist.config import RunConfig

HEADER = ("stage", "steps", "mesh", "particles", "rows", "at once", "GFLOP a step", "trained", "activations", "checkpoint",
          "eval passes", "step", "time")  # fmt: skip


def run_text(plan: Plan, names: Sequence[str]) -> str:
    """Return the plan of runs that differ in their seed only."""
    device, where = plan.device, "this" if plan.device.source is None else "a"
    several = f" (and {len(names) - 1} more with other seeds)" if len(names) > 1 else ""
    resident = (
        f", {size(plan.resident_weight_bytes)} of it resident on a rank ({plan.shard} over {plan.sharers}) and "
        f"{size(plan.gathered_weight_bytes)} gathered at a time"
        if plan.shard != "none"
        else ""
    )
    lines = [
        f"{names[0]}{several}: {plan.method} on {plan.backbone}, {plan.dtype}",
        f"  world        {plan.world_size} process(es), {plan.ranks_here} of them on {where} machine",
        f"  {plan.family:12} {plan.num_parameters:,} parameters, {size(plan.weight_bytes)}{resident}",
        "",
        *("  " + line for line in _columns([HEADER, *(_stage_texts(plan, stage) for stage in plan.stages)])),
        "",
        *_collective_lines(plan),
        *_exact_lines(plan),
        f"  memory       {size(plan.memory_bytes)} a process at most, of {size(device.memory)}",
        f"  disk         {size(plan.disk_bytes)} of checkpoints and what stages leave",
        f"  device       {device.name}: {device.rate / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{device.utilisation:.0%} of it assumed{'' if device.source is None else f'; {device.source}'}",
        f"  time         {duration(plan.seconds)} a run, every text at its longest; data that are shorter take less",
        *(f"  warning      {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines) + "\n"


def total_text(plans: Sequence[Plan]) -> str:
    """Return the closing line of a job of several runs."""
    if len(plans) == 1:
        return ""
    return f"\n{len(plans)} runs one after another: {duration(sum(plan.seconds for plan in plans))}\n"


def _stage_texts(plan: Plan, stage: StagePlan) -> tuple[str, ...]:
    particles = f"{stage.num_particles} ({stage.particles_per_rank} a rank)"
    return (
        stage.name, f"{stage.steps:,}", f"{stage.mesh[0]} x {stage.mesh[1]}", particles,
        f"{stage.rows:,} ({stage.rows_per_rank:,} a rank)", f"{stage.rows_at_once:,}", f"{stage.flops / 1e9:,.1f}",
        f"{stage.trainable_parameters:,}", size(stage.activation_bytes), size(stage.checkpoint_bytes),
        f"{stage.evaluation_passes:,}", duration(plan.step_seconds(stage)), duration(plan.stage_seconds(stage)),
    )  # fmt: skip


def _collective_lines(plan: Plan) -> list[str]:
    stages_of: dict[str, str] = {}
    for stage in plan.stages:
        for collective in stage.collectives:
            text = f"{collective.calls} x {collective.name}, {size(collective.bytes)} a step"
            stages_of[text] = stage.name if text not in stages_of else f"{stages_of[text]}, {stage.name.partition('/')[2]}"
    lines = [f"{text} ({names})" for text, names in stages_of.items()] or ["none: one process"]
    return [f"  {'collectives' if number == 0 else '':12} {line}" for number, line in enumerate(lines)]


def _exact_lines(plan: Plan) -> list[str]:
    """Return what `distribution.exact` costs in the slowest source and target stage, whether it is on or not."""
    slowest: dict[str, StagePlan] = {}
    for stage in plan.stages:
        section = stage.name.partition("/")[0]
        if stage.steps and (section not in slowest or plan.exact_step_seconds(stage) > plan.exact_step_seconds(slowest[section])):
            slowest[section] = stage
    texts = [
        f"{stage.name}: {stage.exact_passes_per_step:,} passes of one particle and one text a rank and step "
        f"({stage.passes_per_step:,} here), {duration(plan.exact_step_seconds(stage))} a step "
        f"({duration(plan.step_seconds(stage))} here)"
        for stage in slowest.values()
    ]
    return [f"  {'exact' if number == 0 else '':12} {text}" for number, text in enumerate(texts)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def plan(config: RunConfig, world_size: int) -> str:
    """Return the plan of every run of a configuration as text.

    Raises ConfigError when a run cannot be arranged on `world_size` processes or does not fit this machine.
    """
    return plans_text(plans(config, world_size))


def plans_text(groups: Sequence[tuple[Plan, list[RunConfig]]]) -> str:
    """Return plans, each with the runs it holds for, as text."""
    texts = [run_text(planned, [run.name for run in runs]) for planned, runs in groups]
    return "\n".join(texts) + total_text([planned for planned, runs in groups for _ in runs])
