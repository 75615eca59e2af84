"""`bench target`: one step of the target stage, eight rows under one prompt: PEFT padding to 256 or to the longest, and ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch.nn import functional

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench import correctness
from bpt_dist.commands.bench.correctness import Gradients, compare
from bpt_dist.commands.bench.machine import has_bf16
from bpt_dist.commands.bench.source import Models, Variant, best_attention, exact
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup
from bpt_dist.commands.bench.workload import CAP, TARGET_TASKS, Work, make_work

HEADER = ("lengths of", "variant", "dtype", "s/step", "x PEFT to 256", "x PEFT to longest", "x PEFT to longest, same dtype")
CAPPED, LONGEST = "peft_to_256", "peft_to_longest"


def run_target(shape: T5Shape, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return times and ratios for each length profile; a variant with a wrong result has no time."""
    clock.use_threads()
    models = Models(shape, clock.device, num_prompt, options.seed)
    dtypes = ["fp32", "bf16"] if has_bf16(clock.device) else ["fp32"]
    attention = {"fp32": "sdpa"}
    profiles = {}
    for task, lengths in TARGET_TASKS.items():
        work = make_work(shape, 1, lengths, num_prompt, options.seed).to(clock.device)
        if "bf16" in dtypes and "bf16" not in attention:
            attention["bf16"] = best_attention(models, work, "bf16", clock)
        profiles[task] = _profile(models, work, attention, clock, options, lambda text, task=task: tell(f"{task}: {text}"))  # type: ignore[misc]
    notes = [] if "bf16" in dtypes else ["no bf16: this device has no instructions for it, so those rows are left out"]
    return {"profiles": profiles, "notes": notes, "lengths": {name: list(value) for name, value in TARGET_TASKS.items()}}


def target_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    rows: list[tuple[str, ...]] = []
    for task, profile in report["profiles"].items():
        for row in profile["variants"].values():
            cells = ("wrong", "", "", "") if "seconds" not in row else (
                f"{row['seconds']:.3g}", ratio_cell(row["speedup_over_256"]), ratio_cell(row["speedup_over_longest"]),
                ratio_cell(row["speedup_over_longest_same_dtype"]))  # fmt: skip
            rows.append((task, row["title"], row["dtype"], *cells))
    return rows


def wrong_in(report: dict[str, Any]) -> list[str]:
    """Return the variants with a wrong result, with their profile."""
    return [
        f"{task}: {name}" for task, profile in report["profiles"].items()
        for name, variant in profile["correct"].items() if not variant["right"]
    ]  # fmt: skip


def padded_to(work: Work, length: int) -> Work:
    """Return the same texts with every source padded to `length` tokens."""
    missing = (0, length - work.texts.source_ids.shape[1])
    ids, mask = (functional.pad(part, missing) for part in (work.texts.source_ids, work.texts.source_mask))
    return Work(work.prompts, replace(work.texts, source_ids=ids, source_mask=mask))


def _variants(models: Models, work: Work, attention: dict[str, str]) -> Iterator[Variant]:
    for dtype, kind in attention.items():
        stock = f"{LONGEST}_{dtype}"
        if dtype == "fp32":
            capped = padded_to(work, CAP)
            run = partial(_peft, models, capped, dtype, kind)
            yield Variant(f"{CAPPED}_{dtype}", f"PEFT padded to {CAP}, {kind}", dtype, run, capped.num_padded_tokens, stock)
        run = partial(_peft, models, work, dtype, kind)
        yield Variant(stock, f"PEFT padded to longest, {kind}", dtype, run, work.num_padded_tokens, stock)
        yield Variant(f"ours_{dtype}", "ours, packed", dtype, partial(_ours, models, work, dtype), work.num_tokens, stock)


def _peft(models: Models, work: Work, dtype: str, attention: str) -> Gradients:
    models.stock(dtype, attention)
    return models.peft(dtype).gradients(work)


def _ours(models: Models, work: Work, dtype: str) -> Gradients:
    return correctness.packed(models.backbone(dtype), models.packed(dtype), work)


def _profile(
    models: Models, work: Work, attention: dict[str, str], clock: Clock, options: Options, tell: Callable[[str], None]
) -> dict[str, Any]:
    chosen = list(_variants(models, work, attention))
    tell("check against float64")
    results = {variant.name: variant.run() for variant in chosen}
    differences = compare(results, exact(models, work), {variant.name: variant.stock for variant in chosen if variant.stock})
    right = [variant for variant in chosen if differences[variant.name].right]
    runs = {variant.name: variant.run for variant in right}
    times = alternate(runs, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell)
    return {
        "correct": {name: {**vars(value), "right": value.right} for name, value in differences.items()},
        "variants": {variant.name: _row(variant, times) for variant in chosen},
    }


def _row(variant: Variant, times: dict[str, list[Timing]]) -> dict[str, Any]:
    row: dict[str, Any] = {"title": variant.title, "dtype": variant.dtype}
    if variant.name not in times:
        return row
    own = times[variant.name]
    ratios = {
        "speedup_over_256": f"{CAPPED}_fp32",
        "speedup_over_longest": f"{LONGEST}_fp32",
        "speedup_over_longest_same_dtype": f"{LONGEST}_{variant.dtype}",
    }
    over = {key: speedup(times[name], own).to_json() if name in times else None for key, name in ratios.items()}
    return row | {"seconds": statistics.median(time.seconds for time in own), **over}
