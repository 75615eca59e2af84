"""What the random campaign once found, reduced to the shortest list of faults, and a few trials of it that are always the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign import REGRESSIONS
from plans import Plan, Wrong, carry_out, shrink
from trials import Trials

CASES = sorted(REGRESSIONS.glob("*.json"))
SAME = [
    (Plan((2,) * 6, ((0, "step.before_update,stage=source,step=2,rank=1,kill"),)), 2),
    (Plan((1,) * 6, ((0, "ckpt.after_rename,step=2,rank=0,kill"), (0, "flip:0.5"))), 2),
    # One intact checkpoint beside what a killed save left, and beside a torn one: no other could take its place, so no bit flips.
    (Plan((1,) * 6, ((0, "ckpt.before_rename,step=4,rank=0,kill"), (0, "flip:0.5"))), 2),
    (
        Plan(
            (1,) * 6, ((0, "ckpt.after_delete,step=4,rank=0,kill"), (0, "flip:0.5"), (1, "run.opened,rank=0,kill"), (1, "flip:0.5"))
        ),
        3,
    ),
]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_failure_of_the_campaign_stays_fixed(path: Path, trials: Trials) -> None:
    assert carry_out(Plan.load(path), trials).starts > 1  # a wrong end is raised


@pytest.mark.parametrize(("plan", "starts"), SAME, ids=lambda value: "" if isinstance(value, int) else str(value.faults))
def test_a_trial_of_the_campaign_takes_its_starts_and_ends_as_undisturbed(plan: Plan, starts: int, trials: Trials) -> None:
    assert carry_out(plan, trials).starts == starts


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = Plan((2, 1, 1, 1, 1, 1), ((0, "run.opened,rank=0,kill"), (1, "flip:0.5")), True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_shrinker_finds_the_one_fault_that_matters() -> None:
    faults = (*((start, f"eval.batch,hit={start},rank=0,kill") for start in range(3)), (3, "run.opened,rank=1,kill"))
    plan = Plan((3,) * 6, faults)
    shortest = shrink(plan, lambda candidate: (3, "run.opened,rank=1,kill") in candidate.faults)
    assert shortest.faults == ((3, "run.opened,rank=1,kill"),)
    assert max(shortest.sizes) == 2


def test_a_wrong_outcome_is_noticed(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign would see a run that ends differently."""
    plan = Plan((1,) * 6, ((0, "ckpt.after_rename,step=2,rank=0,kill"),))
    monkeypatch.setitem(trials._references, *_another_reference(trials))
    with pytest.raises(Wrong, match="mismatch"):
        carry_out(plan, trials)


def _another_reference(trials: Trials):  # type: ignore[no-untyped-def]
    from plans import SECTIONS

    job = trials.job(**SECTIONS, seed=9)
    job.finish()
    return repr((1, None, sorted(SECTIONS.items()))), job
