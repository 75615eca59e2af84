"""MLflow's own variables are used where nothing is configured, and it is said that they are, or why they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bpt_dist import config
from bpt_dist.config import RunConfig
from bpt_dist.config.mlflow_environment import (
    EXPERIMENT,
    URI,
    experiment_of,
    notes,
    uri_of_environment,
    usable_variables,
    with_uri_of_environment,
)

SERVER = "http://127.0.0.1:5000"
Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.delenv(URI, raising=False)
    monkeypatch.delenv(EXPERIMENT, raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("name: mine\nmethod: prompt_tuning\ndata: {target_tasks: [mini_rte]}\n")
    return lambda *words: config.load(file, words)


def test_both_are_used_and_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, SERVER)
    monkeypatch.setenv(EXPERIMENT, "theirs")
    run = load()
    assert uri_of_environment(run.tracking) == SERVER
    assert experiment_of(run) == "theirs"
    assert notes(run) == [f"{URI} is used, because tracking.uri is not set: {SERVER}", f"{EXPERIMENT} is used: theirs"]
    assert usable_variables(run.tracking) == {URI: SERVER, EXPERIMENT: "theirs"}
    assert with_uri_of_environment(run).tracking.uri == SERVER


def test_the_configuration_wins(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, SERVER)
    monkeypatch.setenv(EXPERIMENT, "theirs")
    run = load("tracking.uri=https://ours.example", "tracking.experiment=ours")
    assert uri_of_environment(run.tracking) is None
    assert experiment_of(run) == "ours"
    assert notes(run) == []
    assert with_uri_of_environment(run) == run


@pytest.mark.parametrize("value", ["", "  "])
def test_blank_variables_say_nothing(load: Load, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(URI, value)
    monkeypatch.setenv(EXPERIMENT, value)
    run = load()
    assert (uri_of_environment(run.tracking), experiment_of(run), notes(run)) == (None, "mine", [])


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://me:canary@127.0.0.1:5000", "holds credentials"),
        ("http://tracking.example", "is plain http to another host"),
        ("sqlite:///mlflow.db", "needs an absolute path"),
        ("databricks", "is neither sqlite nor http"),
        ("file:///tmp/mlruns", "is neither sqlite nor http"),
    ],
)
def test_an_address_that_no_run_may_use_is_refused_in_a_sentence(
    load: Load, monkeypatch: pytest.MonkeyPatch, uri: str, why: str
) -> None:
    monkeypatch.setenv(URI, uri)
    run = load()
    assert uri_of_environment(run.tracking) is None
    (note,) = notes(run)
    assert note.startswith(f"{URI} is not used: it {why}")
    assert "canary" not in note
    assert usable_variables(run.tracking) == {}


def test_plain_http_is_used_where_it_was_allowed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, "http://tracking.example")
    assert uri_of_environment(load("tracking.allow_insecure=true").tracking) == "http://tracking.example"


def test_a_name_that_is_too_long_is_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENT, "x" * 129)
    run = load()
    assert experiment_of(run) == "mine"
    assert notes(run) == [f"{EXPERIMENT} is not used: it has 129 characters and at most 128 are allowed"]


def test_without_mlflow_nothing_is_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, SERVER)
    run = load("tracking.mlflow=false")
    assert notes(run) == []
    assert with_uri_of_environment(run) == run


def test_the_runs_of_a_table_are_in_that_experiment(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXPERIMENT, "theirs")
    assert {experiment_of(run) for run in config.expand(load("seeds=[0,1]"))} == {"theirs"}
    monkeypatch.delenv(EXPERIMENT)
    assert {experiment_of(run) for run in config.expand(load("seeds=[0,1]"))} == {"mine"}


def test_the_variables_do_not_make_another_run(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [config.fingerprint(run) for run in config.expand(load("seeds=[0]"))]
    monkeypatch.setenv(URI, SERVER)
    monkeypatch.setenv(EXPERIMENT, "theirs")
    assert [config.fingerprint(with_uri_of_environment(run)) for run in config.expand(load("seeds=[0]"))] == before
