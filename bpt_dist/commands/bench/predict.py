"""`bench predict`: the same rows spread over 1, 10 or 100 tasks, each with its own prompt and label words.

PEFT switches the adapter for each task and reads its rows in padded batches, once a label word. Ours reads rows of all tasks
together.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bpt_dist.backbones.base import Texts
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.decoder import Models as DecoderModels
from bpt_dist.commands.bench.evaluation import TIES, label_words, same_predictions
from bpt_dist.commands.bench.source import Models
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup
from bpt_dist.commands.bench.workload import work_of
from bpt_dist.objective import sequence_log_likelihood

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


class Sides(Protocol):
    """A model of random weights as we read it and as PEFT does."""

    vocabulary: int
    width: int
    title: str  # of ours

    def together(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "1 _P D"]], words: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "1 _C"]]:
        """Return the log-likelihoods of each text's words under its own prompt, in one pass of ours."""

    def load(self, prompt: Float[Tensor, "P D"]) -> None:
        """Switch PEFT's prompt."""

    def score(self, texts: Texts, word: Int[Tensor, " U"]) -> Float[Tensor, " N"]:
        """Return the log-likelihood of one word behind each text by PEFT."""


class T5Sides:
    """A T5."""

    title = "ours: all tasks in one batch"

    def __init__(self, shape: T5Shape, clock: Clock, num_prompt: int, seed: int) -> None:
        self.models, self.device = Models(shape, clock.device, num_prompt, seed), clock.device
        self.vocabulary, self.width = shape.config.vocab_size, shape.config.d_model

    def together(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "1 _P D"]], words: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "1 _C"]]:
        """Return the log-likelihoods of each text's words under its own prompt, in one pass of ours."""
        backbone = self.models.backbone("fp32")
        backbone.packed = self.models.packed("fp32")
        try:
            return backbone.rank_each(texts, prompts, words)
        finally:
            backbone.packed = None

    def load(self, prompt: Float[Tensor, "P D"]) -> None:
        """Switch PEFT's prompt."""
        self.models.stock("fp32", "sdpa")
        self.models.peft("fp32").load(prompt)

    def score(self, texts: Texts, word: Int[Tensor, " U"]) -> Float[Tensor, " N"]:
        """Return the log-likelihood of one word behind each text by PEFT."""
        labels = word.repeat(len(texts.source_ids), 1).to(self.device)
        source = {"input_ids": texts.source_ids.to(self.device), "attention_mask": texts.source_mask.to(self.device)}
        logits = self.models.peft("fp32").model(**source, labels=labels).logits
        return sequence_log_likelihood(logits, labels, "token_sum")


class DecoderSides:
    """A decoder-only model."""

    title = "ours: all tasks in one batch, each prompt read once"

    def __init__(self, config: Any, clock: Clock, num_prompt: int, _seed: int) -> None:
        self.models, self.device = DecoderModels(config, "fp32", clock.device, num_prompt), clock.device
        self.vocabulary, self.width = config.vocab_size, config.hidden_size

    def together(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "1 _P D"]], words: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "1 _C"]]:
        """Return the log-likelihoods of each text's words under its own prompt, in one pass of ours."""
        return self.models.backbone.rank_each(texts, prompts, words)

    def load(self, prompt: Float[Tensor, "P D"]) -> None:
        """Switch PEFT's prompt."""
        self.models.load(prompt)

    def score(self, texts: Texts, word: Int[Tensor, " U"]) -> Float[Tensor, " N"]:
        """Return the log-likelihood of one word behind each text by PEFT, which makes logits from the shortest text's end on."""
        lengths = texts.source_mask.sum(1)
        rows = [torch.cat([ids[:length], word]) for ids, length in zip(texts.source_ids, lengths.tolist(), strict=True)]
        ids = pad_sequence(rows, batch_first=True).to(self.device)
        mask = (torch.arange(ids.shape[1]) < (lengths + len(word))[:, None]).long().to(self.device)
        first = int(lengths.min()) - 1
        logits = self.models.peft(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        places = (lengths[:, None] - 1 - first + torch.arange(len(word))).to(self.device)
        of_word = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[2]))
        return sequence_log_likelihood(of_word, word.repeat(len(ids), 1).to(self.device), "token_sum")


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
