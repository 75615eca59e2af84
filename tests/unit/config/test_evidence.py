"""The evidence's configurations are what its protocol says: equal compute, one search, sources learnt once a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpt_dist import config as configuration
from bpt_dist.commands.table.selection import check_equal_trials
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label

FOLDER = Path(__file__).parents[3] / "configs" / "evidence"
TABLES = ("equal_compute.yaml", "learning_curve.yaml")
SEARCH = "../table/mini_search.yaml"
RATES = ("lr_full", "lr_full_relative", "lr_low_rank")
EVIDENCE = (Path(__file__).parents[3] / "docs" / "evidence.md").read_text()


def runs(name: str, *words: str) -> list[RunConfig]:
    return configuration.expand(configuration.load(FOLDER / name, words))


def rates(run: RunConfig) -> tuple[float | None, ...]:
    """Return the rates of the source and the target stage."""
    own = run.method.model_dump()
    return (run.source.lr_relative, run.target.lr_relative, *(own.get(key) for key in RATES))


def particle_texts(run: RunConfig) -> int:
    """Return the texts of the source stage times the prompts that read them."""
    num_prompts = run.method.model_dump().get("num_particles", 1)
    return num_prompts * len(run.data.source_tasks) * run.source.batch_size * run.source.steps


def test_one_prompt_has_the_compute_of_all_particles() -> None:
    by_label = {row_label(run): run for run in runs("equal_compute.yaml")}
    compute = {label: particle_texts(run) for label, run in by_label.items()}
    assert compute.pop("vanilla-1x") * 4 == compute["bpt"]
    chosen = by_label["independent-by-validation"]  # the same four prompts as `independent`, learnt once
    assert chosen.source.posterior == by_label["independent"].directory.with_name(f"independent-s{chosen.seed}")
    assert chosen.method == by_label["independent"].method
    assert len(set(compute.values())) == 1
    assert len({run.target.model_copy(update={"lr_relative": None}) for run in by_label.values()}) == 1


@pytest.mark.parametrize("name", TABLES)
def test_the_rates_of_a_row_are_a_trial_of_its_method(name: str) -> None:
    trials = runs(SEARCH)
    assert check_equal_trials(configuration.load(FOLDER / SEARCH), trials) == 4
    known = {(run.method.name, rates(run)) for run in trials}
    for run in runs(name):
        if not row_label(run).startswith("independent"):
            assert (run.method.name, rates(run)) in known, run.name
    vanilla = next(run for run in runs("equal_compute.yaml") if row_label(run) == "vanilla-1x")
    independent = next(run for run in runs("equal_compute.yaml") if row_label(run) == "independent")
    assert (independent.source.lr_relative, independent.method.model_dump()["lr_full_relative"]) == (
        vanilla.source.lr_relative,
        vanilla.target.lr_relative,
    )


def test_the_search_sees_no_seed_and_no_split_of_a_table() -> None:
    searched = runs(SEARCH)
    assert {run.evaluation.splits for run in searched} == {("validation",)}
    seeds = {run.seed for name in TABLES for run in runs(name)}
    assert seeds == {0, 1, 2, 3, 4}
    assert seeds.isdisjoint({run.seed for run in searched})


def test_a_curve_learns_its_sources_once_a_seed() -> None:
    found = runs("learning_curve.yaml")
    makers = {run.directory: run for run in found if run.source.posterior is None and run.method.HAS_SOURCE_STAGE}
    assert {run.data.shots for run in makers.values()} == {512}
    assert len(makers) == 3 * 5
    for run in found:
        if run.source.posterior is not None:
            maker = makers[run.source.posterior]
            assert (maker.method, maker.seed) == (run.method, run.seed)
            assert maker.source == run.source.model_copy(update={"posterior": None})
    shots = {(row_label(run).rpartition("-")[0], run.data.shots) for run in found}
    assert len(shots) == 4 * 4


def test_the_posterior_follows_the_folder_of_the_table() -> None:
    moved = {run.source.posterior for run in runs("learning_curve.yaml", "output=/elsewhere") if run.source.posterior}
    assert all(place.is_relative_to("/elsewhere/evidence-learning-curve") for place in moved)


@pytest.mark.parametrize("name", TABLES)
def test_all_files_train_on_the_same_tasks_and_the_page_names_them(name: str) -> None:
    (first, *_) = runs("equal_compute.yaml")
    for run in runs(name):
        assert run.data.target_tasks == first.data.target_tasks
        assert run.data.source_tasks in ((), first.data.source_tasks)
    assert f"configs/evidence/{name}" in EVIDENCE
