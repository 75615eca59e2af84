"""`bench predict`: the same rows spread over 1, 10 or 100 tasks, each with its own prompt and label words.

PEFT switches the adapter for each task and reads its rows in padded batches, once a label word. Ours reads rows of all tasks
together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpt_dist.backbones.base import Texts
from bpt_dist.backbones.candidates import Tree
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.evaluation import TIES, label_words, same_predictions
from bpt_dist.commands.bench.sides import DecoderSides, Sides, T5Sides
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup
from bpt_dist.commands.bench.workload import work_of

HEADER = ("tasks", "variant", "dtype", "s", "rows/s", "x PEFT", "x one task")
NUM_TASKS = (1, 10, 100)
ROWS, QUICK_ROWS = 800, 100  # eight of each of 100 tasks; one
LENGTHS = (16, 40)  # tokens of the shortest and the longest text
WORD_LENGTHS = ((2, 2), (2, 3), (2, 2, 3))  # tokens of the label words of the tasks, in turn
TOKENS_AT_ONCE = 16_384  # as the Predictor's
PEFT_ROWS = 32  # of a padded batch


@dataclass(frozen=True)
class Mixture:
    """Rows of several tasks: the texts, the task of each, and the prompt and the label words of each task."""

    texts: Texts
    tasks: list[int]
    prompts: Float[Tensor, "K P D"]
    words: list[Int[Tensor, "C U"]]


def run_predict(shape: T5Shape, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return times and ratios on a T5, and whether both predict the same label words."""
    clock.use_threads()
    return run_sides(T5Sides(shape, clock, num_prompt, options.seed), clock, options, num_prompt, tell)


