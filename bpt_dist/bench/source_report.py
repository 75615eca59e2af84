"""What the comparison of the source step says, as numbers for a file and as tables for the screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bpt_dist.backbone_shapes import T5Shape
from bpt_dist.bench.flops import useful_flops
from bpt_dist.bench.machine import rate
from bpt_dist.bench.paired import Spread, Timing, speedup, spread
from bpt_dist.bench.source import Variant
from bpt_dist.bench.source_run import KERNEL, PEAK, Found
from bpt_dist.bench.work import Work

HEADER = ("variant", "dtype", "s/step", "wall s", "tokens/s", "rows/s", "particle-steps/s", "matmul share", "padding",
          "kernel", "memory", "x PEFT fp32", "x PEFT same dtype")  # fmt: skip
NUMBERS = tuple(range(2, len(HEADER)))


def source_json(found: Found, shape: T5Shape, work: Work) -> dict[str, Any]:
    """Return everything measured; `ratio_*` compare round by round and hold median, low and high."""
    rows = {each.name: _row(each, found, shape, work) for each in found.variants}
    ratios = {key: _ratios(found, opponent) for key, opponent in OPPONENTS.items()}
    best = ratios["ratio_to_peft_loop"]
    return {
        "ratio_to_peft_loop": {dtype: None if value is None else round(value.median, 4) for dtype, value in best.items()},
        "ranges": {key: {dtype: value and value.to_json() for dtype, value in each.items()} for key, each in ratios.items()},
        **{key: {dtype: value and round(value.median, 4) for dtype, value in each.items()}
           for key, each in ratios.items() if key != "ratio_to_peft_loop"},
        "correct": {name: {**vars(value), "right": value.right} for name, value in found.differences.items()},
        "variants": rows,
        "matmul_flops_per_second": {dtype: rate(flops, found.times[PEAK + dtype]) for dtype, flops in found.matmul_flops.items()},
        "rounds": len(found.times[KERNEL]),
        "work": _work(work, shape),
        "notes": found.notes,
    }  # fmt: skip


# Key of the file -> the opponent of both of ours.
OPPONENTS = {
    "ratio_to_peft_loop": "peft_fp32",
    "ratio_to_bf16_peft_loop": "peft_bf16",
    "ratio_to_train_mode_peft_loop": "peft_train_fp32",
    "ratio_to_grouped_stock": "grouped_fp32",
}


def _ratios(found: Found, opponent: str) -> dict[str, Spread | None]:
    ratios: dict[str, Spread | None] = {}
    for dtype in ("fp32", "bf16"):
        ours = f"ours_{dtype}"
        both = ours in found.times and opponent in found.times
        ratios[dtype] = speedup(found.times[opponent], found.times[ours]) if both else None
    return ratios


def _work(work: Work, shape: T5Shape) -> dict[str, Any]:
    flops = useful_flops(shape, work.prompts.shape[1], work.lengths, len(work.prompts))
    return {
        "particles": len(work.prompts), "prompt": work.prompts.shape[1], "lengths": work.lengths, "rows": work.num_rows,
        "tokens": work.num_tokens, "padded_tokens": work.num_padded_tokens, "useful_flops": flops,
    }  # fmt: skip


def _row(each: Variant, found: Found, shape: T5Shape, work: Work) -> dict[str, Any]:
    row: dict[str, Any] = {
        "title": each.title, "dtype": each.dtype, "padding": 1 - work.num_tokens / each.num_tokens,
        "memory_bytes": found.memory.get(each.name),
    }  # fmt: skip
    times = found.times.get(each.name)
    if not times:
        return row
    seconds = statistics.median(time.seconds for time in times)
    flops = useful_flops(shape, work.prompts.shape[1], work.lengths, len(work.prompts))
    shares = _shares(flops, times, found, each.dtype)
    return row | {
        "seconds": seconds,
        "cpu_seconds": statistics.median(time.cpu for time in times),
        "wall_seconds": statistics.median(time.wall for time in times),
        "tokens_per_second": work.num_tokens / seconds,
        "rows_per_second": work.num_rows / seconds,
        "particle_steps_per_second": len(work.prompts) / seconds,
        "matmul_share": spread(shares).to_json(),
        "kernel_share": statistics.median(time.seconds for time in found.times[KERNEL]) / seconds if "ours" in each.name else None,
        "speedup_over_peft_fp32": _over(found, "peft_fp32", times),
        "speedup_over_peft_same_dtype": _over(found, f"peft_{each.dtype}", times),
    }


def _shares(flops: int, times: Sequence[Timing], found: Found, dtype: str) -> list[float]:
    """Return for each round the useful FLOP/s over what a matrix product reached in the same round."""
    peaks = found.times[PEAK + dtype]
    return [flops / time.seconds / (found.matmul_flops[dtype] / peak.seconds) for time, peak in zip(times, peaks, strict=True)]


def _over(found: Found, opponent: str, times: Sequence[Timing]) -> dict[str, float] | None:
    return speedup(found.times[opponent], times).to_json() if opponent in found.times else None


def correctness_lines(report: dict[str, Any]) -> list[str]:
    """Return the first lines to read: how far each variant is from float64, and which are wrong."""
    lines = []
    for name, each in report["correct"].items():
        verdict = "" if each["right"] else f"  WRONG: at most {each['allowed_loss']:.1e} and {each['allowed_gradient']:.1e}"
        lines.append(f"{name:14} loss {each['loss']:.1e}, prompt gradient {each['gradient']:.1e}{verdict}")
    return lines


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a line a variant; one that is wrong has no time."""
    return [_cells(row) for row in report["variants"].values()]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.2f} GB"
    first, last = (row["title"], row["dtype"]), (f"{100 * row['padding']:.0f} %",)
    if "seconds" not in row:
        return (*first, "wrong", "", "", "", "", "", *last, "", memory, "", "")
    kernel = "" if row["kernel_share"] is None else f"{100 * row['kernel_share']:.2f} %"
    return (
        *first, f"{row['seconds']:.3g}", f"{row['wall_seconds']:.3g}", f"{row['tokens_per_second']:,.0f}",
        f"{row['rows_per_second']:.1f}", f"{row['particle_steps_per_second']:.2f}", f"{row['matmul_share']['median']:.2f}",
        *last, kernel, memory, ratio_cell(row["speedup_over_peft_fp32"]), ratio_cell(row["speedup_over_peft_same_dtype"]),
    )  # fmt: skip


def ratio_cell(value: dict[str, float] | None) -> str:
    """Write a ratio with its range."""
    return "" if value is None else str(Spread(**value))
