"""`bench evaluation`: predict the label words of a classification task, by generating ten tokens or by ranking the label words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.machine import has_bf16
from bpt_dist.commands.bench.source import Models
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup
from bpt_dist.commands.bench.workload import SPECIAL, TARGET_TASKS, Work, make_work
from bpt_dist.data.batches import IGNORED

HEADER = ("lengths of", "variant", "dtype", "s/batch", "rows/s", "x generate", "x generate, same dtype")
NUM_TOKENS = 10  # what evaluation scripts ask `generate` for
# Of the tasks' own label words under T5's tokenizer: equivalent, not_equivalent; True, False.
LABEL_TOKENS: Mapping[str, tuple[int, ...]] = {"mrpc": (2, 6), "boolq": (2, 4)}
# Log-likelihoods of two words closer than this (nats) are a tie: rounding decides between them.
TIES: Mapping[str, float] = {"fp32": 1e-3, "bf16": 0.1}
_ATTENTION = {"fp32": "sdpa", "bf16": "eager"}


def run_evaluation(shape: T5Shape, clock: Clock, options: Options, num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return times, ratios, and whether our pass predicts the same label words as the stock T5."""
    clock.use_threads()
    models = Models(shape, clock.device, num_prompt, options.seed)
    dtypes = ["fp32", "bf16"] if has_bf16(clock.device) else ["fp32"]
    profiles = {}
    for task, lengths in TARGET_TASKS.items():
        words = label_words(LABEL_TOKENS[task], shape.config.vocab_size, options.seed).to(clock.device)
        work = make_work(shape, 1, [*lengths, *lengths], num_prompt, options.seed).to(clock.device)
        profiles[task] = _profile(models, work, words, dtypes, clock, options, lambda text, task=task: tell(f"{task}: {text}"))  # type: ignore[misc]
    notes = ["generate stops early once every row has ended; with random weights no row ends, so it makes all 10 tokens here"]
    if len(dtypes) == 1:
        notes.append("no bf16: this device has no instructions for it, so those rows are left out")
    return {"profiles": profiles, "label_tokens": LABEL_TOKENS, "rows": len(work.texts), "notes": notes}


def evaluation_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    return [
        (task, row["title"], row["dtype"], f"{row['seconds']:.3g}", f"{row['rows_per_second']:.1f}",
         ratio_cell(row["speedup_over_generate"]), ratio_cell(row["speedup_over_generate_same_dtype"]))
        for task, profile in report["profiles"].items() for row in profile["variants"].values()
    ]  # fmt: skip


def other_predictions(report: dict[str, Any]) -> list[str]:
    """Return the tasks and dtypes where our ranking and that of the stock T5 predict different words."""
    return [
        f"{task}: {dtype}" for task, profile in report["profiles"].items()
        for dtype, same in profile["same_predictions"].items() if not same
    ]  # fmt: skip


def label_words(lengths: Sequence[int], vocabulary: int, seed: int) -> Int[Tensor, "C U"]:
    """Return random label words of the given numbers of tokens, end token included, padded by -100."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.full((len(lengths), max(lengths)), IGNORED)
    for row, length in enumerate(lengths):
        words[row, :length] = torch.randint(SPECIAL, vocabulary, (length,), generator=generator)
        words[row, length - 1] = 1
    return words


def rank(models: Models, work: Work, words: Tensor, dtype: str, *, stock: bool) -> Float[Tensor, "N C"]:
    """Return the log-likelihood of every label word for every text, by the stock T5 or by our pass; the encoder runs once."""
    backbone = models.stock(dtype, _ATTENTION[dtype]) if stock else models.backbone(dtype)
    backbone.packed = None if stock else models.packed(dtype)
    try:
        return backbone.rank(work.texts, words, lambda embeds: prepend(work.prompts, embeds))[0]
    finally:
        backbone.packed = None


@torch.no_grad()
def rank_by_full_passes(models: Models, work: Work, words: Tensor, dtype: str) -> Float[Tensor, "N C"]:
    """Return the same by one full pass for each label word."""
    backbone, columns = models.stock(dtype, _ATTENTION[dtype]), []
    for word in words:
        targets = word[word != IGNORED].expand(len(work.texts), -1)
        texts = type(work.texts)(**{**vars(work.texts), "target_ids": targets})
        forward = backbone.log_likelihood(texts, lambda embeds: prepend(work.prompts, embeds), "token_sum")
        columns.append(forward.log_likelihood[0])
    return torch.stack(columns, dim=-1)


def generate(models: Models, work: Work, dtype: str, num_tokens: int) -> Tensor:
    """Return the ids PEFT generates."""
    models.stock(dtype, _ATTENTION[dtype])
    return models.peft(dtype).generate(work.prompts[0], work.texts, num_tokens)


def same_predictions(ours: Tensor, stock: Tensor, tie: float) -> bool:
    """Return whether the best words agree, except between words that the stock T5 finds equally likely within `tie` nats."""
    chosen = ours.argmax(1)
    behind = stock.max(1).values - stock.gather(1, chosen[:, None])[:, 0]
    return bool((behind <= tie).all())


def _profile(
    models: Models, work: Work, words: Tensor, dtypes: list[str], clock: Clock, options: Options, tell: Callable[[str], None]
) -> dict[str, Any]:
    runs: dict[str, tuple[str, str, Callable[[], Any]]] = {}
    same = {}
    for dtype in dtypes:
        ours_scores, reference = (rank(models, work, words, dtype, stock=stock) for stock in (False, True))
        same[dtype] = same_predictions(ours_scores, reference, TIES[dtype])
        of_ten, of_longest = (partial(generate, models, work, dtype, count) for count in (NUM_TOKENS, words.shape[1]))
        stock, ours = (partial(rank, models, work, words, dtype, stock=stock) for stock in (True, False))
        runs[f"generate_{dtype}"] = (f"PEFT generate, {NUM_TOKENS} tokens", dtype, of_ten)
        if dtype == "fp32":
            full = partial(rank_by_full_passes, models, work, words, dtype)
            runs["generate_short_fp32"] = (f"PEFT generate, {words.shape[1]} tokens", dtype, of_longest)
            runs["full_fp32"] = ("rank by one pass a label, stock T5", dtype, full)
            runs["stock_fp32"] = ("rank, encoder once, stock T5", dtype, stock)
        if same[dtype]:
            runs[f"ours_{dtype}"] = ("ours: rank, encoder once, packed", dtype, ours)
    for name, (_, _, run) in runs.items():
        tell(f"warm-up: {name}")
        run()
    rounds = alternate({name: run for name, (_, _, run) in runs.items()}, clock, options.repeats,
                       limit_seconds=options.limit_seconds, tell=tell)  # fmt: skip
    variants = {name: _row(title, dtype, name, rounds, len(work.texts)) for name, (title, dtype, _) in runs.items()}
    return {"same_predictions": same, "variants": variants}


def _row(title: str, dtype: str, name: str, times: dict[str, list[Timing]], rows: int) -> dict[str, Any]:
    seconds = statistics.median(time.seconds for time in times[name])
    opponents = {"speedup_over_generate": "generate_fp32", "speedup_over_generate_same_dtype": f"generate_{dtype}"}
    over = {key: speedup(times[opponent], times[name]).to_json() for key, opponent in opponents.items()}
    return {"title": title, "dtype": dtype, "seconds": seconds, "rows_per_second": rows / seconds, **over}
