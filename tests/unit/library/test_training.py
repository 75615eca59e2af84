"""`bpt_dist.train` in somebody else's process: runs come back, exceptions come out, and the process is as it was before."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import distributed as dist

import bpt_dist
from bpt_dist import config as configuration
from bpt_dist import train as story
from bpt_dist.distributed.environment import free_port
from bpt_dist.errors import ConfigError, DataError, NonFinite, Stopped
from bpt_dist.library.runs import Run, Runs
from bpt_dist.library.task import Task
from bpt_dist.storage.run_directory import read_status


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def plain(world: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short BPT run into a folder of its own."""
    return tiny_run.settings(world, {"name": "bpt"}, output=str(tmp_path / "runs"))


def state() -> dict[str, Any]:
    """Return what a training might leave behind in this process."""
    others = (signal.SIGKILL, signal.SIGSTOP, signal.SIGALRM)  # the last is the limit of time for a test
    numbers = [number for number in signal.valid_signals() if number not in others]
    return {
        "handlers": {number: signal.getsignal(number) for number in numbers},
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "group": dist.is_initialized(),
        "threads": {thread.name for thread in threading.enumerate() if "watchdog" in thread.name},
        "log files": [handler for handler in logging.getLogger().handlers if type(handler) is logging.FileHandler],
        "level": logging.getLogger("bpt_dist").level,
        "kernels": torch.are_deterministic_algorithms_enabled(),
        "folder": Path.cwd(),
    }


