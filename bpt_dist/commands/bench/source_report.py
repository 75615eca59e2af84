"""The report of the source step: the JSON file, the table on the screen, and the FLOPs that a step needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.machine import rate
from bpt_dist.commands.bench.source import Variant
from bpt_dist.commands.bench.source_run import KERNEL, PEAK, Measurements
from bpt_dist.commands.bench.timing import Spread, Timing, speedup, spread
from bpt_dist.commands.bench.workload import Work

HEADER = ("variant", "dtype", "s/step", "wall s", "tokens/s", "rows/s", "particle-steps/s", "matmul share", "padding",
          "kernel", "memory", "x PEFT fp32", "x PEFT same dtype")  # fmt: skip
NUMBERS = tuple(range(2, len(HEADER)))
# Key in the file -> the variant that ours is compared with.
OPPONENTS = {
    "ratio_to_peft_loop": "peft_fp32",
    "ratio_to_bf16_peft_loop": "peft_bf16",
    "ratio_to_train_mode_peft_loop": "peft_train_fp32",
    "ratio_to_grouped_stock": "grouped_fp32",
}


def source_json(measured: Measurements, shape: T5Shape, work: Work) -> dict[str, Any]:
    """Return everything measured; `ratio_*` compare round by round and hold median, low and high."""
    rows = {variant.name: _row(variant, measured, shape, work) for variant in measured.variants}
    ratios = {key: _ratios(measured, opponent) for key, opponent in OPPONENTS.items()}
    best = ratios["ratio_to_peft_loop"]
    return {
        "ratio_to_peft_loop": {dtype: None if value is None else round(value.median, 4) for dtype, value in best.items()},
        "ranges": {key: {dtype: value and value.to_json() for dtype, value in ratio.items()} for key, ratio in ratios.items()},
        **{key: {dtype: value and round(value.median, 4) for dtype, value in ratio.items()}
           for key, ratio in ratios.items() if key != "ratio_to_peft_loop"},
        "correct": {name: {**vars(value), "right": value.right} for name, value in measured.differences.items()},
        "variants": rows,
        "matmul_flops_per_second": {
            dtype: rate(flops, measured.times[PEAK + dtype]) for dtype, flops in measured.matmul_flops.items()
        },
        "rounds": len(measured.times[KERNEL]),
        "work": _work(work, shape),
        "notes": measured.notes,
    }  # fmt: skip


def correctness_lines(report: dict[str, Any]) -> list[str]:
    """Return one line a variant: how far it is from float64, and whether that is too far."""
    lines = []
    for name, error in report["correct"].items():
        verdict = "" if error["right"] else f"  WRONG: at most {error['allowed_loss']:.1e} and {error['allowed_gradient']:.1e}"
        lines.append(f"{name:14} loss {error['loss']:.1e}, prompt gradient {error['gradient']:.1e}{verdict}")
    return lines


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one row a variant; a wrong variant has no time."""
    return [_cells(row) for row in report["variants"].values()]


def ratio_cell(value: dict[str, float] | None) -> str:
    """Write a ratio with its range."""
    return "" if value is None else str(Spread(**value))


