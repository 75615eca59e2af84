"""Run the comparison of the source step: memory in fresh processes, correctness, then rounds of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.baselines import import_peft
from bpt_dist.commands.bench.correctness import Difference, compare
from bpt_dist.commands.bench.machine import available_bytes, has_bf16, matmul
from bpt_dist.commands.bench.processes import in_fresh_process
from bpt_dist.commands.bench.source import Models, Variant, best_attention, bytes_needed, exact, variants
from bpt_dist.commands.bench.timing import Clock, Timing, alternate
from bpt_dist.commands.bench.workload import Work, stein_phi

Tell = Callable[[str], None]
KERNEL, PEAK = "kernel", "matmul_"  # timed beside the variants


class Options(NamedTuple):
    """How much is run: `repeats` rounds, none of them begun after `limit_seconds`; `memory` names the variants to measure."""

    repeats: int = 5
    limit_seconds: float | None = None
    pass_size: int | None = None
    memory: tuple[str, ...] = ("peft_fp32", "padded_fp32", "grouped_fp32", "ours_fp32", "peft_bf16", "ours_bf16")
    seed: int = 0


@dataclass
class Measurements:
    """What was measured of each variant, by its name; `notes` tell what was left out and why."""

    variants: list[Variant]
    differences: dict[str, Difference] = field(default_factory=dict)
    times: dict[str, list[Timing]] = field(default_factory=dict)
    matmul_flops: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Return the names of variants with a wrong result."""
        return [name for name, difference in self.differences.items() if not difference.right]


def run_source(shape: T5Shape, work: Work, clock: Clock, options: Options, tell: Tell) -> Measurements:
    """Compare the variants of the source step; a variant with a wrong result is not timed."""
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
    chosen = [variant for variant in variants(models, work, attention, options.pass_size) if variant.name not in leave_out]
    measured = Measurements(chosen, memory=memory, notes=notes)
    _check(measured, models, work, clock, tell)
    _time(measured, work, clock, options, dtypes, tell)
    return measured


def _too_large(shape: T5Shape, work: Work, device: torch.device, notes: list[str]) -> set[str]:
    needed, free = bytes_needed(shape, work), available_bytes(device)
    if needed < 0.8 * free:
        return set()
    notes.append(f"one padded batch: needs {needed / 1e9:.0f} GB for its backward pass, {free / 1e9:.0f} GB are free; left out")
    return {"padded_fp32"}


def _memory(
    shape: T5Shape, work: Work, clock: Clock, options: Options, dtypes: list[str], leave_out: set[str], notes: list[str], tell: Tell
) -> dict[str, int]:
    """Return the peak resident size of a fresh process for each variant. Call it before torch computes anything here."""
    peaks = {}
    for name in options.memory:
        dtype = name.rpartition("_")[2]
        if dtype not in dtypes or name in leave_out:
            continue
        tell(f"memory of {name}, in a fresh process")

        def once(name: str = name, dtype: str = dtype) -> None:
            models = Models(shape, clock.device, work.prompts.shape[1], options.seed)
            kind = "sdpa" if dtype == "fp32" else "eager"
            chosen = [variant for variant in variants(models, work, {dtype: kind}, options.pass_size) if variant.name == name]
            chosen[0].run()

        answer = in_fresh_process(once, clock.num_threads)
        if answer is None:
            notes.append(f"{name}: its process was killed, probably for lack of memory; left out")
            leave_out.add(name)
        else:
            peaks[name] = answer[1]
    return peaks


def _check(measured: Measurements, models: Models, work: Work, clock: Clock, tell: Tell) -> None:
    """Run every variant once (its warm-up), compare the results, and on a GPU record its memory."""
    tell("float64 reference")
    reference = exact(models, work)
    results = {}
    for variant in measured.variants:
        tell(f"warm-up and check: {variant.name}")
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = variant.run()
        if clock.device.type == "cuda":
            # The peak without the memory of other variants, plus the weights of this one.
            weights = models.shape.num_parameters * (4 if variant.dtype == "fp32" else 2)
            measured.memory[variant.name] = torch.cuda.max_memory_allocated() - before + weights
        if variant.stock is not None:
            results[variant.name] = result
    measured.differences = compare(
        results, reference, {variant.name: variant.stock for variant in measured.variants if variant.stock}
    )


def _time(measured: Measurements, work: Work, clock: Clock, options: Options, dtypes: list[str], tell: Tell) -> None:
    runs: dict[str, Callable[[], Any]] = {
        variant.name: variant.run for variant in measured.variants if variant.name not in measured.wrong
    }
    runs[KERNEL] = lambda: stein_phi(work.prompts, work.prompts)
    for dtype in dtypes:
        runs[PEAK + dtype], measured.matmul_flops[dtype] = matmul(clock.device, dtype)
    measured.times = alternate(runs, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell)
