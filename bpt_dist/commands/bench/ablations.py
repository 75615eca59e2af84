"""`bench passes`: the gain of each optimisation over the version without it, and what was tried and did not pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.utils.checkpoint import checkpoint

from bpt_dist.backbones.attention import ATTENTIONS, default_attention, plain_attention
from bpt_dist.backbones.t5.blocks import Decoder
from bpt_dist.backbones.t5.layout import Rows
from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench import correctness, evaluation, machine
from bpt_dist.commands.bench.baselines import import_peft, naive, pyro_style
from bpt_dist.commands.bench.correctness import Gradients
from bpt_dist.commands.bench.machine import has_bf16
from bpt_dist.commands.bench.processes import in_fresh_process
from bpt_dist.commands.bench.source import Models
from bpt_dist.commands.bench.source_run import Tell
from bpt_dist.commands.bench.svgd import cloud, ours
from bpt_dist.commands.bench.timing import Clock, Spread, Timing, alternate, speedup, spread
from bpt_dist.commands.bench.workload import SOURCE_TASKS, TARGET_TASKS, Work, make_work
from bpt_dist.training.microbatches import MicroBatchLimits, assign

RANKS, NUM_PROMPT = 8, 100
Run = Callable[[], Any]


def run_passes(shape: T5Shape, work: Work, clock: Clock, repeats: int, tell: Tell, *, allocator: bool = True) -> dict[str, Any]:
    """Measure every pair, alternating before and after. The allocator comes first: it is measured in fresh processes."""
    import_peft()
    kinds = ["fp32", "bf16"] if has_bf16(clock.device) else ["fp32"]
    rows = []
    if allocator and clock.device.type == "cpu":
        tell("allocator off and on, in fresh processes")
        gain = allocator_gain(shape, work, clock, repeats)
        rows.append(_row("allocator keeps its pages (own pass, fp32)", "1.09-1.34", gain, True))
    machine.keep_pages()
    clock.use_threads()
    models = Models(shape, clock.device, work.prompts.shape[1])
    for pair in pairs(models, work, kinds):
        tell(pair.change)
        both = {"before": pair.before, "after": pair.after}
        for run in both.values():
            run()  # warm-up
        times = alternate(both, clock, repeats)
        rows.append(_row(pair.change, pair.predicted, speedup(times["before"], times["after"]), pair.pays))
    notes = [] if "bf16" in kinds else ["no bf16: this device has no instructions for it, so those rows are left out"]
    rows.append(_row(f"cells dealt by tokens instead of particles, M = 5 on {RANKS} ranks (computed)", "1.56", cells_gain(), True))
    return {"rows": rows, "repeats": repeats, "notes": notes}


def markdown(report: dict[str, Any]) -> str:
    """Return both tables in the form of docs/performance.md."""
    lines = []
    for pays, title in ((True, "change"), (False, "what did not pay")):
        lines += [f"| {title} | predicted | measured |", "|---|--:|--:|"]
        for row in report["rows"]:
            if row["pays"] == pays:
                measured = "its process was killed" if row["measured"] is None else f"×{Spread(**row['measured'])}"
                lines.append(f"| {row['change']} | ×{row['predicted']} | {measured} |")
        lines.append("")
    return "\n".join(lines)


class Pair(NamedTuple):
    """One change: the step `before` and `after` it, and the gain that was predicted before it was built."""

    change: str
    predicted: str
    before: Run
    after: Run
    pays: bool = True


def pairs(models: Models, work: Work, kinds: Sequence[str]) -> Iterator[Pair]:
    """Yield the changes in the order in which they were added, then those that did not pay, for the dtypes in `kinds`."""
    backbone = models.backbone("fp32")
    peft = partial(with_attention, models, "fp32", "sdpa", lambda: models.peft("fp32").gradients(work))
    by_length = partial(grouped, models, work, "fp32", "sdpa")
    own = partial(packed, models, work, "fp32")
    keys = pass_with_keys(backbone)
    with_keys = partial(correctness.packed, backbone, keys, work)
    yield Pair("weights frozen", "1.47", partial(trainable, models, work), partial(stock_loop, models, work))
    yield Pair("eval mode (no dropout)", "1.30", partial(dropout, models, work), peft)
    yield Pair("no padding: texts of one length together", "1.86", peft, by_length)
    if "bf16" in kinds:
        plain, fused = (partial(grouped, models, work, "bf16", kind) for kind in ("eager", "sdpa"))
        yield Pair("attention by plain products in bf16 (CPU)", "1.18", fused, plain)
    yield Pair("attention by the fused kernel in fp32", "1.04-1.07", partial(grouped, models, work, "fp32", "eager"), by_length)
    yield Pair("own pass (joined projections, no masks, kept bias)", "1.00-1.05 on a CPU", by_length, with_keys)
    yield Pair("cross-attention without keys and values", "1.13", with_keys, own)
    if "bf16" in kinds:
        yield Pair("bf16 weights and activations", "1.9-2.0", own, partial(packed, models, work, "bf16"))
    yield from _rows_pairs(models, work)
    yield from _svgd_pairs(work)
    yield Pair("one padded batch of all particles", "1.00", peft, partial(padded, models, work), pays=False)
    yield Pair("activation checkpointing", "0.67", by_length, partial(checkpointed, models, work), pays=False)


def _rows_pairs(models: Models, work: Work) -> Iterator[Pair]:
    lengths = [*TARGET_TASKS["mrpc"], *TARGET_TASKS["mrpc"]]
    rows = make_work(models.shape, 1, lengths, work.prompts.shape[1]).to(models.device)
    words = evaluation.label_words(evaluation.LABEL_TOKENS["mrpc"], models.shape.config.vocab_size, 0).to(models.device)
    generate = partial(evaluation.generate, models, rows, "fp32", evaluation.NUM_TOKENS)
    shared = partial(evaluation.rank, models, rows, words, "fp32", stock=True)
    full = partial(evaluation.rank_by_full_passes, models, rows, words, "fp32")
    yield Pair("labels ranked after one encoder pass (against generate)", "1.33", generate, shared)
    own = partial(evaluation.rank, models, rows, words, "fp32", stock=False)
    yield Pair("all labels in one decoder pass, own pass", "1.1-1.2", shared, own)
    yield Pair("labels ranked by one whole pass each (against generate)", "0.44", generate, full, pays=False)


def _svgd_pairs(work: Work) -> Iterator[Pair]:
    size = work.prompts[0].numel()
    for num_particles, of_naive, of_pyro in ((5, "2.6", "20"), (64, "45", "45 and more")):
        particles, score = cloud(num_particles, size, 0, work.prompts.device)
        mine = partial(ours, particles, score)
        before = partial(naive, particles, score)
        yield Pair(f"SVGD without an M x M x PD tensor, M = {num_particles}, against naive", of_naive, before, mine)
        before = partial(pyro_style, particles, score)
        yield Pair(f"the same against a Pyro-style kernel, M = {num_particles}", of_pyro, before, mine)


def cells_gain() -> Spread:
    """Return how many times longer the busiest of RANKS ranks works with whole particles than with an equal share of cells."""
    tokens = [source + target + NUM_PROMPT for source, target in SOURCE_TASKS.values()]
    ranks = assign(tokens, 5, RANKS, MicroBatchLimits())
    busiest = max(sum(len(range(*some.indices(5))) * tokens[text] for some, texts in rank for text in texts) for rank in ranks)
    return spread([sum(tokens) / busiest])


def allocator_gain(shape: T5Shape, work: Work, clock: Clock, repeats: int) -> Spread | None:
    """Return the gain of our pass from keeping pages, measured in alternating fresh processes because mallopt cannot be undone."""
    times: dict[bool, list[Timing]] = {False: [], True: []}

    def once(kept: bool) -> list[float]:
        if kept:
            machine.keep_pages()
        models = Models(shape, clock.device, work.prompts.shape[1])
        run = partial(packed, models, work, "fp32")
        run()
        return list(clock.time(run))

    for number in range(repeats):
        for kept in (False, True) if number % 2 == 0 else (True, False):
            answer = in_fresh_process(partial(once, kept), clock.num_threads)
            if answer is None:
                return None
            times[kept].append(Timing(*answer[0]))
    return speedup(times[False], times[True])


def _row(change: str, predicted: str, gain: Spread | None, pays: bool) -> dict[str, Any]:
    return {"change": change, "predicted": predicted, "measured": gain and gain.to_json(), "pays": pays}


def stock_loop(models: Models, work: Work) -> Gradients:
    """Run the padded loop over particles through the stock T5."""
    return correctness.padded_by_particle(models.stock("fp32", "sdpa"), work)


def grouped(models: Models, work: Work, dtype: str, kind: str) -> Gradients:
    """Run rows of one length together through the stock T5."""
    return correctness.grouped(models.stock(dtype, kind), work)


def padded(models: Models, work: Work) -> Gradients:
    """Run all rows in one padded batch through the stock T5."""
    return correctness.padded(models.stock("fp32", "sdpa"), work)


def packed(models: Models, work: Work, dtype: str) -> Gradients:
    """Run our pass."""
    return correctness.packed(models.backbone(dtype), models.packed(dtype), work)


def dropout(models: Models, work: Work) -> Gradients:
    """Run PEFT's loop in train mode."""
    models.stock("fp32", "sdpa")
    return models.peft("fp32").gradients(work, dropout=True)


