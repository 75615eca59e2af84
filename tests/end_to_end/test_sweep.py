"""A sweep through Ray Tune whose driver and whose trial are killed: every trial once, with undisturbed bits."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tiny_run
import tiny_sweep
from fault_figures import measured
from records import repeatable
from safetensors.torch import load_file
from sweep_process import alive, assert_nothing_left, lines, points_of, processes_of, start, wait_for

from bpt_dist import config as configuration
from bpt_dist.storage.files import read_json
from bpt_dist.tracking.registry import _global_store
from bpt_dist.tracking.store import connect

STEPS = 24


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a sweep whose driver was killed once, and in its second start one of its trials."""
    folder = tiny_sweep.world(tmp_path_factory.mktemp("sweep"))
    target = {"target": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 4}, "tracking": {"mlflow": True}}
    file = tiny_sweep.write(folder, tiny_sweep.plain(folder, run=target))
    runs = [folder / "runs" / "tiny" / f"trial-{number:03d}-s{seed}" for number in (0, 1) for seed in (0, 1)]
    with measured("F12", "driver, then a trial's process killed (adapt sweep, 4 trials)") as figures:
        first = start(file)
        wait_for(lambda: alive(runs, first.pid, STEPS) or first.poll() is not None)
        exposed = [one.laddr for process in processes_of(folder) for one in listening(process) if not is_loopback(one.laddr.ip)]
        assert exposed == []
        first.kill()
        first.communicate()
        second = start(file, "--resume")
        pid, killed = wait_for(lambda: alive(runs, second.pid, STEPS) or second.poll() is not None)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        text, _ = second.communicate(timeout=500)
        assert second.returncode == 0, text
        assert f"{killed.name} (" in text
        assert "starts again after failure 1" in text
        figures["worst_orphan_seconds"] = assert_nothing_left(folder)
    (folder / "log.txt").write_text(text)
    yield folder
    assert_nothing_left(folder)


def listening(process: psutil.Process) -> list:
    with contextlib.suppress(psutil.Error):
        return [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    return []


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


@pytest.mark.timeout(900)
def test_every_trial_is_there_once_with_the_undisturbed_bits(disturbed: Path) -> None:
    record = read_json(disturbed / "runs" / "tiny" / "sweep.json")
    assert [(one["name"], one["state"]) for one in record["trials"]] == [
        (f"trial-{number:03d}-s{seed}", "finished") for number in (0, 1) for seed in (0, 1)
    ]
    for one in record["trials"]:
        config = configuration.load(disturbed / "runs" / "tiny" / "configs" / f"{one['name']}.yaml")
        plain = {"mlflow": False, "experiment": None}
        quiet = config.tracking.model_copy(update=plain)
        alone = config.model_copy(update={"run_dir": disturbed / "runs" / "alone" / config.name, "tracking": quiet})
        tiny_run.trained(alone)
        found, expected = lines(config.directory), lines(alone.directory)
        scores = [line["metrics"]["sweep/score"] for line in found if line["stage"] == "sweep"]
        assert repeatable(line for line in found if line["stage"] != "sweep") == repeatable(expected)
        assert len(scores) == STEPS // 2
        assert scores[-1] == one["score"]
        prompts = [run.directory / "target" / "mood" / "adapter" / "adapter_model.safetensors" for run in (config, alone)]
        tiny_run.assert_same(load_file(prompts[0]), load_file(prompts[1]))
        assert one["reported"] == expected[-1]["metrics"]["best/score"]


def test_mlflow_holds_the_points_of_the_journal_and_the_sweep(disturbed: Path) -> None:
    client = connect(f"sqlite:///{disturbed / 'runs' / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "tiny")
    runs = {run.data.tags["bpt.run_id"]: run for run in client.search_runs([experiment.experiment_id])}
    folders = sorted((disturbed / "runs" / "tiny").glob("trial-*"))
    assert len(runs) == len(folders) == 4
    for folder in folders:
        run = runs[read_json(folder / "run.json")["id"]]
        history = {name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert {name: sorted(points) for name, points in history.items()} == points_of(folder)
        assert run.info.status == "FINISHED"
        assert run.data.tags["bpt.sweep"] == "tiny"
        assert run.info.run_name.startswith("sigma_relative=")
        assert "method.log10_sigma_relative" in run.data.params
    assert len({run.data.tags["mlflow.runColor"] for run in runs.values()}) == 4
    assert "mlflow.sharedViewState.bpt-dist" in client.get_experiment(experiment.experiment_id).tags
    record = read_json(disturbed / "runs" / "tiny" / "sweep.json")
    best = [one for one in record["trials"] if one["number"] == record["best"]["number"]]
    champion = disturbed / "runs" / "tiny" / max(best, key=lambda one: (one["score"], one["seed"]))["name"]
    version = client.get_model_version_by_alias("tiny-mood", "champion")
    assert runs[read_json(champion / "run.json")["id"]].info.run_id == version.run_id
    import mlflow

    with _global_store(f"sqlite:///{disturbed / 'runs' / 'mlflow.db'}"):
        fetched = Path(mlflow.artifacts.download_artifacts("models:/tiny-mood@champion"))
    own = champion / "target" / "mood" / "adapter" / "adapter_model.safetensors"
    assert (fetched / "adapter_model.safetensors").read_bytes() == own.read_bytes()


def test_the_best_configuration_reproduces_its_trials(disturbed: Path) -> None:
    folder = disturbed / "runs" / "tiny"
    record = read_json(folder / "sweep.json")
    runs = configuration.expand(configuration.load(folder / "best.yaml", ["mlflow=false", "experiment=null"]))
    assert [run.seed for run in runs] == [0, 1]
    scores = []
    for run in runs:
        tiny_run.trained(run)
        scores.append(lines(run.directory)[-1]["metrics"]["best/score"])
    trials = [one for one in record["trials"] if one["number"] == record["best"]["number"]]
    assert scores == [one["reported"] for one in trials]
    assert (folder / "figures" / "curves.png").is_file()
    assert json.dumps(record["best"]["values"]) in json.dumps([one["values"] for one in trials])
