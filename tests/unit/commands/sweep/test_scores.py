"""Scores, the best setting and ASHA's decisions, each against something that does not share their code."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_sweep
from ray.tune.schedulers import ASHAScheduler

from bpt_dist.commands.sweep import report
from bpt_dist.commands.sweep.record import TrialStatus, means
from bpt_dist.commands.sweep.settings import load
from bpt_dist.commands.sweep.trial import Point, Scores, history, last_step
from bpt_dist.commands.sweep.tune import ResumableASHA
from bpt_dist.config import RunConfig


def config(folder: Path, *, joint: bool) -> RunConfig:
    sweep = load(tiny_sweep.write(folder, tiny_sweep.plain(folder, run={"target": {"joint": joint, "steps": 10}})))
    return sweep.trial(0, (sweep.known_settings() or [])[0], 0).config


def validation(stage: str, step: int, **values: float | None) -> dict:
    return {"step": step, "stage": stage, "metrics": {f"target/validation/{name}": value for name, value in values.items()}}


def test_a_score_is_the_best_so_far_averaged_over_targets(tmp_path: Path) -> None:
    records = [
        {"step": 3, "stage": "target/mood", "metrics": {"target/loss": 0.3}},
        validation("target/mood", 5, accuracy=60.0),
        validation("target/mood", 10, accuracy=50.0),
        validation("target/count", 5, accuracy=20.0),
        validation("target/count", 10, accuracy=40.0),
        {"step": 0, "stage": "results", "metrics": {"best/score": 44.0}},
    ]
    one = config(tmp_path, joint=False)
    assert last_step(one) == 20
    assert history(one, records) == [Point(5, 60.0), Point(10, 60.0), Point(15, 40.0), Point(20, 50.0)]
    for known, number in ((records, 44.0), (records[:-1], None)):
        scores = Scores(one)
        scores.add(known)
        assert scores.reported == number


def test_joint_targets_have_one_score_and_no_number_is_the_worst(tmp_path: Path) -> None:
    names = {"mood/accuracy": 50.0, "count/accuracy": 30.0}
    records = [validation("target/joint", 5, **names), validation("target/joint", 10, **{**names, "count/accuracy": None})]
    one = config(tmp_path, joint=True)
    assert history(one, records) == [Point(5, 40.0), Point(10, 40.0)]
    assert history(one, records[1:]) == [Point(10, float("-inf"))]


def stand(number: int, seed: int, score: float, state: str = "finished") -> TrialStatus:
    values = {"method.sigma_relative": 10.0 ** (number - 1), "method.lr_full": 0.1 * (1 + number % 2)}
    return TrialStatus(number, f"trial-{number:03d}-s{seed}", seed, values, state, None, 10, score, score - 1)


def test_seeds_are_averaged_before_the_best_is_chosen() -> None:
    lucky = [stand(0, 0, 90.0), stand(0, 1, 50.0)]
    steady = [stand(1, 0, 75.0), stand(1, 1, 77.0)]
    half = [stand(2, 0, 99.0), stand(2, 1, 95.0, "pruned")]
    found = means([*lucky, *steady, *half], num_seeds=2)
    assert [one.number for one in found] == [1, 0]
    assert found[0].mean == 76.0
    assert found[0].spread == pytest.approx(statistics.stdev([75.0, 77.0]))
    assert found[0].reported == 75.0


def curves(seed: int, num_trials: int, last: int) -> dict[str, list[Point]]:
    source = random.Random(seed)
    return {f"t{n}": [Point(step, source.uniform(0, 100)) for step in range(2, last + 1, 2)] for n in range(num_trials)}


@pytest.mark.parametrize("seed", range(5))
def test_decisions_are_those_of_ray(seed: int) -> None:
    """Interleave random curves; until the last step ours and Ray's scheduler end the same trials at the same steps."""
    last, ended = 24, []
    ours = ResumableASHA(4, last, 2, lambda name, point: ended.append((name, point)))
    rays = ASHAScheduler(time_attr="step", metric="score", mode="max", grace_period=4, max_t=last, reduction_factor=2)
    left = {name: list(points) for name, points in curves(seed, 12, last).items()}
    trials = {name: SimpleNamespace(trial_id=f"id-{name}", config={"trial": name}) for name in left}
    for trial in trials.values():
        rays.on_trial_add(None, trial)  # type: ignore[arg-type]
    source, expected = random.Random(seed), []
    while left:
        name = source.choice(list(left))
        point = left[name].pop(0)
        result = {"step": point.step, "score": point.score}
        mine = ours.on_trial_result(None, trials[name], result)
        if point.step < last and rays.on_trial_result(None, trials[name], result) == "STOP":  # type: ignore[arg-type]
            expected.append((name, point))
            del left[name]
            assert mine == "STOP"
        elif not left[name]:
            del left[name]
            assert mine == "CONTINUE"
    assert ended == expected
    assert 2 < len(ended) < 12


def test_a_restart_changes_no_decision() -> None:
    last, ended = 24, []
    points = curves(1, 10, last)
    whole = ResumableASHA(4, last, 2, lambda name, point: ended.append(name))
    restarted = ResumableASHA(4, last, 2, lambda name, point: ended.append(name))
    for name in list(points)[:6]:
        for point in points[name]:
            whole.on_trial_result(None, SimpleNamespace(config={"trial": name}), point._asdict())
        restarted.replay(name, points[name])
    for name in list(points)[6:]:
        trial = SimpleNamespace(config={"trial": name})
        for point in points[name]:
            assert whole.on_trial_result(None, trial, point._asdict()) == restarted.on_trial_result(None, trial, point._asdict())


def test_pictures_show_what_was_searched(tmp_path: Path) -> None:
    found = [stand(number, seed, 50.0 + 3 * number + seed) for number in range(4) for seed in (0, 1)]
    found += [stand(4, 0, 40.0, "pruned"), stand(5, 0, 0.0, "failed")]
    keys = ("method.lr_full", "method.sigma_relative", "method.kernel")
    assert report.numeric_keys(keys, found) == ["method.sigma_relative", "method.lr_full"]
    drawn = report.draw(keys, found, tmp_path)
    assert [file.name for file in drawn] == ["heat_map.png", "curves.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    assert report.draw(("method.kernel",), found, tmp_path) == []
