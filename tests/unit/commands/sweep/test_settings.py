"""A sweep file is understood or refused with file, line, key and remedy, before anything is started."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import own_method
import pytest
import tiny_sweep
import yaml

from bpt_dist import config as configuration
from bpt_dist.commands.sweep import space as sweep_space
from bpt_dist.commands.sweep.settings import changed, fingerprint, load, runnable_yaml
from bpt_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[4] / "configs" / "sweep"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def written(folder: Path, **keys: object) -> Path:
    return tiny_sweep.write(folder, tiny_sweep.plain(folder, **keys))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_sweep_is_valid(file: Path) -> None:
    sweep = load(file)
    trials = sweep.trials(sweep.known_settings() or [])
    assert len(trials) == sweep.num_settings * len(sweep.settings.seeds) >= 6
    assert len({trial.config.directory for trial in trials}) == len(trials)


def test_a_trial_is_an_ordinary_configuration(folder: Path) -> None:
    sweep = load(written(folder))
    trial = sweep.trial(1, {"method.sigma_relative": 10.0, "method.lr_full": 0.1}, 1)
    file = folder / "trial.yaml"
    file.write_text(runnable_yaml(trial.config))
    assert configuration.load(file) == trial.config
    assert trial.config.method.sigma_relative == 10.0
    assert (trial.seed, trial.name) == (1, "trial-001-s1")
    assert trial.config.directory == folder / "runs" / "tiny" / "trial-001-s1"


def test_the_options_of_a_method_outside_the_package_are_searched_and_its_file_is_not(folder: Path) -> None:
    method = {"path": str(own_method.write(folder / "mine")), "length": 3}
    plain = tiny_sweep.plain(folder, space={"bottleneck": [2, 4]})
    plain["run"]["method"], plain["run"]["target"]["lr"] = method, 0.3
    plain["run"].pop("source"), plain["run"]["data"].pop("source_tasks")
    sweep = load(tiny_sweep.write(folder, plain))
    trials = sweep.trials(sweep.known_settings() or [])
    assert [trial.config.method.bottleneck for trial in trials] == [2, 2, 4, 4]
    (folder / "trial.yaml").write_text(runnable_yaml(trials[0].config))
    assert configuration.load(folder / "trial.yaml") == trials[0].config
    with pytest.raises(ConfigError, match=r"space\.method\.path: is given below run as well"):
        load(tiny_sweep.write(folder, plain | {"space": {"method.path": ["a.py", "b.py"]}}))


def test_a_grid_is_every_combination_once(folder: Path) -> None:
    space = {
        "method.sigma_relative": {"log_uniform": [0.01, 100], "points": 5},
        "method.lr_full": [0.1, 0.3],
        "method.rank": {"integer": [1, 5], "points": 3},
    }
    sweep = load(written(folder, space=space))
    found = [tuple(values.values()) for values in sweep.known_settings() or []]
    assert found == list(itertools.product([0.01, 0.1, 1.0, 10.0, 100.0], [0.1, 0.3], [1, 3, 5]))


def test_rates_in_units_of_the_embeddings_are_searched_as_others_are(folder: Path) -> None:
    space = {"method.lr_full_relative": {"log_uniform": [0.01, 1], "points": 3}, "method.sigma_relative": [1.0]}
    sweep = load(written(folder, space=space))
    found = [trial.config.method.model_dump() for trial in sweep.trials(sweep.known_settings() or [])]
    rates = [(method["lr_full"], method["lr_full_relative"]) for method in found]
    assert rates == [(None, 0.01)] * 2 + [(None, pytest.approx(0.1))] * 2 + [(None, pytest.approx(1.0))] * 2
    run = {"method": {"name": "vanilla_transfer"}, "target": {"lr": None}}
    plain = tiny_sweep.plain(folder, space={"target.lr_relative": [0.1, 0.3]}, run=run)
    plain["run"]["method"] = run["method"]
    relative = load(tiny_sweep.write(folder, plain))
    trials = relative.trials(relative.known_settings() or [])
    assert [trial.config.target.lr_relative for trial in trials] == [0.1, 0.1, 0.3, 0.3]
    assert trials[0].title == "lr_relative=0.1 s0"
    plain["run"]["target"]["lr"] = 0.3
    with pytest.raises(ConfigError, match=r"lr: is given beside lr_relative \(got 0.3 and 0.1\); set one of them to null"):
        load(tiny_sweep.write(folder, plain))


def test_random_settings_are_inside_repeatable_and_do_not_depend_on_their_number() -> None:
    space = {
        "a": sweep_space.parse({"log_uniform": [1e-3, 10]}),
        "b": sweep_space.parse({"integer": [2, 4]}),
        "c": sweep_space.parse(["x"]),
    }
    drawn = [sweep_space.sample(space, 7, number) for number in range(400)]
    assert drawn[3] == sweep_space.sample(space, 7, 3) != sweep_space.sample(space, 8, 3)
    assert {one["b"] for one in drawn} == {2, 3, 4}
    logs = [math.log10(one["a"]) for one in drawn]
    assert min(logs) >= -3
    assert max(logs) <= 1
    assert abs(sum(logs) / len(logs) + 1) < 0.2  # uniform in the logarithm: its mean is the middle of -3 and 1


BAD = {
    "empty space": ({"space": {}}, "space: is empty"),
    "empty list": ({"space": {"method.sigma_relative": []}}, "space.method.sigma_relative: is an empty list"),
    "misspelt key": ({"space": {"method.sigma_relativ": [1]}}, "did you mean method.sigma_relative?"),
    "one value": ({"space": {"method.sigma_relative": 1.0}}, "is one value, which leaves nothing to search (got 1.0)"),
    "twice": ({"space": {"method.sigma_relative": [1.0, 1.0]}}, "lists 1.0 twice"),
    "bounds": ({"space": {"method.sigma_relative": {"log_uniform": [1, 0.1], "points": 3}}}, "is not below the upper one"),
    "log of zero": (
        {"space": {"method.sigma_relative": {"log_uniform": [0, 1], "points": 3}}},
        "needs positive bounds (got [0, 1])",
    ),
    "misspelt range": ({"space": {"method.sigma_relative": {"loguniform": [0.1, 1]}}}, "did you mean log_uniform?"),
    "range without points": ({"space": {"method.sigma_relative": {"uniform": [0.1, 1]}}}, "needs to know how many `points`"),
    "type": ({"space": {"method.sigma_relative": ["much"]}}, "space.method.sigma_relative: should be a valid number"),
    "out of range": ({"space": {"method.sigma_relative": [-1.0]}}, "should be greater than 0 (got -1.0)"),
    "contradiction": ({"space": {"method.sigma_relative": [1.0], "method.sigma": [0.1]}}, "sigma: is given beside sigma_relative"),
    "same key": (
        {"space": {"method.sigma_relative": [1.0], "sigma_relative": [0.1]}},
        "is the same key as 'method.sigma_relative'",
    ),
    "beside run": ({"run": {"method": {"sigma_relative": 1.0}}}, "is given below run as well (got 1.0)"),
    "no effect": ({"space": {"method.sigma_relative": [1.0], "tracking.uri": ["sqlite:////a.db"]}}, "does not shape the result"),
    "score": ({"space": {"method.sigma_relative": [1.0], "data.protocol": ["fixed"]}}, "would change what the score means"),
    "seed": ({"space": {"method.sigma_relative": [1.0], "seed": [0, 1]}}, "is what `seeds` is for"),
    "unknown key": ({"concurency": 2}, "concurency: unknown key; did you mean concurrency?"),
    "key of a run": ({"reduktion": 2}, "did you mean reduction?"),
    "run key outside": ({"target": {"steps": 3}}, "target: unknown key; it belongs below run"),
    "run name": ({"run": {"name": "mine"}}, "run.name: is set by the sweep"),
    "run typo": ({"run": {"target": {"stps": 3}}}, "run.target.stps: unknown key; did you mean steps?"),
    "seeds": ({"seeds": [0, 0]}, "seeds: lists 0 twice"),
    "grid with a number": ({"num_settings": 4}, "num_settings: has no effect with search grid"),
    "random without one": ({"search": "random"}, "num_settings: is missing, search random needs it"),
    "no posterior": ({"run": {"source": {"posterior": None, "steps": 3, "lr": 0.3}}}, "posterior: is missing, an adapt sweep"),
    "no validation": ({"scheduler": "asha", "run": {"target": {"eval_every": None}}}, "eval_every: is missing, asha compares"),
    "registered": ({"run": {"tracking": {"mlflow": True, "register_as": "mine"}}}, "register_as: is for single runs"),
    "workers": ({"workers": 2}, "workers: has no effect in an adapt sweep"),
    "too many": ({"space": {"method.sigma_relative": {"uniform": [0.1, 1], "points": 501}}}, "makes 1002 trials; at most 1000"),
}


@pytest.mark.parametrize(("keys", "text"), BAD.values(), ids=BAD)
def test_bad_sweeps_are_refused_with_their_line(folder: Path, keys: dict, text: str) -> None:
    file = written(folder, **keys)
    with pytest.raises(ConfigError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    assert any(text in line and line.startswith(f"{file}:") for line in lines), lines
    named = next(line for line in lines if text in line)
    number = int(named.removeprefix(f"{file}:").split(":")[0])
    key = named.removeprefix(f"{file}:{number}: ").split(":")[0].removeprefix("space.").rpartition(".")[2]
    in_file = file.read_text().splitlines()[number - 1]
    assert key in in_file or key not in file.read_text(), (named, in_file)


def test_words_reach_the_sweep_and_its_run(folder: Path) -> None:
    sweep = load(written(folder), ["concurrency=1", "seeds=3", "target.steps=7", "rank=2"])
    assert (sweep.settings.concurrency, sweep.settings.seeds) == (1, (3,))
    (first, *_) = sweep.trials(sweep.known_settings() or [])
    assert (first.config.target.steps, first.config.method.rank) == (7, 2)
    for words, text in {
        ("rnk=2",): "command line: rnk: unknown key; did you mean rank?",
        ("concurency=2",): "command line: concurency: unknown key; did you mean concurrency?",
        ("concurrency=0",): "command line: concurrency: should be greater than or equal to 1",
        ("target.steps=-3",): "command line: run.target.steps: should be greater than or equal to 0",
        ("seeds",): "command line: 'seeds' is not key=value",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load(written(folder), words)
        assert text in str(caught.value), caught.value


def test_what_makes_a_sweep_another_one(folder: Path) -> None:
    before = load(written(folder)).resolved()
    same = load(written(folder), ["concurrency=2", "max_failures=5", "target.log_every=3"]).resolved()
    assert fingerprint(before) == fingerprint(same)
    assert changed(before, same) == []
    other = load(
        written(folder, space={"method.sigma_relative": [0.1, 5.0], "method.lr_full": [0.1]}), ["target.steps=9"]
    ).resolved()
    assert fingerprint(before) != fingerprint(other)
    assert changed(before, other) == ["run.target.steps: 12 -> 9", "space.method.sigma_relative: [0.1, 10.0] -> [0.1, 5.0]"]


def test_several_targets_and_swept_steps_do_not_compare(folder: Path) -> None:
    keys = {"scheduler": "asha", "space": {"target.steps": [4, 8], "method.sigma_relative": [1.0]}}
    file = written(folder, run={"target": {"joint": False}}, **keys)
    plain = yaml.safe_load(file.read_text())
    del plain["run"]["target"]["steps"]
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    with pytest.raises(ConfigError, match=r"makes asha compare one target with another"):
        load(file)
