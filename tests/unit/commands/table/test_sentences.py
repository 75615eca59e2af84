"""Closing sentences: numbers against scipy and sums by hand, laws of a paired difference, and what cannot be tested."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from result_folders import build, entry, write_run
from scipy import stats

from bpt_dist.commands.main import main
from bpt_dist.commands.table.rows import Cell, Column, Row
from bpt_dist.commands.table.sentences import Comparison, Pair, compare, sentences
from bpt_dist.commands.table.statistics import holm, paired_difference, t_interval

TASKS = ("mini_review", "mini_rte", "mini_duplicate")
Scores = dict[str, list[float]]  # task -> a score for each seed


def column(task: str, metric: str = "accuracy") -> Column:
    return Column(task, metric)


def row(label: str, scores: Scores, metric: str = "accuracy") -> Row:
    cells = {column(task, metric): Cell(dict(enumerate(values))) for task, values in scores.items()}
    return Row(label, False, cells, (1, 1), names=frozenset({label.lower()}), methods=frozenset({label.lower()}))


def compared(first: Scores, second: Scores, *tasks: str) -> Comparison:
    rows = [row("First", first), row("Second", second)]
    columns = tuple(dict.fromkeys(c for one in rows for c in one.cells))
    (found,) = compare([Pair("First", "Second", tasks)], rows, columns)
    return found


def drawn(seed: int, num_seeds: int = 4) -> tuple[Scores, Scores]:
    draw = np.random.default_rng(seed).uniform(40, 90, size=(2, len(TASKS), num_seeds))
    first, second = ({task: list(values) for task, values in zip(TASKS, side, strict=True)} for side in draw)
    return first, second


def mapped(scores: Scores, change) -> Scores:
    return {task: [change(seed, value) for seed, value in enumerate(values)] for task, values in scores.items()}


# --- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_test_is_scipys_paired_t_test_of_the_means_over_tasks(seed: int) -> None:
    first, second = drawn(seed)
    found = compared(first, second).difference
    expected = stats.ttest_rel(*(np.mean(list(side.values()), axis=0) for side in (first, second)))
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx((interval.low, interval.high))


def test_a_difference_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, s = 1, half width t(0.975; 2) / sqrt 3 = 4.30265 / 1.73205 = 2.48414.
    found = paired_difference([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.interval == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert found.p_value == pytest.approx(0.0742, abs=1e-4)  # t = 2 sqrt 3
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx(found.interval)
    assert t_interval([1.0]) is None


def test_holms_correction_by_hand() -> None:
    # Sorted 0.01 x 4, 0.02 x 3, 0.03 x 2 raised to 0.06, 0.04 x 1 raised to 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


# --- laws -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_swapping_the_rows_changes_the_sign_and_nothing_else(seed: int) -> None:
    first, second = drawn(seed)
    forward, backward = compared(first, second).difference, compared(second, first).difference
    assert forward is not None
    assert backward is not None
    assert forward.mean == pytest.approx(-backward.mean)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert forward.interval == pytest.approx([-bound for bound in reversed(backward.interval or ())])


@pytest.mark.parametrize("seed", range(5))
def test_what_both_rows_gain_at_a_seed_changes_nothing(seed: int) -> None:
    first, second = drawn(seed)
    gain = np.random.default_rng(seed + 100).normal(size=4)
    changed = compared(mapped(first, lambda s, v: v + 7 + gain[s]), mapped(second, lambda s, v: v + 7 + gain[s])).difference
    before = compared(first, second).difference
    assert before is not None
    assert changed is not None
    assert (changed.mean, changed.p_value) == pytest.approx((before.mean, before.p_value))
    assert changed.interval == pytest.approx(before.interval)


@pytest.mark.parametrize("seed", range(5))
def test_corrected_p_values_are_ordered_and_never_smaller(seed: int) -> None:
    p_values = list(np.random.default_rng(seed).uniform(0, 0.1, size=6))
    adjusted = holm(p_values)
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))
    assert np.array_equal(np.argsort(p_values), np.argsort(np.array(adjusted), kind="stable")) or len(set(adjusted)) < 6
    assert holm([*reversed(p_values)]) == list(reversed(adjusted))


# --- sentences --------------------------------------------------------------------------------------------------------------


def texts(*rows: Row, pairs: list[Pair]) -> list[str]:
    return sentences(compare(pairs, rows, tuple(dict.fromkeys(c for one in rows for c in one.cells))))


def flat(*values: float) -> Scores:
    return {task: list(values) for task in TASKS}


def test_one_sentence_says_what_is_seen_and_one_what_is_not() -> None:
    rows = row("PT", flat(60, 61, 62)), row("Vanilla", flat(76, 77.5, 78)), row("BPT", flat(78, 75, 80))
    found = texts(*rows, pairs=[Pair("Vanilla", "PT"), Pair("BPT", "Vanilla")])
    # 16, 16.5, 16: mean 16.17, s 0.289, half width 4.30265 x 0.16667 = 0.717; 2, -2.5, 2: mean 0.5, s 2.598, half width 6.45.
    assert found == [
        "Seen: Vanilla is above PT by 16.2 points (95 % interval 15.4 to 16.9).",
        "Not seen: BPT against Vanilla, +0.5 points (\N{MINUS SIGN}6.0 to 7.0).",
        "Test: paired t over seeds of the mean difference over tasks, each with its 95 % interval; seen is p < 0.05 after Holm's "
        "correction over 2 comparisons.",
        "Compared: 3 seeds, mean of mini_review, mini_rte, mini_duplicate (accuracy).",
    ]


def test_a_row_that_is_worse_is_below_by_a_positive_size() -> None:
    found = texts(row("PT", flat(60, 61, 62)), row("Vanilla", flat(76, 77.5, 78)), pairs=[Pair("PT", "Vanilla")])
    assert found[0] == "Seen: PT is below Vanilla by 16.2 points (95 % interval 15.4 to 16.9)."


def test_what_only_the_correction_hides_is_not_seen_and_says_why() -> None:
    rows = [row("Base", flat(50, 50, 50, 50)), row("Better", flat(51, 52, 53, 52.5))]
    rows += [row(f"Same{number}", flat(51, 49, 50.5, 49.4 + number / 10)) for number in range(6)]
    alone = texts(*rows, pairs=[Pair("Better", "Base")])
    assert alone[0].startswith("Seen: Better is above Base by 2.1 points")
    many = texts(*rows, pairs=[Pair(one.label, "Base") for one in rows[1:]])
    assert many[0] == "Seen: no difference."
    assert "Better against Base, +2.1 points (0.8 to 3.5; one of several comparisons, corrected p = 0.0" not in many[1]
    assert re.search(r"Better against Base, \+2\.1 points \(0\.8 to 3\.5; one of several comparisons, corrected p = 0\.1", many[1])


def test_one_seed_has_no_interval() -> None:
    found = texts(row("PT", flat(60)), row("BPT", flat(58)), pairs=[Pair("BPT", "PT")])
    assert found == [
        "Not tested: BPT against PT, \N{MINUS SIGN}2.0 points (one seed: no interval).",
        "Compared: 1 seed, mean of mini_review, mini_rte, mini_duplicate (accuracy).",
    ]


def test_rows_without_spread_are_not_tested() -> None:
    rows = row("PT", flat(60, 62)), row("BPT", flat(60, 62)), row("SPoT", flat(60.5, 62.5))
    found = texts(*rows, pairs=[Pair("BPT", "PT"), Pair("SPoT", "PT")])
    assert found[0] == (
        "Not tested: BPT against PT, 0.0 points (equal at each of 2 seeds); "
        "SPoT against PT, +0.5 points (the same at each of 2 seeds: no spread, no interval)."
    )


def test_tasks_that_balance_each_other_are_a_tie() -> None:
    found = compared({"a": [50.0, 50.0], "b": [60.0, 60.0]}, {"a": [60.0, 60.0], "b": [50.0, 50.0]})
    assert found.difference is not None
    assert (found.difference.mean, found.difference.p_value) == (0.0, None)


def test_unequal_tasks_and_missing_cells_are_named() -> None:
    first = {"a": [50.0, 52.0, 54.0], "b": [60.0, 61.0, 62.0], "only_first": [1.0, 2.0, 3.0]}
    second = {"a": [40.0, 41.0, 45.0], "b": [50.0, 51.0], "only_second": [9.0, 9.0, 9.0]}
    found = compared(first, second)
    assert [one.task for one in found.columns] == ["a", "b"]
    assert found.seeds == (0, 1)
    assert found.left_out == "only_first, only_second (not in both rows) and seed 2 (not in every cell)"
    assert sentences([found])[-1] == f"Left out of First against Second: {found.left_out}."
    # A comparison of one task counts the seed that the other task lacks.
    assert compared(first, second, "a").seeds == (0, 1, 2)


def test_rows_without_a_common_task_or_seed_are_not_compared() -> None:
    assert sentences([compared({"a": [1.0, 2.0]}, {"b": [1.0, 2.0]})]) == ["Not tested: First against Second, no task in common."]
    assert compared({"a": [1.0, 2.0]}, {"a": [1.0]}).seeds == (0,)
    cells = {Column("a", "accuracy"): Cell({7: 1.0})}
    others = [row("First", {"a": [1.0]}), Row("Second", False, cells, (1, 1))]
    assert sentences(compare([Pair("First", "Second")], others, [column("a")]))[0].endswith("no seed has all their tasks.")
    gone = compare([Pair("bpt", "First")], others, [column("a")])
    assert sentences(gone) == ["Not tested: bpt against First, no results of bpt."]


def test_comparisons_over_different_seeds_each_say_theirs() -> None:
    rows = row("PT", flat(60, 61, 62)), row("Vanilla", flat(76, 77.5, 78)), row("BPT", {"mini_rte": [78.0, 75.0]})
    found = texts(*rows, pairs=[Pair("Vanilla", "PT"), Pair("BPT", "Vanilla")])
    assert "interval 15.4 to 16.9, 3 seeds, mean of mini_review, mini_rte, mini_duplicate)" in found[0]
    assert "2 seeds, mini_rte)" in found[1]


def test_errors_are_compared_in_their_own_unit_only_where_there_is_no_score() -> None:
    first, second = row("First", flat(0.5, 0.61, 0.5), "nll"), row("Second", flat(0.9, 1.0, 0.9), "nll")
    found = texts(first, second, pairs=[Pair("First", "Second")])
    assert found[0] == "Seen: First is below Second by 0.397 nats (95 % interval 0.382 to 0.411)."
    assert found[-1].endswith("(NLL, nats, the lower the better).")
    both = Row("Both", False, first.cells | row("x", flat(50, 60, 70)).cells, (1, 1))
    scored = compare([Pair("Both", "Score")], [both, row("Score", flat(1, 2, 3))], tuple(both.cells))
    assert {one.metric for one in scored[0].columns} == {"accuracy"}


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for method, values in {"vanilla_transfer": (80.0, 82.0, 81.0), "prompt_tuning": (60.0, 62.0, 61.5)}.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, [entry(method=method, seed=seed, value=value, task=task) for task in ("rte", "wic")])
    for seed, value in enumerate((81.0, 80.0, 82.0)):
        both = [entry(seed=seed, value=value + gain, predict=mode) for gain, mode in ((0, "map"), (2 + seed / 9, "ensemble"))]
        write_run(tmp_path, both)
    return tmp_path


def test_a_run_that_predicts_both_ways_has_two_lines(folder: Path) -> None:
    labels = [one.label for one in build(folder).rows]
    assert labels == ["PT", "Vanilla transfer PT", "BPT (MAP)", "BPT (ensemble)"]


def test_the_command_prints_the_sentences_last(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--compare", "vanilla_transfer:prompt_tuning", "--compare", "bpt/ensemble:bpt", "--compare", "BPT (MAP):PT@rte"]
    assert main(["table", str(folder), *words]) == 0
    seen, rule = [line for line in capsys.readouterr().out.splitlines() if line][-2:]
    # Differences 20, 20, 19.5; 2, 2.11, 2.22; 21, 18, 20.5.
    assert seen == (
        "Seen: Vanilla transfer PT is above PT by 19.8 points (95 % interval 19.1 to 20.6, 3 seeds, mean of rte, wic); BPT "
        "(ensemble) is above BPT (MAP) by 2.1 points (95 % interval 1.8 to 2.4, 3 seeds, rte); BPT (MAP) is above PT by 19.8 "
        "points (95 % interval 15.8 to 23.8, 3 seeds, rte)."
    )
    assert rule.startswith("Test: paired t over seeds")


def test_one_row_alone_is_compared_with_all_others(folder: Path) -> None:
    found = build(folder, compared=["prompt_tuning"]).comparisons
    assert [(one.first, one.second) for one in found] == [
        ("Vanilla transfer PT", "PT"), ("BPT (MAP)", "PT"), ("BPT (ensemble)", "PT")
    ]  # fmt: skip
    assert build(folder).comparisons == ()


@pytest.mark.parametrize(
    ("words", "says"),
    [("bpd:prompt_tuning", "no row is called 'bpd'; rows are bpt, bpt/ensemble, "),
     ("bpt:prompt_tuning@rta", "no row has task 'rta'; tasks are rte"),
     ("bpt:bpt", "compares BPT (MAP) with itself"), (":bpt", "no row is called ''")],
)  # fmt: skip
def test_a_comparison_of_nothing_is_refused_in_one_line(folder: Path, words: str, says: str, capsys) -> None:
    assert main(["table", str(folder), "--compare", words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--compare {words}: {says}")


def test_every_form_carries_the_sentences(folder: Path) -> None:
    table = build(folder, compared=["vanilla_transfer:prompt_tuning"])
    for text in (table.to_markdown(), table.to_latex(), table.to_narrow(80).replace("\n  ", " "), table.to_page()):
        assert "Seen: Vanilla transfer PT is above PT by 19.8 points" in text
    assert table.to_json()["comparisons"][0]["seen"] is True
    assert table.to_json()["sentences"][0].startswith("Seen: ")
