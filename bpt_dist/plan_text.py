"""Lay out a plan as text: units a person reads, columns that line up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpt_dist.plan import Plan
    from bpt_dist.plan_stages import StagePlan

STEP = 1024
MINUTE, HOUR, DAY = 60, 3600, 86400
HEADER = ("stage", "steps", "mesh", "particles", "rows", "at once", "GFLOP a step", "trained", "activations", "checkpoint",
          "eval passes", "step", "time")  # fmt: skip


def run_text(plan: Plan, names: Sequence[str]) -> str:
    """Return the plan of runs that differ in their seed only."""
    device, several = plan.device, f" (and {len(names) - 1} more with other seeds)" if len(names) > 1 else ""
    resident = (
        f", {size(plan.resident_weight_bytes)} of it resident on a rank ({plan.shard} over {plan.sharers}) and "
        f"{size(plan.gathered_weight_bytes)} gathered at a time"
        if plan.shard != "none"
        else ""
    )
    lines = [
        f"{names[0]}{several}: {plan.method} on {plan.backbone}, {plan.dtype}",
        f"  world        {plan.world_size} process(es), {plan.ranks_here} of them on this machine",
        f"  T5           {plan.num_parameters:,} parameters, {size(plan.weight_bytes)}{resident}",
        "",
        *("  " + line for line in _columns([HEADER, *(_stage_texts(plan, stage) for stage in plan.stages)])),
        "",
        *_collective_lines(plan),
        f"  memory       {size(plan.memory_bytes)} a process at most, of {size(device.memory)}",
        f"  disk         {size(plan.disk_bytes)} of checkpoints",
        f"  device       {device.name}: {device.rate / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{device.utilisation:.0%} of it assumed",
        f"  time         {duration(plan.seconds)} a run, every text at its longest; data that are shorter take less",
    ]
    return "\n".join(lines) + "\n"


def total_text(plans: Sequence[Plan]) -> str:
    """Return the closing line of a job of several runs."""
    if len(plans) == 1:
        return ""
    return f"\n{len(plans)} runs one after another: {duration(sum(plan.seconds for plan in plans))}\n"


def size(num_bytes: float) -> str:
    """Return bytes in the largest binary unit below them, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < STEP:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= STEP
    return f"{num_bytes:,.3g} TiB"


def duration(seconds: float) -> str:
    """Return a time in the unit a person would choose."""
    for unit, length in (("days", DAY), ("h", HOUR), ("min", MINUTE), ("s", 1)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _stage_texts(plan: Plan, stage: StagePlan) -> tuple[str, ...]:
    particles = f"{stage.num_particles} ({stage.particles_per_rank} a rank)"
    return (
        stage.name, f"{stage.steps:,}", f"{stage.mesh[0]} x {stage.mesh[1]}", particles,
        f"{stage.rows:,} ({stage.rows_per_rank:,} a rank)", f"{stage.rows_at_once:,}", f"{stage.flops / 1e9:,.1f}",
        f"{stage.trainable_parameters:,}", size(stage.activation_bytes), size(stage.checkpoint_bytes),
        f"{stage.evaluation_passes:,}", duration(plan.step_seconds(stage)), duration(plan.stage_seconds(stage)),
    )  # fmt: skip


def _collective_lines(plan: Plan) -> list[str]:
    found: dict[str, str] = {}
    for stage in plan.stages:
        for each in stage.collectives:
            text = f"{each.calls} x {each.name}, {size(each.bytes)} a step"
            found[text] = stage.name if text not in found else f"{found[text]}, {stage.name.partition('/')[2]}"
    lines = [f"{text} ({names})" for text, names in found.items()] or ["none: one process"]
    return [f"  {'collectives' if number == 0 else '':12} {line}" for number, line in enumerate(lines)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
