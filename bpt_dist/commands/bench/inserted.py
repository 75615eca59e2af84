"""`bench inserted`: the step of methods that insert something into a T5, on the texts of a source step, without a prompt.

Transformers' modules, padded, are what is compared with: it is how PEFT would run them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.insertion import Change, Site, each_token
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.source import Models
from bpt_dist.commands.bench.source_report import ratio_cell
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, alternate, speedup
from bpt_dist.commands.bench.workload import SOURCE_TASKS, Work, make_work

HEADER = ("step", "variant", "dtype", "s/step", "padding", "x one padded batch")
RANK, BOTTLENECK = 8, 64
# Log-likelihoods and gradients may differ from those of transformers' modules text by text by so much of the largest of them, or by
# so many times what padding changes by rounding: random weights make some gradients depend on it.
CLOSE, ROUNDING = 1e-4, 3
Gradients = tuple[Tensor, Tensor]


def low_rank(backbone: Backbone) -> list[Tensor]:
    """Insert low-rank changes of queries and values, away from their start, and return what is trained."""
    trained: list[Tensor] = []

    def pair(place: Site) -> Change:
        layer: Any = place.module
        a, b = _drawn(trained, backbone, (RANK, layer.in_features), (layer.out_features, RANK))
        return each_token(lambda x, y: y + functional.linear(functional.linear(x.float(), a), b).to(y.dtype))

    backbone.wrap_linear(pair, ("q", "v"))
    return trained


def bottlenecks(backbone: Backbone) -> list[Tensor]:
    """Insert adapters behind self-attention and feed-forward layers, away from their start, and return what is trained."""
    trained: list[Tensor] = []

    def adapter(_place: Site) -> Change:
        down, up = _drawn(trained, backbone, (BOTTLENECK, backbone.width), (backbone.width, BOTTLENECK))
        return each_token(lambda _x, y: y + functional.linear(functional.linear(y.float(), down).relu(), up).to(y.dtype))

    backbone.wrap_sublayer(adapter, ("self_attention", "feed_forward"))
    return trained


def _drawn(trained: list[Tensor], backbone: Backbone, *sizes: tuple[int, int]) -> list[Tensor]:
    """Return random matrices of modest size that are trained, and add them to the list."""
    drawn = [(torch.randn(*size, device=backbone.device) / 10 / max(size) ** 0.5).requires_grad_() for size in sizes]
    trained += drawn
    return drawn


METHODS: Mapping[str, Callable[[Backbone], list[Tensor]]] = {
    f"LoRA, rank {RANK}, q and v": low_rank, f"adapters, width {BOTTLENECK}": bottlenecks,
}  # fmt: skip


def inserted_gradients(backbone: Backbone, texts: Any, trained: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> Gradients:
    """Return log-likelihoods [1, N] of texts without a prompt, and the gradients of what is inserted, one behind the other.

    The texts of each part are read in one pass, by whichever pass the backbone uses.
    """
    found = torch.zeros(1, len(texts), device=backbone.device)
    for tensor in trained:
        tensor.grad = None
    for part in parts:
        forward = backbone.log_likelihood(texts.select(part), lambda embeds: embeds[None], "token_mean")
        forward.log_likelihood.sum().backward()
        found[:, list(part)] = forward.log_likelihood.detach()
    return found, torch.cat([tensor.grad.flatten() for tensor in trained if tensor.grad is not None])


def distance(found: Gradients, reference: Gradients) -> float:
    """Return the largest difference of log-likelihoods or of gradients, against the largest number of the reference."""
    pairs = zip(found, reference, strict=True)
    return max(float((own - other).abs().max() / other.abs().max()) for own, other in pairs)


def run_inserted(shape: T5Shape, clock: Clock, options: Options, _num_prompt: int, tell: Tell) -> dict[str, Any]:
    """Return times and ratios of each method, and how far its results are from those of transformers' modules."""
    clock.use_threads()
    models = Models(shape, clock.device, 1, options.seed)
    work = make_work(shape, 1, list(SOURCE_TASKS.values()), 1, options.seed).to(clock.device)
    found = {}
    for title, insert in METHODS.items():
        trained = insert(models.backbone("fp32"))
        try:
            found[title] = _one_method(models, work, trained, clock, options, lambda text, title=title: tell(f"{title}: {text}"))  # type: ignore[misc]
        finally:
            models.backbone("fp32").detach()
    return {"methods": found, "notes": [f"six texts, {int(work.texts.source_mask.sum()):,} encoder tokens, no prompt"]}


def _one_method(
    models: Models, work: Work, trained: Sequence[Tensor], clock: Clock, options: Options, tell: Tell
) -> dict[str, Any]:
    together, alone = [list(range(len(work.texts)))], [[text] for text in range(len(work.texts))]

    def run(parts: Sequence[Sequence[int]], *, ours: bool) -> Gradients:
        backbone = models.stock("fp32", "sdpa")
        backbone.packed = models.packed("fp32") if ours else None
        try:
            return inserted_gradients(backbone, work.texts, trained, parts)
        finally:
            backbone.packed = None

    runs = {
        "one padded batch, stock T5": partial(run, together, ours=False),
        "text by text, stock T5": partial(run, alone, ours=False),
        "ours, packed": partial(run, together, ours=True),
    }
    results = {name: one() for name, one in runs.items()}  # warm-up
    first, exact, _ = runs
    differences = {name: distance(result, results[exact]) for name, result in results.items()}
    most = max(CLOSE, ROUNDING * differences[first])
    times = alternate(runs, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell)
    longest = work.texts.source_ids.shape[1] * len(work.texts)
    padding = {first: 1 - int(work.texts.source_mask.sum()) / longest}
    return {
        name: {"seconds": statistics.median(time.seconds for time in times[name]), "padding": padding.get(name, 0.0),
               "ratio": speedup(times[first], times[name]).to_json(), "difference": differences[name],
               "right": differences[name] <= most}
        for name in runs
    }  # fmt: skip


def inserted_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    return [
        (title, name, "fp32", f"{row['seconds']:.3g}", f"{row['padding']:.0%}", ratio_cell(row["ratio"]))
        for title, method in report["methods"].items() for name, row in method.items()
    ]  # fmt: skip


def wrong_steps(report: dict[str, Any]) -> list[str]:
    """Return the steps whose results are too far from those of transformers' modules."""
    return [
        f"wrong result: {title}: {name}" for title, method in report["methods"].items()
        for name, row in method.items() if not row["right"]
    ]  # fmt: skip
