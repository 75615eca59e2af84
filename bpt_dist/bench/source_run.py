"""Run the comparison of the source step: memory in fresh processes, correctness, then rounds of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bpt_dist.backbone_shapes import T5Shape
from bpt_dist.bench.correct import Difference, compare
from bpt_dist.bench.fresh import in_fresh_process
from bpt_dist.bench.machine import available_bytes, has_bf16, matmul
from bpt_dist.bench.paired import Clock, Timing, alternate
from bpt_dist.bench.peft_loop import import_peft
from bpt_dist.bench.source import Models, Variant, best_attention, bytes_needed, exact, variants
from bpt_dist.bench.work import Work
from bpt_dist.svgd import stein_rows

Tell = Callable[[str], None]
KERNEL, PEAK = "kernel", "matmul_"  # timed beside the variants


class Options(NamedTuple):
    """How much is run; `repeats` rounds, and none begins after `limit_seconds`."""

    repeats: int = 5
    limit_seconds: float | None = None
    pass_size: int | None = None
    memory: tuple[str, ...] = ("peft_fp32", "padded_fp32", "grouped_fp32", "ours_fp32", "peft_bf16", "ours_bf16")
    seed: int = 0


@dataclass
class Found:
    """What was measured of each variant, under its name; `notes` are what was left out and why."""

    variants: list[Variant]
    differences: dict[str, Difference] = field(default_factory=dict)
    times: dict[str, list[Timing]] = field(default_factory=dict)
    matmul_flops: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Return the variants that computed something else."""
        return [name for name, difference in self.differences.items() if not difference.right]


def run_source(shape: T5Shape, work: Work, clock: Clock, options: Options, tell: Tell) -> Found:
    """Compare the variants of the source step; nothing is timed that computed something else."""
    import_peft()
    notes: list[str] = []
    dtypes = ["fp32", "bf16"]
    if not has_bf16(clock.device):
        dtypes, notes = ["fp32"], ["no bf16: this device has no instructions for it, so those rows are left out"]
    leave_out = _too_large(shape, work, clock.device, notes)
    memory = {} if clock.device.type == "cuda" else _memory(shape, work, clock, options, dtypes, leave_out, notes, tell)
    clock.use_threads()
    models = Models(shape, clock.device, work.prompts.shape[1], options.seed)
    attention = {"fp32": "sdpa"}
    if "bf16" in dtypes:
        tell("which attention is PEFT's best in bf16")
        attention["bf16"] = best_attention(models, work, "bf16", clock)
    chosen = [each for each in variants(models, work, attention, options.pass_size) if each.name not in leave_out]
    found = Found(chosen, memory=memory, notes=notes)
    _check(found, models, work, clock, tell)
    _time(found, work, clock, options, dtypes, tell)
    return found


def _too_large(shape: T5Shape, work: Work, device: torch.device, notes: list[str]) -> set[str]:
    needed, free = bytes_needed(shape, work), available_bytes(device)
    if needed < 0.8 * free:
        return set()
    notes.append(f"one padded batch: needs {needed / 1e9:.0f} GB for its backward pass, {free / 1e9:.0f} GB are free; left out")
    return {"padded_fp32"}


def _memory(
    shape: T5Shape, work: Work, clock: Clock, options: Options, dtypes: list[str], leave_out: set[str], notes: list[str], tell: Tell
) -> dict[str, int]:
    """Return the greatest resident size of a fresh process for each variant; torch has computed nothing in this one yet."""
    found = {}
    for name in options.memory:
        dtype = name.rpartition("_")[2]
        if dtype not in dtypes or name in leave_out:
            continue
        tell(f"memory of {name}, in a process of its own")

        def once(name: str = name, dtype: str = dtype) -> None:
            models = Models(shape, clock.device, work.prompts.shape[1], options.seed)
            kind = "sdpa" if dtype == "fp32" else "eager"
            chosen = [each for each in variants(models, work, {dtype: kind}, options.pass_size) if each.name == name]
            chosen[0].run()

        answer = in_fresh_process(once, clock.num_threads)
        if answer is None:
            notes.append(f"{name}: its process was ended, probably for its memory; left out")
            leave_out.add(name)
        else:
            found[name] = answer[1]
    return found


def _check(found: Found, models: Models, work: Work, clock: Clock, tell: Tell) -> None:
    """Run every variant once (its warm-up), compare, and on a GPU note its memory."""
    tell("float64 reference")
    reference = exact(models, work)
    results = {}
    for each in found.variants:
        tell(f"warm-up and check: {each.name}")
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = each.run()
        if clock.device.type == "cuda":
            # What lies there of other variants is not this one's; its own weights are.
            weights = models.shape.num_parameters * (4 if each.dtype == "fp32" else 2)
            found.memory[each.name] = torch.cuda.max_memory_allocated() - before + weights
        if each.stock is not None:
            results[each.name] = result
    found.differences = compare(results, reference, {each.name: each.stock for each in found.variants if each.stock})


def _time(found: Found, work: Work, clock: Clock, options: Options, dtypes: list[str], tell: Tell) -> None:
    runs: dict[str, Callable[[], Any]] = {each.name: each.run for each in found.variants if each.name not in found.wrong}
    runs[KERNEL] = lambda: stein_rows(work.prompts, work.prompts, slice(None))
    for dtype in dtypes:
        runs[PEAK + dtype], found.matmul_flops[dtype] = matmul(clock.device, dtype)
    found.times = alternate(runs, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell)