def trainable(models: Models, work: Work) -> Gradients:
    """Run the padded loop with a gradient for every weight, as without freezing the T5."""
    model: nn.Module = models.stock("fp32", "sdpa").model
    model.requires_grad_(True)
    try:
        return stock_loop(models, work)
    finally:
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None


def checkpointed(models: Models, work: Work) -> Gradients:
    """Run rows of one length together, recomputing every block in the backward pass."""
    with recomputing(models.stock("fp32", "sdpa")):
        return grouped(models, work, "fp32", "sdpa")


def with_attention(models: Models, dtype: str, kind: str, run: Callable[[], Gradients]) -> Gradients:
    """Run with the stock modules set to a kind of attention."""
    models.stock(dtype, kind)
    return run()


@contextmanager
def recomputing(backbone: T5Backbone) -> Iterator[None]:
    """Make every block of the stock T5 keep only its input, as `distribution.activation_checkpointing` does."""
    original: dict[nn.Module, Callable[..., object]] = {}
    for block in backbone.blocks:
        original[block] = block.forward
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in original.items():
            block.forward = forward


def pass_with_keys(backbone: T5Backbone) -> PackedT5:
    """Return our pass over these weights, with keys and values in cross-attention."""
    kind = default_attention(backbone.device, backbone.dtype)
    ours = PackedT5(backbone.model, ATTENTIONS[kind], backbone)
    ours.decoder = DecoderWithKeys(backbone.model.decoder, plain_attention, backbone.changes)
    return ours


class DecoderWithKeys(Decoder):
    """The decoder with a key and a value of every encoder token in each block."""

    def makes_keys(self, _rows: Rows) -> bool:
        """Return that it makes them always."""
        return True
