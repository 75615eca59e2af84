"""Colours by the order of rows, and names for axes that MLflow does not cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bpt_dist.storage.metrics_log import BEST_SCORE
from bpt_dist.tracking.names import COLOR, COLORS, ROW, SWEPT, axes, axis_names, color_of
from bpt_dist.tracking.ui import compared, scores


def test_rows_get_colours_in_order_and_seeds_share_one() -> None:
    known: list[dict[str, str]] = []
    for seed in range(3):
        for number in range(14):
            row = f"row-{number}"
            known.append({ROW: row, COLOR: color_of(row, known)})
            assert known[-1][COLOR] == COLORS[number], (seed, number)
    assert len(set(COLORS)) == len(COLORS) == 16


def test_runs_of_earlier_versions_have_no_row_and_take_no_colour() -> None:
    assert color_of("bpt", [{COLOR: COLORS[0]}, {}]) == COLORS[0]


def test_axes_have_the_last_part_of_a_key_where_it_is_unique() -> None:
    assert axis_names(["method.sigma_relative", "method.lr_full"]) == {
        "method.sigma_relative": "log10 sigma_rel",
        "method.lr_full": "lr_full",
    }
    assert axis_names(["source.lr", "target.lr"]) == {"source.lr": "source.lr", "target.lr": "target.lr"}
    assert axis_names(["method.sigma"]) == {"method.sigma": "log10 sigma"}
    assert axis_names([]) == {}


def test_a_trial_has_its_axes_as_parameters() -> None:
    params = {"method.sigma": "0.1", "method.log10_sigma": "-1", "target.lr": "0.3"}
    assert axes("method.sigma,target.lr,method.none", params) == {"log10 sigma": "-1", "lr": "0.3"}
    assert axes("", params) == {}


def run(params: dict[str, str], tags: dict[str, str] | None = None, metrics: dict[str, float] | None = None) -> Any:
    return SimpleNamespace(data=SimpleNamespace(params=params, tags=tags or {}, metrics=metrics or {}))


def test_only_parameters_that_all_runs_have_are_compared() -> None:
    """A chart leaves out every run that lacks one: "Comparison (0)" was what a table of methods opened on."""
    prompts = run({"method.name": "bpt", "method.log10_sigma": "-1", "target.lr": "0.1"})
    assert compared([prompts, run({"method.name": "lora", "target.lr": "0.3"})]) == ["method.name", "target.lr"]
    assert compared([prompts, run({"method.name": "bpt", "method.log10_sigma": "0", "target.lr": "0.1"})]) == ["method.log10_sigma"]
    assert compared([prompts, run({"method.name": "bpt", "target.lr": "0.1"})]) == ["method.name", "target.lr"]


def test_a_sweep_of_an_earlier_version_is_compared_by_the_names_it_has() -> None:
    swept = {SWEPT: "method.sigma,target.lr"}
    old = run({"method.log10_sigma": "0", "target.lr": "0.1"}, swept)
    new = run({"method.log10_sigma": "0", "target.lr": "0.1", "log10 sigma": "0", "lr": "0.1"}, swept)
    assert compared([new]) == ["log10 sigma", "lr"]
    assert compared([old, new]) == ["method.log10_sigma", "target.lr"]


def test_scores_are_for_several_rows_and_the_mean_comes_first() -> None:
    def of(row: str, *tasks: str) -> Any:
        return run({}, {ROW: row}, {BEST_SCORE: 1.0, "target/loss": 2.0, **{f"best/{task}": 1.0 for task in tasks}})

    assert scores([of("bpt", "a", "b"), of("lora", "b", "c")]) == [BEST_SCORE, "best/a", "best/b", "best/c"]
    assert scores([of("bpt", "a"), of("lora", "a")]) == [BEST_SCORE]
    assert scores([of("bpt", "a", "b"), of("bpt", "a", "b")]) == []
    assert scores([]) == []