class Flops(NamedTuple):
    """Floating-point operations of a forward and of the backward pass to the inputs."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.forward + self.backward


def row_flops(shape: T5Shape, num_encoder: int, num_decoder: int, *, keys: bool) -> Flops:
    """Return the FLOPs of one row of `num_encoder` = P + T and `num_decoder` positions.

    `keys`: cross-attention with keys and values, or without them.
    """
    config = shape.config
    width, inner, vocabulary = config.d_model, config.d_ff, config.vocab_size
    heads, inside = config.num_heads, config.num_heads * config.d_kv
    feed = (3 if config.is_gated_act else 2) * width * inner
    encoder_blocks, decoder_blocks = shape.num_blocks
    s, u = num_encoder, num_decoder

    encoder_linear = 2 * s * encoder_blocks * (4 * width * inside + feed)
    encoder_attention = 4 * encoder_blocks * s * s * inside
    self_linear, self_attention = 2 * u * 4 * width * inside, 4 * u * u * inside  # of one block
    queries, output = 2 * u * width * inside, 2 * u * width * inside
    if keys:
        folded, projected, product = 0, 4 * s * width * inside, 2 * u * s * inside
    else:
        folded, projected, product = 2 * u * width * inside, 2 * u * width * inside, 2 * u * s * heads * width
    block = self_linear + self_attention + queries + folded + projected + 2 * product + output + 2 * u * feed
    head = 2 * u * width * vocabulary
    forward = encoder_linear + encoder_attention + decoder_blocks * block + head
    # Products of two activations go back to both; those of the first block's self-attention and queries to nothing.
    first = self_linear + 2 * self_attention + queries + folded + product
    backward = encoder_linear + 2 * encoder_attention + head - first
    backward += decoder_blocks * (block + self_attention + 2 * product)
    return Flops(forward, backward)


def useful_flops(shape: T5Shape, num_prompt: int, lengths: Sequence[tuple[int, int]], num_particles: int) -> int:
    """Return the FLOPs one step needs at the real lengths, by the cheaper form of cross-attention: the base of utilisation."""
    ways = [
        [row_flops(shape, num_prompt + source, target, keys=keys).total for keys in (True, False)] for source, target in lengths
    ]
    return num_particles * sum(map(min, ways))


def _ratios(measured: Measurements, opponent: str) -> dict[str, Spread | None]:
    ratios: dict[str, Spread | None] = {}
    for dtype in ("fp32", "bf16"):
        ours = f"ours_{dtype}"
        both = ours in measured.times and opponent in measured.times
        ratios[dtype] = speedup(measured.times[opponent], measured.times[ours]) if both else None
    return ratios


def _work(work: Work, shape: T5Shape) -> dict[str, Any]:
    flops = useful_flops(shape, work.prompts.shape[1], work.lengths, len(work.prompts))
    return {
        "particles": len(work.prompts), "prompt": work.prompts.shape[1], "lengths": work.lengths, "rows": work.num_rows,
        "tokens": work.num_tokens, "padded_tokens": work.num_padded_tokens, "useful_flops": flops,
    }  # fmt: skip


def _row(variant: Variant, measured: Measurements, shape: T5Shape, work: Work) -> dict[str, Any]:
    row: dict[str, Any] = {
        "title": variant.title, "dtype": variant.dtype, "padding": 1 - work.num_tokens / variant.num_tokens,
        "memory_bytes": measured.memory.get(variant.name),
    }  # fmt: skip
    times = measured.times.get(variant.name)
    if not times:
        return row
    seconds = statistics.median(time.seconds for time in times)
    flops = useful_flops(shape, work.prompts.shape[1], work.lengths, len(work.prompts))
    shares = _shares(flops, times, measured, variant.dtype)
    return row | {
        "seconds": seconds,
        "cpu_seconds": statistics.median(time.cpu for time in times),
        "wall_seconds": statistics.median(time.wall for time in times),
        "tokens_per_second": work.num_tokens / seconds,
        "rows_per_second": work.num_rows / seconds,
        "particle_steps_per_second": len(work.prompts) / seconds,
        "matmul_share": spread(shares).to_json(),
        "kernel_share": statistics.median(time.seconds for time in measured.times[KERNEL]) / seconds
        if "ours" in variant.name
        else None,
        "speedup_over_peft_fp32": _over(measured, "peft_fp32", times),
        "speedup_over_peft_same_dtype": _over(measured, f"peft_{variant.dtype}", times),
    }


def _shares(flops: int, times: Sequence[Timing], measured: Measurements, dtype: str) -> list[float]:
    """Return for each round the useful FLOP/s over what a matrix product reached in the same round."""
    peaks = measured.times[PEAK + dtype]
    return [flops / time.seconds / (measured.matmul_flops[dtype] / peak.seconds) for time, peak in zip(times, peaks, strict=True)]


def _over(measured: Measurements, opponent: str, times: Sequence[Timing]) -> dict[str, float] | None:
    return speedup(measured.times[opponent], times).to_json() if opponent in measured.times else None


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
