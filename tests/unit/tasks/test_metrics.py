"""Metrics against direct formulas and examples worked by hand; all in percent."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bpt_dist.tasks import metrics
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.spec import METRICS_OF_KIND, TaskSpec
from bpt_dist.tasks.text_to_text import Example

WORDS = {name: TASKS[name].label_words for name in ("mrpc", "cola", "cb", "multirc", "stsb")}


def classes(task: str, labels: Sequence[int], groups: Sequence[str] | None = None) -> list[Example]:
    names = groups or [None] * len(labels)
    return [Example("s", WORDS[task][label], str(i), int(label), (), names[i]) for i, label in enumerate(labels)]


def predicted(task: str, labels: Sequence[int]) -> list[str]:
    return [WORDS[task][label] if label >= 0 else "nonsense" for label in labels]


def compute(task: str, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    return metrics.compute(TASKS[task].metrics, predictions, examples, TASKS[task])


def table(predictions: np.ndarray, labels: np.ndarray) -> tuple[int, int, int, int]:
    pairs = [(1, 1), (1, 0), (0, 1), (0, 0)]
    return tuple(int(((predictions == p) & (labels == t)).sum()) for p, t in pairs)  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_f1_and_matthews_are_their_textbook_formulas(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, guesses = generator.integers(0, 2, 60), generator.integers(0, 2, 60)
    tp, fp, fn, tn = table(guesses, labels)
    values = compute("mrpc", predicted("mrpc", guesses), classes("mrpc", labels))
    assert values["accuracy"] == pytest.approx(100 * (tp + tn) / 60)
    assert values["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    values = compute("cola", predicted("cola", guesses), classes("cola", labels))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert list(values) == ["matthews", "accuracy"]
    assert values["matthews"] == pytest.approx(100 * (tp * tn - fp * fn) / root)


def test_an_invalid_prediction_is_wrong_for_accuracy_and_the_other_class_for_f1() -> None:
    examples = classes("mrpc", [1, 1, 0, 0])
    values = compute("mrpc", predicted("mrpc", [1, -1, -1, 0]), examples)
    assert values == {"accuracy": 50.0, "f1": pytest.approx(50.0)}  # as if [1, 0, 1, 0] had been predicted


def test_blanks_around_a_label_word_do_not_matter_but_case_does() -> None:
    examples = classes("mrpc", [1, 1])
    assert compute("mrpc", [" equivalent\n", "Equivalent"], examples)["accuracy"] == 50.0


def test_macro_f1_averages_over_all_classes_also_the_absent_one() -> None:
    # class 0: tp 2, fp 1, fn 0 -> 0.8; class 1: tp 1, fp 0, fn 1 -> 2/3; class 2 never occurs -> 0
    values = compute("cb", predicted("cb", [0, 0, 0, 1]), classes("cb", [0, 0, 1, 1]))
    assert values["macro_f1"] == pytest.approx(100 * (0.8 + 2 / 3 + 0) / 3)
    values = compute("cb", predicted("cb", [0, -1]), classes("cb", [0, 1]))
    assert values == {"accuracy": 50.0, "macro_f1": pytest.approx(100 / 3)}


def test_matthews_of_a_constant_is_zero() -> None:
    assert compute("cola", predicted("cola", [1, 1, 1]), classes("cola", [1, 0, 1]))["matthews"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_their_textbook_formulas(seed: int) -> None:
    generator = np.random.default_rng(seed)
    right, guessed = generator.choice(26, 40) / 5, generator.choice(26, 40) / 5
    examples = [Example("s", f"{score:.1f}", "", float(score)) for score in right]
    values = compute("stsb", [f"{score:.1f}" for score in guessed], examples)
    assert values["pearson"] == pytest.approx(100 * np.corrcoef(guessed, right)[0, 1])

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])

    assert values["spearman"] == pytest.approx(100 * np.corrcoef(ranks(guessed), ranks(right))[0, 1])


def test_scores_that_cannot_be_read_count_as_minus_one() -> None:
    texts = ("", "high", "nan", "inf", "-inf", "1,5", "3.8")
    assert [metrics.parse_score(text) for text in texts] == [-1.0] * 6 + [3.8]
    examples = [Example("s", text, "", float(text)) for text in ("0.0", "5.0", "2.0")]
    expected = np.corrcoef([-1.0, 5.0, 2.0], [0.0, 5.0, 2.0])[0, 1]
    assert compute("stsb", ["none", "5.0", "2.0"], examples)["pearson"] == pytest.approx(100 * expected)


def test_the_correlation_of_a_constant_is_zero_and_said(caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example("s", text, "", float(text)) for text in ("0.0", "5.0")]
    with caplog.at_level(logging.WARNING):
        assert compute("stsb", ["3.0", "3.0"], examples) == {"pearson": 0.0, "spearman": 0.0}
    assert "pearson is undefined because every score is the same; 0 is reported" in caplog.text


@pytest.mark.parametrize(
    ("guessed", "answers", "exact", "f1"),
    [
        ("The  Eiffel-Tower!", ["eiffeltower"], 1.0, 1.0),
        ("an apple a day", ["Apple day."], 1.0, 1.0),
        ("in the year 1900", ["1900"], 0.0, 0.5),  # shared 1 of 3 and 1: 2 * 1 / (3 + 1)
        ("red red blue", ["red blue blue"], 0.0, 2 / 3),  # words are counted: red 1, blue 1
        ("one", ["two", "one three", "ones"], 0.0, 2 / 3),  # the best of the answers
        ("", ["the"], 1.0, 1.0),  # both are nothing after normalisation
        ("", ["x"], 0.0, 0.0),
        ("Anna", ["anna"], 1.0, 1.0),  # articles are whole words only
    ],
)
def test_answers_are_compared_as_squad_does(guessed: str, answers: list[str], exact: float, f1: float) -> None:
    assert metrics.exact_match(guessed, answers) == exact
    assert metrics.token_f1(guessed, answers) == pytest.approx(f1)


def test_record_takes_the_best_answer_of_a_query_and_averages_over_queries() -> None:
    examples = [Example("s", "A B", "0", None, ("A B", "C")), Example("s", "D", "1", None, ("D",))]
    assert compute("record", ["C", "D E"], examples) == {"record_f1": pytest.approx(100 * (1 + 2 / 3) / 2), "record_em": 50.0}


def test_multirc_needs_every_answer_of_a_question() -> None:
    examples = classes("multirc", [1, 0, 1, 1, 0], groups=["q1", "q1", "q2", "q2", "q3"])
    values = compute("multirc", predicted("multirc", [1, 0, 1, 0, 0]), examples)
    assert values["multirc_em"] == pytest.approx(100 * 2 / 3)  # q1 and q3
    assert values["multirc_f1a"] == pytest.approx(100 * 2 * 2 / (2 * 2 + 0 + 1))


def test_majority_is_the_share_of_the_most_common_class_of_the_evaluated_rows() -> None:
    found = metrics.majority(TASKS["mrpc"], classes("mrpc", [1, 1, 0, 1]))
    assert found == {"accuracy": 75.0, "f1": pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 0))}
    assert metrics.majority(TASKS["mrpc"], classes("mrpc", [0, 0, 0, 1])) == {"accuracy": 75.0, "f1": 0.0}
    tie = metrics.majority(TASKS["mrpc"], classes("mrpc", [0, 1]))
    assert tie["f1"] == pytest.approx(100 * 2 / 3)  # 'equivalent' comes before 'not_equivalent'


def test_digits_are_label_words_under_attempt() -> None:
    examples = [Example("s", "1", "", 1), Example("s", "0", "", 0)]
    assert metrics.compute(("accuracy",), ["1", "1"], examples, TASKS["mrpc"], "attempt") == {"accuracy": 50.0}
    assert metrics.compute(("accuracy",), ["equivalent", "0"], examples, TASKS["mrpc"], "attempt") == {"accuracy": 50.0}


def test_correct_judges_one_prediction() -> None:
    assert metrics.correct(" equivalent ", classes("mrpc", [1])[0], TASKS["mrpc"])
    assert not metrics.correct("equivalents", classes("mrpc", [1])[0], TASKS["mrpc"])
    answer = Example("s", "A", "", None, ("The A.", "B"))
    assert metrics.correct("b", answer, TASKS["squad"])
    assert not metrics.correct("c", answer, TASKS["squad"])


@pytest.mark.parametrize("kind", METRICS_OF_KIND)
def test_every_metric_a_task_may_name_can_be_computed(kind: str) -> None:
    spec: TaskSpec = replace(TASKS["mrpc"], kind=kind, label_words=("0.0", "1.0"))  # type: ignore[arg-type]
    examples = [Example("s", spec.label_words[i], "", i, (), "q") for i in (0, 1)]
    values = metrics.compute(METRICS_OF_KIND[spec.kind], list(spec.label_words), examples, spec)
    assert values == pytest.approx(dict.fromkeys(METRICS_OF_KIND[spec.kind], 100.0))


def test_missing_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        compute("mrpc", ["equivalent"], classes("mrpc", [1, 0]))


def test_calibration_error_by_hand() -> None:
    # Bin 0.9–1.0 holds 0.9 (right) and 1.0 (wrong): |1 − 1.9|; bin 0.6–0.7 holds 0.6 (right): |1 − 0.6|; over 3 rows.
    probabilities = np.array([[0.9, 0.1], [0.0, 1.0], [0.6, 0.4]])
    assert metrics.calibration_error(probabilities, np.array([0, 0, 0])) == pytest.approx(100 * (0.9 + 0.4) / 3)


def test_a_calibrated_model_has_no_calibration_error() -> None:
    probabilities = np.tile([0.75, 0.25], (4, 1))
    assert metrics.calibration_error(probabilities, np.array([0, 0, 0, 1])) == pytest.approx(0.0)


def test_negative_log_likelihood_by_hand() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75]])
    expected = -(math.log(0.5) + math.log(0.25)) / 2
    assert metrics.negative_log_likelihood(probabilities, np.array([1, 0])) == pytest.approx(expected)
    assert metrics.negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1])) == math.inf


@pytest.mark.parametrize("probabilities", [[[0.5, 0.4]], [0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]]])
def test_what_is_no_distribution_is_refused(probabilities: list) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        metrics.calibration_error(np.array(probabilities), np.array([0]))
