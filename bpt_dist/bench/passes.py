"""Before and after of each optimisation, each measured against the step before it, and of what did not pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from bpt_dist.backbone_shapes import T5Shape
from bpt_dist.bench import evaluation, gradients, machine
from bpt_dist.bench import passes_ways as ways
from bpt_dist.bench.fresh import in_fresh_process
from bpt_dist.bench.machine import has_bf16
from bpt_dist.bench.paired import Clock, Spread, Timing, alternate, speedup, spread
from bpt_dist.bench.passes_keys import pass_with_keys
from bpt_dist.bench.peft_loop import import_peft
from bpt_dist.bench.source import Models
from bpt_dist.bench.source_run import Tell
from bpt_dist.bench.svgd import cloud, ours
from bpt_dist.bench.svgd_peers import naive, pyro_style
from bpt_dist.bench.work import SOURCE_TASKS, TARGET_TASKS, Work, make_work
from bpt_dist.passes import Passes, divide

RANKS, NUM_PROMPT = 8, 100
Run = Callable[[], Any]


class Pair(NamedTuple):
    """One change: what is run `before` and `after` it, and the gain that was predicted before any of it was built."""

    change: str
    predicted: str
    before: Run
    after: Run
    pays: bool = True


def pairs(models: Models, work: Work, kinds: Sequence[str]) -> Iterator[Pair]:
    """Yield the changes in the order in which they add up, and then those that did not pay, for the dtypes in `kinds`."""
    backbone = models.backbone("fp32")
    peft = partial(ways.with_attention, models, "fp32", "sdpa", lambda: models.peft("fp32").gradients(work))
    grouped = partial(ways.grouped, models, work, "fp32", "sdpa")
    packed = partial(ways.packed, models, work, "fp32")
    keys = pass_with_keys(backbone)
    with_keys = partial(gradients.packed, backbone, keys, work)
    yield Pair("weights frozen", "1.47", partial(ways.trainable, models, work), partial(ways.stock_loop, models, work))
    yield Pair("eval mode (no dropout)", "1.30", partial(ways.dropout, models, work), peft)
    yield Pair("no padding: texts of one length together", "1.86", peft, grouped)
    if "bf16" in kinds:
        plain, fused = (partial(ways.grouped, models, work, "bf16", kind) for kind in ("eager", "sdpa"))
        yield Pair("attention by plain products in bf16 (CPU)", "1.18", fused, plain)
    yield Pair("attention by the fused kernel in fp32", "1.04-1.07", partial(ways.grouped, models, work, "fp32", "eager"), grouped)
    yield Pair("own pass (joined projections, no masks, kept bias)", "1.00-1.05 on a CPU", grouped, with_keys)
    yield Pair("cross-attention without keys and values", "1.13", with_keys, packed)
    if "bf16" in kinds:
        yield Pair("bf16 weights and activations", "1.9-2.0", packed, partial(ways.packed, models, work, "bf16"))
    yield from _rows_pairs(models, work)
    yield from _svgd_pairs(work)
    yield Pair("one padded batch of all particles", "1.00", peft, partial(ways.padded, models, work), pays=False)
    yield Pair("activation checkpointing", "0.67", grouped, partial(ways.checkpointed, models, work), pays=False)


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


def run_passes(shape: T5Shape, work: Work, clock: Clock, repeats: int, tell: Tell, *, allocator: bool = True) -> dict[str, Any]:
    """Measure every pair, alternating before and after; the allocator's in fresh processes, so it comes first."""
    import_peft()
    kinds = ["fp32", "bf16"] if has_bf16(clock.device) else ["fp32"]
    rows = []
    if allocator and clock.device.type == "cpu":
        tell("allocator off and on, in fresh processes")
        found = allocator_gain(shape, work, clock, repeats)
        rows.append(_row("allocator keeps its pages (own pass, fp32)", "1.09-1.34", found, True))
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


def cells_gain() -> Spread:
    """Return how much longer the busiest of RANKS ranks works when each takes whole particles instead of its share of cells."""
    tokens = [source + target + NUM_PROMPT for source, target in SOURCE_TASKS.values()]
    ranks = divide(tokens, 5, RANKS, Passes())
    busiest = max(sum(len(range(*some.indices(5))) * tokens[text] for some, texts in rank for text in texts) for rank in ranks)
    return spread([sum(tokens) / busiest])


def _row(change: str, predicted: str, gain: Spread | None, pays: bool) -> dict[str, Any]:
    return {"change": change, "predicted": predicted, "measured": gain and gain.to_json(), "pays": pays}


def allocator_gain(shape: T5Shape, work: Work, clock: Clock, repeats: int) -> Spread | None:
    """Return what keeping pages gains our pass: in fresh processes, in turns, for mallopt cannot be taken back."""
    times: dict[bool, list[Timing]] = {False: [], True: []}

    def once(kept: bool) -> list[float]:
        if kept:
            machine.keep_pages()
        models = Models(shape, clock.device, work.prompts.shape[1])
        run = partial(ways.packed, models, work, "fp32")
        run()
        return list(clock.time(run))

    for number in range(repeats):
        for kept in (False, True) if number % 2 == 0 else (True, False):
            answer = in_fresh_process(partial(once, kept), clock.num_threads)
            if answer is None:
                return None
            times[kept].append(Timing(*answer[0]))
    return speedup(times[False], times[True])


def markdown(report: dict[str, Any]) -> str:
    """Return both tables, as docs/performance.md holds them."""
    lines = []
    for pays, title in ((True, "change"), (False, "what did not pay")):
        lines += [f"| {title} | predicted | measured |", "|---|--:|--:|"]
        for row in report["rows"]:
            if row["pays"] == pays:
                measured = "its process was ended" if row["measured"] is None else f"×{Spread(**row['measured'])}"
                lines.append(f"| {row['change']} | ×{row['predicted']} | {measured} |")
        lines.append("")
    return "\n".join(lines)
