"""Where a target stage starts, if the method leaves a choice: from the candidate with the lowest loss on the training rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from jaxtyping import Float
from torch import Tensor

from bpt_dist.data.batches import Batch, collate
from bpt_dist.data.prepare import TaskData
from bpt_dist.training.comparison import losses_of_prompts
from bpt_dist.training.microbatches import MicroBatch, MicroBatchLimits, tokens_a_pass
from bpt_dist.training.out_of_memory import explain_out_of_memory
from bpt_dist.training.run import TrainingRun

log = logging.getLogger(__name__)
MOST_ROWS = 1024  # training rows of a target that candidates are compared on, evenly spread where there are more


def choose_start(run: TrainingRun, tasks: Sequence[TaskData]) -> None:
    """Let the method start from its best candidate, where it names candidates (collective: every rank).

    Training rows and not validation rows: the selection of a step uses those, and a reported validation score must not have been
    searched twice. The choice is kept in run.json, so that a resumed run says what it started from.
    """
    candidates = run.method.candidate_starts()
    if candidates is None:
        return
    name = run.stage_name(tasks)
    key = f"start of {name}"
    chosen = run.world.broadcast(run.directory.choice(key) if run.world.rank == 0 else None)
    if chosen is None:
        losses = _losses(run, tasks, candidates)
        best = min(range(len(losses)), key=lambda index: math.inf if math.isnan(losses[index]) else losses[index])
        chosen = run.world.broadcast(str(best))
        if run.world.rank == 0:
            run.directory.record_choice(key, chosen)
            listed = ", ".join(f"{loss:.4f}" for loss in losses)
            log.info("%s starts from particle %s, whose loss on the training rows is the lowest of %s", name, chosen, listed)
    run.method.start_from(int(chosen))


def _losses(run: TrainingRun, tasks: Sequence[TaskData], candidates: Float[Tensor, "m P D"]) -> list[float]:
    """Return the loss of each candidate: mean over the rows of a target, targets weighed as they are in the objective."""
    settings, backbone, world = run.config.target, run.backbone, run.world
    place = "the choice of the start"

    def limits(batch: Batch) -> MicroBatchLimits:
        overhead = backbone.padding_overhead(batch.target_ids.shape[1])
        num_added = 0 if backbone.reads_prompts_once else candidates.shape[1]
        return MicroBatchLimits(settings.pass_size, num_added, overhead, backbone.synced, tokens_a_pass(backbone.device.type))

    def around(unit: MicroBatch) -> AbstractContextManager[None]:
        run.heartbeat(place)
        shape = f"{len(unit.batch)} text(s) of {unit.batch.source_ids.shape[1]} tokens"
        return explain_out_of_memory(world, place, shape, "lower evaluation.batch_size or target.pass_size")

    batches = _batches(tasks, run.config.evaluation.batch_size * world.size)
    exact = run.config.distribution.exact
    by_candidate = losses_of_prompts(run.method, candidates, batches, limits, world, around, exact=exact)
    shares = run.method.target_shares or (1 / len(tasks),) * len(tasks)
    return [math.fsum(share * loss for share, loss in zip(shares, losses, strict=True)) for losses in by_candidate]


def _batches(tasks: Sequence[TaskData], size: int) -> Iterator[Batch]:
    """Yield the compared training rows of all `tasks`, `size` at a time."""
    tokens = [task.train.tokens for task in tasks]
    picks = [(index, row) for index, rows in enumerate(tokens) for row in spread(len(rows), MOST_ROWS)]
    for first in range(0, len(picks), size):
        some = picks[first : first + size]
        yield collate(tokens, some, [1.0] * len(some), step=0)


def spread(num_rows: int, most: int) -> list[int]:
    """Return all rows, or `most` of them that are evenly spread."""
    kept = min(num_rows, most)
    return [place * num_rows // kept for place in range(kept)]
