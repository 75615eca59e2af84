"""The search of a table: as many trials for each method, judged on validation rows, and rows that can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run

from bpt_dist import config as configuration
from bpt_dist.artifacts.results import Result
from bpt_dist.commands.table.selection import check_equal_trials, chosen_yaml, select_best
from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"label": "pt-a", "method": {"name": "prompt_tuning", "length": 3}, "target": {"lr": 0.1}},
    {"label": "pt-b", "method": {"name": "prompt_tuning", "length": 3}, "target": {"lr": 1.0}},
    {"label": "bpt-a", "method": {"lr_full": 0.1}},
    {"label": "bpt-b", "method": {"lr_full": 0.5}},
    {"label": "joint-a", "method": {"lr_full": 0.1}, "target": {"joint": True}},
    {"label": "joint-b", "method": {"lr_full": 0.5}, "target": {"joint": True}},
]
SCORES = {
    "pt-a": (50.0, 90.0),
    "pt-b": (60.0, 70.0),
    "bpt-a": (10.0, 20.0),
    "bpt-b": (30.0, 20.0),
    "joint-a": (1.0, 2.0),
    "joint-b": (1.0, 2.0),
}


def search(folder: Path, rows: list[dict[str, Any]], splits: tuple[str, ...] = ("validation",)) -> RunConfig:
    tiny_run.write_tasks(folder / "tasks")
    return tiny_run.load(
        folder, tiny_run.settings(folder, {"name": "bpt"}, rows=rows, seeds=[0, 1], evaluation={"splits": list(splits)})
    )


def results(runs: list[RunConfig]) -> list[Result]:
    """For each target the score of the label above, and entries that must not count."""
    found = []
    for run in runs:
        for task, score in zip(("mood", "count"), SCORES[run.name[:-3]], strict=True):
            for headline, predict, value in ((True, "map", score + run.seed), (False, "map", 100.0), (True, "ensemble", 100.0)):
                common = {"backbone": "t5", "n": 6, "steps": 3, "trainable_parameters": 9, "stage": "target", "protocol": "fixed"}
                found.append(
                    Result(
                        method=run.method.name, task=task, split="validation", metric="accuracy", value=value, seed=run.seed,
                        joint=run.target.joint, run=run.name, predict=predict, decode="rank", headline=headline, majority=None,
                        folder=Path(), **common,
                    )
                )  # fmt: skip
    return found


def test_the_best_mean_over_targets_and_seeds_is_chosen_in_each_block(tmp_path: Path) -> None:
    config = search(tmp_path, ROWS)
    runs = configuration.expand(config)
    assert check_equal_trials(config, runs) == 2
    found = select_best(config, runs, results(runs))
    assert {tuple(contest): [(trial.label, trial.score) for trial in trials] for contest, trials in found.items()} == {
        ("prompt_tuning", False): [("pt-a", 70.5), ("pt-b", 65.5)],
        ("bpt", False): [("bpt-b", 25.5), ("bpt-a", 15.5)],
        ("bpt", True): [("joint-a", 2.0), ("joint-b", 2.0)],  # a tie keeps the first
    }


def test_the_chosen_rows_are_a_configuration_that_trains_as_the_trials_did(tmp_path: Path) -> None:
    config = search(tmp_path, ROWS)
    runs = configuration.expand(config)
    text = chosen_yaml(config, select_best(config, runs, results(runs)), "bpt-dist run-table search.yaml")
    assert "2 trials for every row" in text
    assert "# pt-a 70.5, pt-b 65.5" in text
    file = tmp_path / "chosen.yaml"
    file.write_text(text)
    chosen = configuration.expand(configuration.load(file, ["seeds=[7]"]))
    assert [run.name for run in chosen] == ["prompt_tuning-s7", "bpt-s7", "bpt-joint-s7"]
    assert chosen[0].target.lr == 0.1
    assert {run.evaluation.splits for run in chosen} == {("test",)}
    by_trial = {run.name: run for run in runs}
    for run, trial in zip(chosen, ("pt-a-s0", "bpt-b-s0", "joint-a-s0"), strict=True):
        same = {"seed": 0, "evaluation": by_trial[trial].evaluation}
        assert configuration.fingerprint(run.model_copy(update=same)) == configuration.fingerprint(by_trial[trial])
    assert [(run.method.lr_full, run.target.joint) for run in chosen[1:]] == [(0.5, False), (0.1, True)]


def test_an_unequal_search_and_one_that_looks_at_test_rows_are_refused(tmp_path: Path) -> None:
    config = search(tmp_path, ROWS[:5])
    with pytest.raises(ConfigError, match=r"rows: give every method the same number of trials .*bpt 2, bpt\* 1"):
        check_equal_trials(config, configuration.expand(config))
    config = search(tmp_path, ROWS, splits=("test",))
    with pytest.raises(ConfigError, match=r"evaluation\.splits: is \['test'\]"):
        check_equal_trials(config, configuration.expand(config))


def test_an_unfinished_trial_cannot_lose(tmp_path: Path) -> None:
    config = search(tmp_path, ROWS)
    runs = configuration.expand(config)
    with pytest.raises(ConfigError, match="trial bpt-b is not finished"):
        select_best(config, runs, [result for result in results(runs) if result.run != "bpt-b-s1"])
