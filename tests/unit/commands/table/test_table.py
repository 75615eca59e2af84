"""Tables made from small run folders, against a reviewed table and numbers worked by hand."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from result_folders import build, entry, grid, write_run
from rich.console import Console

from bpt_dist.artifacts.results import collect
from bpt_dist.commands.table.layout import latex_escape
from bpt_dist.errors import DataError

# --- the table -------------------------------------------------------------------------------------------------


def test_the_whole_table_of_a_small_study(tmp_path):
    for method, values in {"bpt": (80.0, 82.0, 81.0), "prompt_tuning": (60.0, 62.0, 61.0)}.items():
        for seed, value in enumerate(values):
            matthews = entry(method=method, seed=seed, task="cola", metric="matthews", value=value - 50.0, majority=0.0)
            accuracy = entry(method=method, seed=seed, task="cola", value=value, majority=70.0, headline=False)
            write_run(tmp_path, [matthews, accuracy, entry(method=method, seed=seed, value=value)])
    joint = [entry(run="many-s0", joint=True, trainable_parameters=140, task=task, value=75.0) for task in ("rte", "wic")]
    write_run(tmp_path, joint)
    write_run(tmp_path, [entry(method="mpt")], status="running")
    expected = Path(__file__).with_name("golden_table.md").read_text(encoding="utf-8")
    assert build(tmp_path).to_markdown() == expected


def test_one_seed_has_no_spread_and_no_bold(tmp_path):
    write_run(tmp_path, [entry(value=90.0)])
    write_run(tmp_path, [entry(method="prompt_tuning", value=10.0)])
    cells = grid(build(tmp_path))
    assert cells["BPT"]["rte (accuracy)"] == "90.0"
    assert cells["BPT"]["Seeds"] == "1"
    assert "±" not in cells["PT"]["rte (accuracy)"]


def test_a_cell_with_fewer_seeds_than_its_row_says_so(tmp_path):
    write_run(tmp_path, [entry(seed=0), entry(seed=0, task="wic", value=60.0)])
    write_run(tmp_path, [entry(seed=1, value=90.0)])
    cells = grid(build(tmp_path))["BPT"]
    assert cells["rte (accuracy)"] == "85.0 ± 7.1"
    assert cells["wic (accuracy)"] == "60.0 (n=1)"


def test_missing_is_a_dash_and_never_a_zero_in_an_average(tmp_path):
    tasks = ("mnli", "rte", "cola")
    write_run(tmp_path, [entry(task=t, value=v) for t, v in zip(tasks, (50.0, 70.0, 90.0), strict=True)])
    write_run(tmp_path, [entry(method="mpt", task=t, value=v) for t, v in zip(tasks[:2], (60.0, 80.0), strict=True)])
    cells = grid(build(tmp_path))
    assert cells["MPT"]["cola (accuracy)"] == "–"
    assert cells["BPT"]["GLUE average (2)"] == "60.0"
    assert cells["MPT"]["GLUE average (2)"] == "70.0"


def test_different_metrics_are_never_averaged(tmp_path):
    shared = [entry(task=task) for task in ("mnli", "rte")]
    write_run(tmp_path, [*shared, entry(task="cola", metric="matthews", value=10.0)])
    write_run(
        tmp_path,
        [{**e, "method": "mpt", "run": "mpt-s0"} for e in shared] + [entry(method="mpt", task="cola")],
    )
    table = build(tmp_path)
    assert [average.title for average in table.averages] == ["GLUE average (2)"]
    assert {column.task for column in table.averages[0].columns} == {"mnli", "rte"}
    assert {c.title for c in table.columns if c.task == "cola"} == {"cola (Matthews)", "cola (accuracy)"}
    note = next(n for n in table.sheets()[0].notes if n.startswith("GLUE average"))
    assert "mnli (accuracy), rte (accuracy)" in note
    assert "cola" not in note


def test_one_common_column_is_no_average(tmp_path):
    write_run(tmp_path, [entry()])
    table = build(tmp_path)
    assert table.averages == ()
    assert any(n.startswith("No average") for n in table.sheets()[0].notes)


def test_cola_has_both_metrics_and_counts_once_in_the_average(tmp_path):
    rows = [
        entry(task="cola", metric="matthews", value=40.0),
        entry(task="cola", headline=False, value=90.0),
        entry(),
    ]
    write_run(tmp_path, rows)
    assert grid(build(tmp_path))["BPT"]["GLUE average (2)"] == "60.0"


def test_secondary_metrics_other_splits_and_other_stages_have_no_column(tmp_path):
    write_run(
        tmp_path,
        [
            entry(task="mrpc", value=80.0), entry(task="mrpc", metric="f1", headline=False, value=85.0),
            entry(task="wic", split="validation"), entry(task="qnli", stage="source"),
        ],
    )  # fmt: skip
    assert [c.title for c in build(tmp_path).columns] == ["mrpc (accuracy)"]
    assert [c.title for c in build(tmp_path, split="validation").columns] == ["wic (accuracy)"]
    with pytest.raises(DataError, match=r"split 'dev'.*found test, validation"):
        build(tmp_path, split="dev")


def test_settings_that_differ_have_rows_of_their_own(tmp_path):
    write_run(tmp_path, [entry(), entry(predict="ensemble", value=90.0)])
    write_run(tmp_path, [entry(run="big-s0", backbone="t5-large", value=95.0)])
    assert set(grid(build(tmp_path))) == {
        "Majority class",
        "BPT (MAP, mini)",
        "BPT (ensemble, mini)",
        "BPT (t5-large)",
    }


def test_runs_that_repeat_a_seed_are_told_apart_by_name(tmp_path):
    write_run(tmp_path, [entry(run="narrow-s0", value=70.0)])
    write_run(tmp_path, [entry(run="wide-s0", value=80.0)])
    assert {"BPT [narrow]", "BPT [wide]"} < set(grid(build(tmp_path)))


def test_a_run_that_averages_too_is_told_apart_from_another_of_its_method(tmp_path):
    write_run(tmp_path, [entry(), entry(predict="ensemble", value=90.0)])
    write_run(tmp_path, [entry(run="bpt-64-s0", value=95.0)])
    expected = {"BPT (MAP) [bpt]", "BPT (ensemble) [bpt]", "BPT [bpt-64]"}
    assert set(grid(build(tmp_path))) - {"Majority class"} == expected


def test_rows_of_a_table_never_share_a_line_and_show_what_their_label_adds(tmp_path):
    """Two rows of one method, one seed each so far: by method alone they would look like two seeds of one row."""
    write_run(tmp_path, [entry(run="bpt-imq-s0", value=70.0)])
    write_run(tmp_path, [entry(run="bpt-rbf-s1", seed=1, value=80.0)])
    write_run(tmp_path, [entry(run="spot-s0", method="spot")])
    for run in ("spot-joint-s0", "wide-s0"):
        write_run(tmp_path, [entry(run=run, method="spot", joint=True)])
    labels = set(grid(build(tmp_path, by_label=True))) - {"Majority class"}
    assert labels == {"BPT [bpt-imq]", "BPT [bpt-rbf]", "SPoT", "SPoT [spot-joint]*", "SPoT [wide]*"}
    assert "BPT" in grid(build(tmp_path)), "runs trained one by one are still put together"
    (tmp_path / "alone").mkdir()
    write_run(tmp_path / "alone", [entry(run="spot-joint-s0", method="spot", joint=True)])
    assert "SPoT*" in grid(build(tmp_path / "alone", by_label=True))


def test_an_average_has_the_spread_of_the_seeds_averages(tmp_path):
    values = {0: (50.0, 70.0), 1: (60.0, 90.0), 2: (40.0, 80.0)}
    for seed, (first, second) in values.items():
        write_run(tmp_path, [entry(seed=seed, task="mnli", value=first), entry(seed=seed, task="rte", value=second)])
    write_run(tmp_path, [entry(method="mpt", task="mnli"), entry(method="mpt")])
    write_run(tmp_path, [entry(method="mpt", seed=1)])  # one column has a second seed
    table = build(tmp_path)
    averages = [np.mean(pair) for pair in values.values()]
    assert grid(table)["BPT"]["GLUE average (2)"] == f"{np.mean(averages):.1f} ± {np.std(averages, ddof=1):.1f}"
    assert grid(table)["MPT"]["GLUE average (2)"] == "80.0"
    by_method = {row["method"]: row["averages"]["GLUE average (2)"] for row in table.to_json()["rows"]}
    assert by_method["BPT"]["standard_deviation"] == pytest.approx(np.std(averages, ddof=1), abs=1e-12)
    assert by_method["MPT"] == {"mean": 80.0, "standard_deviation": None}


def test_the_same_run_twice_is_refused(tmp_path):
    for folder in ("a", "b"):
        (write_run(tmp_path / folder, [entry()]) / "run.json").write_text(json.dumps({"id": "0123"}))
    with pytest.raises(DataError, match=r"b/bpt-s0: is the run that is also in .*a/bpt-s0; give only one of the two folders"):
        build(tmp_path)
    assert len(collect([tmp_path / "a", tmp_path / "a" / "bpt-s0"]).results) == 1, "overlapping paths are read once"


def test_what_makes_rows_incomparable_is_said(tmp_path):
    write_run(tmp_path, [entry(run="first-s0")])
    write_run(tmp_path, [entry(run="second-s1", seed=1, n=50, decode="generate", majority=60.0)])
    notes = "\n".join(build(tmp_path).sheets()[0].notes)
    assert "rows of rte (accuracy) were measured on different numbers of examples" in notes
    assert "rows of rte (accuracy) were decoded in different ways" in notes
    assert "its seeds come from several runs (first, second)" in notes
    assert "Majority class of rte (accuracy)" in notes


# --- reading ---------------------------------------------------------------------------------------------------


def test_unfinished_runs_are_left_out_with_a_note(tmp_path):
    write_run(tmp_path, [entry()])
    write_run(tmp_path, [entry(method="mpt")], status="failed")
    (write_run(tmp_path, [entry(method="spot")]) / "status.json").unlink()
    found = collect([tmp_path])
    assert [r.method for r in found.results] == ["bpt"]
    assert found.notes == [
        "Left out: run mpt-s0 is failed, not finished.",
        "Left out: run spot-s0 has no status.json.",
    ]


def test_an_undefined_value_is_missing_and_noted(tmp_path):
    write_run(tmp_path, [entry(), entry(task="stsb", metric="pearson", value=None)])
    found = collect([tmp_path])
    assert [r.task for r in found.results] == ["rte"]
    assert found.notes == ["Undefined: pearson on stsb, run bpt-s0."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"results.json: not valid JSON .*; or leave the folder out"),
        ("{}", r"results.json: holds dict, expected a list"),
        ("[3]", r"results.json: entry 0 is int"),
        ('[{"method": "bpt"}]', r"entry 0 lacks backbone, task"),
        (json.dumps([entry(value="high")]), r"entry 0: accuracy of 'rte' is 'high'"),
        (json.dumps([entry(value=float("nan"))]), r"results.json: not valid JSON \(NaN is not JSON\)"),
    ],
)
def test_a_results_file_that_cannot_be_used_is_named(tmp_path, content, message):
    folder = write_run(tmp_path, [entry()])
    (folder / "results.json").write_text(content)
    with pytest.raises(DataError, match=message):
        collect([tmp_path])


def test_a_path_without_results_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no results.json at or below it"):
        collect([tmp_path / "absent"])


# --- bold -------------------------------------------------------------


def test_bold_needs_stable_seeds_and_enough_examples(tmp_path):
    def study(root, num_examples):
        for seed in range(3):
            for method, share in {"bpt": 0.8, "prompt_tuning": 0.6}.items():
                rights = [int(i < share * num_examples) for i in range(num_examples)]
                facts = entry(method=method, seed=seed, value=100 * sum(rights) / num_examples, n=num_examples)
                write_run(root, [facts], answers={"rte": rights})
        return grid(build(root))["BPT"]["rte (accuracy)"]

    assert study(tmp_path / "many", 200) == "**80.0 ± 0.0**"
    assert study(tmp_path / "few", 5) == "80.0 ± 0.0"


def test_the_best_must_beat_every_rival_of_its_block(tmp_path):
    for seed in range(3):
        for method, value in {"bpt": 80.0, "mpt": 79.8 + 0.2 * seed, "prompt_tuning": 50.0}.items():
            write_run(tmp_path, [entry(method=method, seed=seed, value=value + seed)])
        write_run(tmp_path, [entry(run=f"many-s{seed}", joint=True, value=99.0 + 0.1 * seed, seed=seed)])
    assert not any("**" in cell for row in grid(build(tmp_path)).values() for cell in row.values())


def test_predictions_of_something_else_are_not_used(tmp_path):
    # Accuracy 80 but predictions with 2 of 5 right: another split's file. The seeds alone then decide.
    for seed in range(3):
        write_run(tmp_path, [entry(seed=seed, value=80.0)], answers={"rte": [1, 1, 0, 0, 0]})
        write_run(tmp_path, [entry(method="mpt", seed=seed, value=60.0)], answers={"rte": [1, 1, 0, 0, 0]})
    assert grid(build(tmp_path))["BPT"]["rte (accuracy)"] == "**80.0 ± 0.0**"


# --- printing --------------------------------------------------------------------------------------------------


def test_latex_escapes_everything_it_gives_a_meaning():
    assert latex_escape(r"a_b & 5 % ± #1 {x} ~ ^ \ $ –") == (
        r"a\_b \& 5 \% $\pm$ \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ --"
    )


def test_latex_is_balanced_and_rectangular(tmp_path):
    write_run(tmp_path, [entry(method="my_method&co", task="rte_100%"), entry(method="my_method&co", task="wic")])
    text = build(tmp_path, published=True).to_latex()
    assert text.isascii(), "pdflatex without an input encoding prints it"
    assert re.findall(r"\\begin\{(\w+)\}", text) == ["table", "tabular"] * 2
    assert re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "table"] * 2
    plain = re.sub(r"\\[\\{}%&#_$]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert "%" not in plain
    assert "#" not in plain
    assert "_" not in plain
    for tabular in re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", text, re.S):
        lines = [line for line in tabular[1].splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(tabular[0])}


def test_markdown_keeps_its_columns_whatever_the_names(tmp_path):
    write_run(tmp_path, [entry(method="a|b*", task="x_y")])
    lines = [line for line in build(tmp_path).to_markdown().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_csv_is_one_line_a_cell_at_full_precision(tmp_path):
    for seed, value in enumerate((100 / 3, 200 / 3)):
        write_run(tmp_path, [entry(seed=seed, value=value)])
    (line,) = csv.DictReader(io.StringIO(build(tmp_path).to_csv()))
    assert (line["block"], line["method"], line["task"], line["metric"]) == (
        "single",
        "BPT",
        "rte",
        "accuracy",
    )
    assert float(line["mean"]) == pytest.approx(50, abs=1e-13)
    assert float(line["standard_deviation"]) == pytest.approx(np.std([100 / 3, 200 / 3], ddof=1), abs=1e-13)
    assert (line["num_seeds"], line["seeds"], line["best"], line["majority"]) == ("2", "0 1", "0", "50.0")


def test_the_terminal_shows_every_cell(tmp_path):
    write_run(tmp_path, [entry(method="odd[bold]")])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(build(tmp_path).to_rich())
    text = console.export_text()
    assert "odd[bold]" in text
    assert "80.0" in text
    assert "Majority class" in text


def test_published_numbers_are_printed_only_when_asked_and_apart(tmp_path):
    write_run(tmp_path, [entry()])
    assert "Fine-tuning" not in build(tmp_path).to_markdown()
    ours, theirs = build(tmp_path, published=True).sheets()
    assert "not from this project" in theirs.title
    assert len(ours.blocks) == 2