def run_predict_decoder(config: Any, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return the same on a decoder-only model."""
    clock.use_threads()
    return run_sides(DecoderSides(config, clock, num_prompt, options.seed), clock, options, num_prompt, tell)


def run_sides(sides: Sides, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Time both sides on the same mixtures."""
    num_rows = ROWS if options.limit_seconds is None else QUICK_ROWS
    mixtures = {number: mixture(sides, number, num_rows, num_prompt, options.seed) for number in NUM_TASKS}
    runs: dict[str, Callable[[], Any]] = {}
    same: dict[int, bool] = {}
    for number, mixed in mixtures.items():
        ours, theirs = partial(answer_together, sides, mixed), partial(answer_task_by_task, sides, mixed)
        tell(f"warm-up: {number} tasks")
        pairs = list(zip(ours(), theirs(), strict=True))
        same[number] = all(same_predictions(one[None], other[None], TIES["fp32"]) for one, other in pairs)
        runs |= {f"peft_{number}": theirs, f"ours_{number}": ours}
    rounds = alternate(runs, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell)
    rows = {name: _row(name, rounds, num_rows, sides.title) for name in runs}
    notes = ["PEFT reads the rows of a task in batches of its own, once a label word; times of both leave tokenising out"]
    return {"variants": rows, "same_predictions": same, "rows": num_rows, "notes": notes}


def predict_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    return [
        (str(row["tasks"]), row["title"], "fp32", f"{row['seconds']:.3g}", f"{row['rows_per_second']:.1f}",
         ratio_cell(row["speedup_over_peft"]), ratio_cell(row["speed_of_one_task"]))
        for row in report["variants"].values()
    ]  # fmt: skip


def other_answers(report: dict[str, Any], who: str = "ours") -> list[str]:
    """Return the numbers of tasks at which `who` predicts other words than PEFT."""
    return [
        f"{who} predicts other words than PEFT: {number} tasks" for number, same in report["same_predictions"].items() if not same
    ]


def mixture(sides: Sides, num_tasks: int, num_rows: int, num_prompt: int, seed: int) -> Mixture:
    """Return random texts in turn of `num_tasks` tasks; the texts are the same for any number of tasks."""
    spread = LENGTHS[1] - LENGTHS[0] + 1
    lengths = [(LENGTHS[0] + 7 * row % spread, 2) for row in range(num_rows)]
    work = work_of(sides.vocabulary, sides.width, num_tasks, lengths, num_prompt=num_prompt, seed=seed)
    words = [label_words(WORD_LENGTHS[k % len(WORD_LENGTHS)], sides.vocabulary, seed + k) for k in range(num_tasks)]
    texts = Texts(work.texts.source_ids, work.texts.source_mask)
    return Mixture(texts, [row % num_tasks for row in range(num_rows)], work.prompts, words)


def answer_together(sides: Sides, mixed: Mixture) -> list[Float[Tensor, " C"]]:
    """Return the log-likelihoods of each row's label words: rows of all tasks share a pass, the longest first."""
    lengths = mixed.texts.source_mask.sum(1).tolist()
    of_tasks = [prompt[None] for prompt in mixed.prompts]  # the very same tensor for all rows of a task, as the Predictor has it
    found: dict[int, Tensor] = {}
    for rows in _passes(lengths, mixed.prompts.shape[1]):
        tasks = [mixed.tasks[row] for row in rows]
        ranked = sides.together(mixed.texts.select(rows), [of_tasks[k] for k in tasks], [mixed.words[k] for k in tasks])
        found |= {row: scores[0] for row, scores in zip(rows, ranked, strict=True)}
    return [found[row] for row in range(len(lengths))]


@torch.no_grad()
def answer_task_by_task(sides: Sides, mixed: Mixture) -> list[Float[Tensor, " C"]]:
    """Return the same by PEFT: the prompt is switched for each task."""
    found: dict[int, Tensor] = {}
    for k, words in enumerate(mixed.words):
        sides.load(mixed.prompts[k])
        of_task = [row for row, task in enumerate(mixed.tasks) if task == k]
        for first in range(0, len(of_task), PEFT_ROWS):
            rows = of_task[first : first + PEFT_ROWS]
            texts = mixed.texts.select(rows)
            columns = [sides.score(texts, word[word >= 0]) for word in words]
            found |= dict(zip(rows, torch.stack(columns, dim=-1), strict=True))
    return [found[row] for row in range(len(mixed.tasks))]


def flop_limit(sides: Sides, mixed: Mixture) -> float:
    """Return how much faster ours can be than PEFT by what both multiply, if prompts are kept where they can be.

    PEFT reads the rows of a task once a label word, padded to the longest of them.
    """
    lengths, num_prompt = mixed.texts.source_mask.sum(1).tolist(), mixed.prompts.shape[1]
    theirs = ours = 0.0
    of_ours = cache(lambda nodes: _by_length(lambda length: sides.pass_flops(num_prompt, length, nodes), lengths))
    of_theirs = cache(lambda size: _by_length(lambda length: sides.shape.row_cost(num_prompt, length, size).forward_flops, lengths))
    for k, words in enumerate(mixed.words):
        tree = Tree.of(words.tolist(), 0)
        of_task = [row for row, task in enumerate(mixed.tasks) if task == k]
        ours += sum(of_ours(len(tree.tokens))(lengths[row]) for row in of_task)
        for first in range(0, len(of_task), PEFT_ROWS):
            batch = of_task[first : first + PEFT_ROWS]
            longest = max(lengths[row] for row in batch)
            sizes = (words >= 0).sum(1).tolist()
            theirs += len(batch) * sum(of_theirs(size)(longest) for size in sizes)
    return theirs / ours


def _by_length(count: Callable[[int], int], lengths: Sequence[int]) -> Callable[[int], float]:
    """Return the FLOPs of a text by its length: a polynomial of degree 2, by attention, so three lengths tell it."""
    first, last = min(lengths), max(*lengths, min(lengths) + 2)
    polynomial = np.polynomial.Polynomial.fit(known := (first, (first + last) // 2, last), list(map(count, known)), 2)
    return lambda length: float(polynomial(length))


def _passes(lengths: Sequence[int], num_prompt: int) -> list[list[int]]:
    """Return the rows of each pass, within the tokens a pass may have."""
    passes: list[list[int]] = [[]]
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        cost = lengths[row] + num_prompt
        if passes[-1] and tokens + cost > TOKENS_AT_ONCE:
            passes.append([])
            tokens = 0
        passes[-1].append(row)
        tokens += cost
    return passes


def _row(name: str, rounds: dict[str, list[Timing]], num_rows: int, ours: str) -> dict[str, Any]:
    who, _, number = name.partition("_")
    seconds = statistics.median(time.seconds for time in rounds[name])
    return {
        "tasks": int(number),
        "title": "PEFT, adapter switched for each task" if who == "peft" else ours,
        "seconds": seconds,
        "rows_per_second": num_rows / seconds,
        "speedup_over_peft": speedup(rounds[f"peft_{number}"], rounds[name]).to_json(),
        "speed_of_one_task": speedup(rounds[f"{who}_1"], rounds[name]).to_json(),
    }
