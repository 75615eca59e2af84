"""The shipped tables compare like with like: every method, the same steps, the same search."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bpt_dist import config as configuration
from bpt_dist.backbones.t5.shapes import ShapeBackbone, shape_of
from bpt_dist.commands.table.published import METHOD_NAMES
from bpt_dist.commands.table.selection import check_equal_trials
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods import base as methods
from bpt_dist.methods._counts import skip_preludes
from bpt_dist.tasks.catalogue import GLUE_8, SOURCE_6, TASKS

CONFIGS = Path(__file__).parents[3] / "configs"
STARRED = {"fine_tuning", "adapters", "hyperformer", "hyperdecoder", "attempt", "mpt", "bpt"}


def runs(name: str, *words: str) -> list[RunConfig]:
    return configuration.expand(configuration.load(CONFIGS / name, words))


@pytest.mark.parametrize("name", ["mini.yaml", "real.yaml", "t5_base.yaml"])
def test_every_method_has_a_row_and_every_row_the_same_seeds(name: str) -> None:
    found = runs(f"table/{name}")
    assert {run.method.name for run in found if not run.target.joint} == set(METHOD_NAMES)
    assert len({seeds for seeds in Counter(row_label(run) for run in found).values()}) == 1


@pytest.mark.parametrize("name", ["mini_multi_target.yaml", "t5_base_multi_target.yaml"])
def test_the_starred_block_has_its_seven_methods(name: str) -> None:
    assert {run.method.name for run in runs(f"table/{name}") if run.target.joint} == STARRED


def test_each_starred_method_has_a_file_with_its_own_sampling() -> None:
    found = {}
    for file in sorted((CONFIGS / "multi_target").glob("*.yaml")):
        loaded = configuration.load(file)
        assert loaded.target.joint
        found[loaded.method.name] = (loaded.source.sampling, loaded.target.sampling)
    assert found == {
        "fine_tuning": ("all", "proportional"), "adapters": ("all", "temperature"), "attempt": ("all", "proportional"),
        "hyperformer": ("all", "temperature"), "hyperdecoder": ("all", "temperature"), "mpt": ("stochastic", "proportional"),
        "bpt": ("all", "all"),
    }  # fmt: skip


def steps_of_preludes(run: RunConfig) -> tuple[int, int]:
    method, source, before_source = methods.load(run, ShapeBackbone(shape_of("t5-small"))), None, 0
    if run.method.HAS_SOURCE_STAGE:
        method.begin_source([TASKS[name] for name in SOURCE_6], Mesh())
        before_source = sum(phase.steps for phase in method.auxiliary_phases())
        skip_preludes(method)
        source = method.end_source(Mesh())
    method.begin_target(source, [TASKS[GLUE_8[0]]], [100], Mesh())
    return before_source, sum(phase.steps for phase in method.auxiliary_phases())


@pytest.mark.parametrize(
    "name", ["mini.yaml", "mini_multi_target.yaml", "mini_search.yaml", "real.yaml", "t5_base.yaml", "t5_base_multi_target.yaml"]
)
def test_no_row_is_trained_longer_than_another(name: str) -> None:
    """Preludes count: teachers and task embeddings are steps on the same texts."""
    sources, targets = Counter[int](), Counter[int]()
    for run in runs(f"table/{name}", "seeds=0"):
        before_source, before_target = steps_of_preludes(run)
        targets[run.target.steps + before_target, run.target.batch_size] += 1
        if run.method.HAS_SOURCE_STAGE:
            sources[run.source.steps + before_source, run.source.batch_size] += 1
        assert run.source.sampling == run.target.sampling == "all"
    assert len(targets) == len(sources) == 1, (targets, sources)


@pytest.mark.parametrize("name", ["t5_base.yaml", "t5_base_multi_target.yaml"])
def test_every_row_has_the_rates_of_its_methods_own_file(name: str) -> None:
    """Rates and starts are given with their sources there; what the one protocol decides may differ."""
    by_protocol = ("name", "run_dir", "seed", "data.", "source.steps", "target.", "method.teacher_steps", "method.probe_steps",
                   "method.label_smoothing")  # fmt: skip
    for run in runs(f"table/{name}", "seeds=0"):
        folder = CONFIGS / run.method.name
        own = configuration.load(folder / ("t5_base_6.yaml" if run.method.HAS_PARTICLES else "t5_base.yaml"))
        changed = configuration.changed_keys(run, own)
        rates = [key for key in changed if key in ("target.lr", "target.weight_decay") or not key.startswith(by_protocol)]
        assert rates == ([] if run.method.name != "mpt" else ["source.sampling"]), run.name


def test_the_search_is_the_same_for_everybody_and_covers_every_row_of_the_table() -> None:
    searched, table = runs("table/mini_search.yaml"), runs("table/mini.yaml")
    assert check_equal_trials(configuration.load(CONFIGS / "table" / "mini_search.yaml"), searched) == 4
    trials = {_without_place(run) for run in searched}
    assert {_without_place(run) for run in table if run.seed == 0} <= trials
    alone = {run.method.name: rates(run) for run in table if run.seed == 0}
    together = {run.method.name: rates(run) for run in runs("table/mini_multi_target.yaml") if run.seed == 0}
    assert together == {name: alone[name] for name in STARRED}


SECOND_RATES = {"lr_full", "lr_full_relative", "lr_low_rank", "lr_attention"}


def rates(run: RunConfig) -> dict[str, float]:
    """Return all learning rates of the target stage."""
    own = {key: value for key, value in run.method.model_dump().items() if key in SECOND_RATES and value is not None}
    of_stage = {"target.lr": run.target.lr, "target.lr_relative": run.target.lr_relative}
    return own | ({} if run.method.OWN_TARGET_RATES else {key: value for key, value in of_stage.items() if value is not None})


def test_the_trials_of_a_method_multiply_all_its_target_rates_alike() -> None:
    trials: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for run in runs("table/mini_search.yaml"):
        trials.setdefault((run.method.name, run.target.joint), []).append(rates(run))
    for contest, (first, *others) in trials.items():
        for other in others:
            factors = [other[name] / first[name] for name in first]
            assert max(factors) / min(factors) < 1.15, (contest, factors)  # rates are round numbers
            assert not 1 / 2 < factors[0] < 2
    assert len(trials[("dept", False)][0]) == len(trials[("attempt", False)][0]) == 2


def test_real_text_is_trained_with_the_middle_rates_of_the_search() -> None:
    middle = {run.method.name: rates(run) for run in runs("table/mini_search.yaml")[1::4] if not run.target.joint}
    assert {run.method.name: rates(run) for run in runs("table/real.yaml", "seeds=0")} == middle


def _without_place(run: RunConfig) -> str:
    """Everything that shapes the training of a run: a row of the table must be one of the trials."""
    return configuration.fingerprint(run.model_copy(update={"evaluation": configuration.EvaluationConfig(), "seed": 0}))