@pytest.fixture(autouse=True)
def process_is_left_as_it_was() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Let `act` happen inside the `number`-th step from now on, once."""
    steps, compute = iter(range(1, 1000)), story.accumulate_gradients

    def computed(stage: Any) -> Any:
        if next(steps) == number:
            act()
        return compute(stage)

    monkeypatch.setattr(story, "accumulate_gradients", computed)


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_comes_back_with_everything_it_has_left(plain: dict[str, Any]) -> None:
    run = bpt_dist.train(plain, seed=3, target={"steps": 2})
    assert isinstance(run, Run)
    assert (run.config.seed, run.config.target.steps, run.folder) == (3, 2, Path(plain["output"]) / "run")
    stored = json.loads((run.folder / "results.json").read_text())
    assert [(one.task, one.metric, one.value) for one in run.results] == [(e["task"], e["metric"], e["value"]) for e in stored]
    assert torch.equal(run.posterior.mean, run.posterior.particles.mean(0))
    assert "mood" in run.table().to_markdown()
    rows = [tiny_run.row("mood", 200 + number) for number in range(6)]
    predictions = [json.loads(line) for line in (run.folder / "target/mood/predictions.jsonl").read_text().splitlines()]
    answers = run.predictor("mood").predict(rows)
    assert [answer.prediction for answer in answers] == [entry["prediction"] for entry in predictions]
    again = bpt_dist.train(plain, seed=3, target={"steps": 2})  # finished: it is read, not trained
    assert again.results == run.results


def test_a_file_and_a_configuration_are_taken_like_a_dictionary(plain: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_run.load(tmp_path, plain)
    runs = [bpt_dist.train(given, name=f"run-{number}") for number, given in enumerate((config, str(tmp_path / "config.yaml")))]
    assert torch.equal(runs[0].posterior.particles, runs[1].posterior.particles)
    with pytest.raises(ConfigError, match=r"is a file, a dictionary or a RunConfig \(got int\)"):
        bpt_dist.train(3)


def test_seeds_give_runs_with_one_table_and_a_comparison(plain: dict[str, Any]) -> None:
    settings = {**plain, "rows": [{"label": "one"}, {"label": "two", "method": {"sigma_relative": 0.1}}], "seeds": [0, 1]}
    runs = bpt_dist.train(settings)
    assert isinstance(runs, Runs)
    assert [run.name for run in runs] == ["one-s0", "one-s1", "two-s0", "two-s1"]
    assert [row.label for row in runs.table().rows] == ["BPT [one]", "BPT [two]"]
    assert len(runs.results) == sum(len(run.results) for run in runs)
    assert isinstance(runs[:2], Runs)
    table = bpt_dist.compare(*runs)
    assert [(one.first, one.second) for one in table.comparisons] == [("BPT [one]", "BPT [two]")]
    assert "BPT [two]" in "\n".join(table.to_json()["sentences"])
    assert "BPT [two]" in table._repr_html_()
    assert bpt_dist.compare(runs[0].folder, runs[2], rows=["two:one@mood"]).comparisons
    assert not bpt_dist.compare(runs[0]).comparisons
    with pytest.raises(ConfigError, match="no run is given"):
        bpt_dist.compare()
    with pytest.raises(ConfigError, match=r"^rows: three:one: no row is called 'three'; rows are one, two"):
        bpt_dist.compare(runs, rows=["three:one"])


def test_tasks_in_memory_are_trained_on(plain: dict[str, Any]) -> None:
    rows = [tiny_run.row("mood", number) for number in range(24)]
    task = Task("feeling", rows[:16], rows[16:20], rows[20:], fields=["sentence"], label="label", label_words=["good", "not good"])
    run = bpt_dist.train(plain, tasks=[task], data__target_tasks=["feeling"])
    assert {one.task for one in run.results} == {"feeling"}
    assert run.predictor("feeling").predict(rows[:1])[0].prediction in ("good", "not good")
    with pytest.raises(ConfigError, match="'feeling' is not trained on; name it in data"):
        bpt_dist.train(plain, tasks=[task], name="other")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"stepz": 3}, "arguments: stepz: unknown key; did you mean steps?"),
        ({"target": {"stepz": 3}}, "arguments: target.stepz: unknown key; did you mean target.steps?"),
        ({"target__steps": -1}, "arguments: target.steps: should be greater than or equal to 0 (got -1)"),
        ({"steps": 3}, "arguments: steps: is ambiguous; write one of source.steps, target.steps"),
        ({"data__target_tasks": ["moood"]}, "no such task (got 'moood'); did you mean mood?"),
        ({"seed": object()}, "arguments: seed: holds a value of type object, which no configuration can hold"),
        ({"seed": 1, "target__steps": 1, "target": {"steps": 1}}, "arguments: target.steps: is given twice"),
        ({"method": "bptt"}, "arguments: method.name: no such method (got 'bptt'); did you mean bpt?"),
        ({"shard": "deepspeed"}, "distribution.shard: deepspeed needs a process group"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(plain: dict[str, Any], overrides: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bpt_dist.train(plain, **overrides)
    assert said in str(caught.value)
    assert not Path(plain["output"]).exists()


def test_a_dictionary_with_a_fault_is_named_without_a_line(plain: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^configuration: seeed: unknown key; did you mean seed\?$"):
        bpt_dist.train({**plain, "seeed": 1})


def test_one_rank_of_several_is_refused(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"is called in one of 2 processes .*`torchrun -m bpt_dist.commands.train"):
        bpt_dist.train(plain)


def test_an_exception_of_a_run_comes_out_and_the_next_training_works(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stage: Any) -> Any:
        raise NonFinite("the loss is NaN")

    with monkeypatch.context() as patch:
        patch.setattr(story, "accumulate_gradients", broken)
        with pytest.raises(NonFinite, match="the loss is NaN"):
            bpt_dist.train(plain)
    found = read_status(Path(plain["output"]) / "run")
    assert found is not None
    assert (found.state, found.reason) == ("failed", "the loss is NaN")
    assert bpt_dist.train(plain).results


def test_bad_rows_of_a_file_come_out_as_one_exception(plain: dict[str, Any], tmp_path: Path) -> None:
    tasks = tiny_run.write_tasks(tmp_path / "tasks")
    with (tmp_path / "tasks/mood/train.jsonl").open("a") as file:
        file.write('{"id": "x", "sentence": "a cat"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:33: field 'label' is missing"):
        bpt_dist.train(plain, data__task_files=[tasks])


@pytest.mark.parametrize("step", [2, 6], ids=["in the source stage", "in a target stage"])
def test_an_interrupt_stops_with_a_checkpoint_and_training_goes_on_from_it(
    plain: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bpt_dist.train(plain, name="whole")
    with monkeypatch.context() as patch:
        at_step(patch, step, interrupt)
        with pytest.raises(Stopped, match=r"stopped on request after .* step \d"):
            bpt_dist.train(plain)
    found = read_status(Path(plain["output"]) / "run")
    assert found is not None
    assert found.state == "stopped"
    run = bpt_dist.train(plain)
    assert torch.equal(run.posterior.particles, whole.posterior.particles)
    assert [one.value for one in run.results] == [one.value for one in whole.results]


def test_a_second_interrupt_ends_the_training_at_once(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: interrupt(times=2))
        with pytest.raises(KeyboardInterrupt):
            bpt_dist.train(plain)
    assert bpt_dist.train(plain).results


def test_an_interrupt_in_the_last_step_of_a_run_stops_before_the_next(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = story.TrainingRun.finish
    with monkeypatch.context() as patch:
        patch.setattr(story.TrainingRun, "finish", lambda run: (finish(run), interrupt())[0])
        with pytest.raises(Stopped, match="stopped on request after bpt-s0; train again to continue with the next run"):
            bpt_dist.train(plain, seeds=[0, 1])
    assert [run.name for run in bpt_dist.train(plain, seeds=[0, 1])] == ["bpt-s0", "bpt-s1"]


def test_other_signals_stay_those_of_the_program(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, mine = [], lambda *_: None
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 2, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
            bpt_dist.train(plain)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [mine]


def test_it_trains_in_a_thread(plain: dict[str, Any]) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(bpt_dist.train(plain)))
    thread.start()
    thread.join()
    assert found[0].results


def test_a_process_group_of_the_program_is_kept(plain: dict[str, Any], tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        bpt_dist.train(plain)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_one_process_of_a_launcher_leaves_no_group(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert bpt_dist.train(plain).results
    assert not dist.is_initialized()


def test_a_notebook_sees_tables_and_pictures(plain: dict[str, Any]) -> None:
    run = bpt_dist.train(plain, figures=True)
    pictures = run.pictures()
    assert pictures["panel"]._repr_png_().startswith(b"\x89PNG")
    html = run._repr_html_()
    assert html.count("<table>") == 2
    assert 'src="data:image/png;base64,' in html
    assert "<caption>Results on the test split" in run.table()._repr_html_()
    assert "particles" in run.posterior._repr_html_()
    (run.folder / "figures").rename(run.folder / "old")
    assert run.pictures().keys() >= {"panel", "loss_per_task"}


def test_overrides_are_those_of_the_command_line(plain: dict[str, Any], tmp_path: Path) -> None:
    """The two ways to give a key agree: values in Python, texts in a shell."""
    file = tmp_path / "config.yaml"
    tiny_run.load(tmp_path, plain)
    texts = configuration.load(file, ["seed=3", "target.steps=2", "source_tasks=colour"])
    values = configuration.load_values(file, {"seed": 3, "target": {"steps": 2}, "source_tasks": ["colour"]})
    assert texts == values
