"""Predict the rows of a split and score them: every rank takes its share, every rank knows the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bpt_dist.config import EvaluationConfig
from bpt_dist.data.batches import Batch, collate
from bpt_dist.data.columns import lengths_of
from bpt_dist.data.prepare import TaskData
from bpt_dist.data.tokens import TokenisedTask
from bpt_dist.distributed.mesh import World
from bpt_dist.methods.base import Method
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.tasks import metrics
from bpt_dist.tasks.spec import CLOSED
from bpt_dist.training.out_of_memory import explain_out_of_memory


@dataclass(frozen=True)
class Evaluated:
    """The metrics of one task and split, in percent but for `nll` (nats), and what was predicted for each row.

    `prediction_agreement`, where candidates are ranked by several hypotheses, is the share of (row, pair of hypotheses) in which
    both predict the same label; a row's own share is its `agreement`, 0 to 1.
    """

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]
    decode: str


def evaluate(
    method: Method,
    tasks: Sequence[TaskData],
    index: int,
    split: str,
    predict: str,
    settings: EvaluationConfig,
    world: World,
    heartbeat: Callable[[str], None],
) -> Evaluated:
    """Score `method` on one of the stage's `tasks` (collective: every rank).

    Ranks take rows in turns from the longest down and make the same number of passes, because a partitioned backbone is gathered in
    every one of them; what pads the last pass is dropped.
    """
    task = tasks[index]
    decode = task.spec.decoding(task.protocol, settings.decode)
    tokens = task.splits[split].tokens
    order = np.argsort(-lengths_of(tokens.source_ids), kind="stable").tolist()
    own = order[world.rank :: world.size]
    num_passes = -(-len(order[:: world.size]) // settings.batch_size)
    predictions: list[tuple[int, dict[str, Any]]] = []
    with torch.no_grad():
        for rows in _passes(own, num_passes, settings.batch_size):
            heartbeat(f"evaluation of {task.spec.name}")
            fault_point("eval.batch", task=task.spec.name)
            picks = [(index, row) for row in rows or [0]]
            batch = collate([each.splits[split].tokens for each in tasks], picks, [1.0] * len(picks), step=0)
            shape = f"{len(picks)} text(s) of {batch.source_ids.shape[1]} tokens"
            with explain_out_of_memory(world, f"the evaluation of {task.spec.name}", shape, "lower evaluation.batch_size"):
                # A list: also the pass that only keeps a partitioned backbone in step, whose rows are none, has to run.
                predicted = list(_predict(method, task, tokens, batch, decode, predict, settings))
            predictions += zip(rows, predicted, strict=False)
    gathered = dict(pair for share in world.gather_objects(predictions) for pair in share)
    return _score(task, split, [gathered[row] for row in range(len(tokens))], decode)


def choose_particle(
    method: Method,
    tasks: Sequence[TaskData],
    index: int,
    settings: EvaluationConfig,
    world: World,
    heartbeat: Callable[[str], None],
) -> int:
    """Let `best` predict a target with the adapted particle of the best validation score; return it (collective: every rank).

    Equal scores keep the earlier particle.
    """
    scores = []
    for particle in range(method.num_adapted):
        method.predict_with(index, particle)
        scored = evaluate(method, tasks, index, "validation", "best", settings, world, heartbeat)
        scores.append(scored.metrics[tasks[index].spec.headline])
    chosen = max(range(len(scores)), key=scores.__getitem__)
    method.predict_with(index, chosen)
    return chosen


def _passes(rows: Sequence[int], num_passes: int, size: int) -> Iterator[list[int]]:
    for number in range(num_passes):
        yield list(rows[number * size : (number + 1) * size])


def _predict(
    method: Method, task: TaskData, tokens: TokenisedTask, batch: Batch, decode: str, predict: str, settings: EvaluationConfig
) -> Iterator[dict[str, Any]]:
    """Yield the prediction of each row of the batch."""
    if decode == "generate":
        limit = settings.max_new_tokens or _longest_answer(task, tokens)
        texts = method.generate(batch, limit, predict)
        yield from ({"prediction": text.strip()} for text in texts)
        return
    words = task.spec.words(task.protocol)
    log_likelihood = method.rank(batch, _padded(tokens.label_ids), predict)
    # Probabilities are averaged, not their logarithms: the predictive distribution of the ensemble.
    probabilities = log_likelihood.double().softmax(dim=-1).mean(dim=0)
    agreement = pair_agreement(log_likelihood).tolist() if len(log_likelihood) > 1 else []
    for number, row in enumerate(probabilities.cpu().numpy()):
        shared = {"agreement": agreement[number]} if agreement else {}
        yield {"prediction": words[int(row.argmax())], "probabilities": [float(p) for p in row], **shared}


def pair_agreement(log_likelihood: Float[Tensor, "m N C"]) -> Float[Tensor, " N"]:
    """Return for each text the share, 0 to 1, of the pairs of its m > 1 hypotheses whose likeliest candidate is the same."""
    num_hypotheses, _, num_candidates = log_likelihood.shape
    votes = functional.one_hot(log_likelihood.argmax(dim=-1), num_candidates).sum(dim=0).double()
    return (votes * (votes - 1)).sum(dim=-1) / (num_hypotheses * (num_hypotheses - 1))


def _longest_answer(task: TaskData, tokens: TokenisedTask) -> int:
    closed = max((len(ids) for ids in tokens.label_ids), default=0)
    return closed or task.spec.max_target_length


def _padded(label_ids: Sequence[np.ndarray]) -> Tensor:
    longest = max(len(ids) for ids in label_ids)
    padded = torch.full((len(label_ids), longest), -100, dtype=torch.long)
    for row, ids in enumerate(label_ids):
        padded[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    return padded


def _score(task: TaskData, split: str, predicted: list[dict[str, Any]], decode: str) -> Evaluated:
    examples = tuple(task.splits[split].examples)  # each metric goes through them
    texts = [entry["prediction"] for entry in predicted]
    values = metrics.compute(task.spec.metrics, texts, examples, task.spec, task.protocol)
    if decode == "rank" and task.spec.kind in CLOSED:
        values |= _of_probabilities(task, predicted, examples)
    shares = [entry["agreement"] for entry in predicted if "agreement" in entry]
    if shares:
        values["prediction_agreement"] = 100 * math.fsum(shares) / len(shares)
    predictions = [
        {
            "row_id": example.row_id,
            "target": example.target,
            "correct": metrics.correct(entry["prediction"], example, task.spec),
            **entry,
        }
        for example, entry in zip(examples, predicted, strict=True)
    ]
    return Evaluated(values, predictions, decode)


def _of_probabilities(task: TaskData, predicted: list[dict[str, Any]], examples: Sequence[Any]) -> dict[str, float]:
    """Return the mean negative log-likelihood of the right label (nats) and the calibration error (percent)."""
    words = task.spec.words(task.protocol)
    probabilities = np.array([entry["probabilities"] for entry in predicted])
    labels = np.array([words.index(example.target) for example in examples])
    # A probability may round to 0; JSON has no infinity.
    nll = metrics.negative_log_likelihood(np.maximum(probabilities, np.finfo(np.float64).tiny), labels)
    return {"nll": nll, "calibration_error": metrics.calibration_error(probabilities, labels)}
