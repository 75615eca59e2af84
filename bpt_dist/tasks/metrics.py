"""Scores of predictions, all in percent (0 to 100; correlations and Matthews from -100), averaged over examples.

A prediction that is no label word counts as wrong. For F1 it counts as the other class (the published rule); for
Matthews and macro-F1 as a class of its own. A score that cannot be read is -1, as published. A correlation of a
constant is undefined: it is reported as 0, as published, with a warning. Tasks are known by the protocols below alone.
"""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

log = logging.getLogger(__name__)
Wording = Literal["fixed", "attempt"]
INVALID = -1
NUM_BINS = 10
Groups = Sequence[str | None]
ClassMetric = Callable[[np.ndarray, np.ndarray, int, Groups], float]


@runtime_checkable
class Judged(Protocol):
    """What a metric needs of an example: the right class or score, or every right answer, and its group."""

    @property
    def target(self) -> str:
        """Return the right text."""
        ...

    @property
    def label(self) -> int | float | None:
        """Return the class index or score, None for free text."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Return every right answer of a free text."""
        ...

    @property
    def group(self) -> str | None:
        """Return the question that several examples belong to."""
        ...


@runtime_checkable
class Scored(Protocol):
    """What a metric needs of a task."""

    @property
    def kind(self) -> str:
        """Return classification, choice, regression or text."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics to report, the headline first."""
        ...

    def words(self, protocol: Wording) -> tuple[str, ...]:
        """Return the closed set of target texts by class, empty for free text."""
        ...


def compute(
    names: Sequence[str], predictions: Sequence[str], examples: Sequence[Judged], spec: Scored, protocol: Wording = "fixed"
) -> dict[str, float]:
    """Return the named metrics of predicted texts in percent; texts are stripped and compared exactly."""
    if not examples or len(predictions) != len(examples):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    texts = [prediction.strip() for prediction in predictions]
    if spec.kind == "text":
        answers = [example.references or (example.target,) for example in examples]
        return {name: 100 * TEXT_METRICS[name](texts, answers) for name in names}
    if spec.kind == "regression":
        scores = np.array([parse_score(text) for text in texts])
        right = np.array([parse_score(example.target) for example in examples])
        return {name: 100 * _correlation(name, scores, right) for name in names}
    words = spec.words(protocol)
    predicted = np.array([words.index(text) if text in words else INVALID for text in texts])
    labels = np.array([example.label for example in examples], dtype=np.int64)
    groups = [example.group for example in examples]
    return {name: 100 * CLASS_METRICS[name](predicted, labels, len(words), groups) for name in names}


def majority(spec: Scored, evaluation: Sequence[Judged], protocol: Wording = "fixed") -> dict[str, float]:
    """Return the metrics of always giving the most frequent target of the evaluated rows (of equals, the first in the alphabet).

    For accuracy it is the share of the most common class: no constant answer scores higher. Training rows do not enter: a few-shot
    draw has as many of each class, and differs from seed to seed.
    """
    counts = Counter(example.target for example in evaluation)
    constant = min(counts, key=lambda target: (-counts[target], target))
    return compute(spec.metrics, [constant] * len(evaluation), evaluation, spec, protocol)


def correct(prediction: str, example: Judged, spec: Scored) -> bool:
    """Return whether one prediction is right: the target itself, or for free text any answer after normalisation."""
    if spec.kind != "text":
        return prediction.strip() == example.target
    return exact_match(prediction, example.references or (example.target,)) == 1.0


def parse_score(text: str) -> float:
    """Return the number a text states, or -1 (below every scale of ours) if it states no finite one."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if np.isfinite(value) else -1.0


def normalise(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the normalised prediction equals any normalised answer, else 0.0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the largest F1 of shared words over the answers, 0 to 1."""
    return max(_overlap(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _overlap(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    shared = sum((Counter(predicted) & Counter(right)).values())
    return 2 * shared / (len(predicted) + len(right))


def _mean_of(score: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str], Sequence[Sequence[str]]], float]:
    def mean(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
        return float(np.mean([score(text, right) for text, right in zip(texts, answers, strict=True)]))

    return mean


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "accuracy": _mean_of(lambda text, answers: float(text in answers)),
    "squad_em": _mean_of(exact_match),
    "squad_f1": _mean_of(token_f1),
    "record_em": _mean_of(exact_match),
    "record_f1": _mean_of(token_f1),
}


def _accuracy(predicted: np.ndarray, labels: np.ndarray, num_classes: int, groups: Groups) -> float:
    return float(np.mean(predicted == labels))


def _f1(predicted: np.ndarray, labels: np.ndarray, num_classes: int, groups: Groups) -> float:
    from sklearn.metrics import f1_score

    opposite = np.where(predicted == INVALID, 1 - labels, predicted)
    return float(f1_score(labels, opposite, zero_division=0.0))


def _macro_f1(predicted: np.ndarray, labels: np.ndarray, num_classes: int, groups: Groups) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, labels=range(num_classes), average="macro", zero_division=0.0))


def _matthews(predicted: np.ndarray, labels: np.ndarray, num_classes: int, groups: Groups) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single class is the undefined case that is 0 by convention
        return float(matthews_corrcoef(labels, predicted))


def _group_exact_match(predicted: np.ndarray, labels: np.ndarray, num_classes: int, groups: Groups) -> float:
    right: dict[str | None, bool] = defaultdict(lambda: True)
    for group, is_right in zip(groups, predicted == labels, strict=True):
        right[group] &= bool(is_right)
    return float(np.mean(list(right.values())))


CLASS_METRICS: dict[str, ClassMetric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "multirc_f1a": _f1,
    "multirc_em": _group_exact_match,
}


def _correlation(name: str, scores: np.ndarray, right: np.ndarray) -> float:
    from scipy import stats

    if np.ptp(scores) == 0 or np.ptp(right) == 0:
        log.warning("%s is undefined because every score is the same; 0 is reported", name)
        return 0.0
    return float({"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](scores, right).statistic)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error in percent: |accuracy − confidence| over 10 equal bins, by their share.

    `probabilities` [N, C] over label words, `labels` [N] class indices; confidence is the largest probability, bins
    are [0, 0.1), …, [0.9, 1.0]. Guo et al. (2017), eq. 3.
    """
    probabilities, labels = _distribution(probabilities, labels)
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    bins = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(NUM_BINS)]
    return 100 * float(np.sum(gaps)) / len(labels)


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of −log p(right class) in nats; infinite if a right class has probability 0."""
    probabilities, labels = _distribution(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def _distribution(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities = np.asarray(probabilities, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.int64)
    if not len(labels) or probabilities.shape[:-1] != labels.shape:
        raise ValueError(f"probabilities {probabilities.shape} for {labels.shape} labels; [N, C] and [N] are needed")
    if not np.allclose(probabilities.sum(1), 1.0, atol=1e-4):
        raise ValueError("each row of probabilities must sum to 1")
    return probabilities, labels
