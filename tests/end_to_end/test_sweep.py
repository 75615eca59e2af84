"""A sweep through Ray Tune whose driver and whose trial are killed: every trial once, with undisturbed bits."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tiny_run
import tiny_sweep
from safetensors.torch import load_file

from bpt_dist import config as configuration
from bpt_dist.files import read_json
from bpt_dist.journal import read_records
from bpt_dist.lock import holder_of
from bpt_dist.tracking import connect, metric_key

ROOT = Path(__file__).parents[2]
STEPS = 24
MARK = "BPT_TEST_SWEEP"
ORPHAN_SECONDS = 15


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a sweep in `folder`: what all its processes inherit tells them from those of others."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1", MARK: str(folder)}


def start(file: Path, *words: str) -> subprocess.Popen[str]:
    """Start a sweep in its own session, as a terminal would."""
    command = [sys.executable, str(ROOT / "launcher" / "sweep.py"), "--config", str(file), *words]
    own = environment(file.parent)
    return subprocess.Popen(
        command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(found: Callable[[], object], seconds: float = 240) -> object:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def lines(run: Path) -> list[dict]:
    return read_records(run / "metrics.jsonl")[0]


def alive(runs: list[Path], driver: int) -> tuple[int, Path] | None:
    """Return process and folder of a trial of this driver that has trained some steps and is not at its end."""
    for run in runs:
        holder = holder_of(run) if run.is_dir() else None
        if holder is not None and 3 <= len(lines(run)) < STEPS:
            with contextlib.suppress(psutil.Error):
                if driver in (parent.pid for parent in psutil.Process(holder.pid).parents()):
                    return holder.pid, run
    return None


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes of Ray and of ours that work for the sweep in `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder):
                found.append(process)
    return found


def assert_nothing_left(folder: Path) -> None:
    """Assert that no process of the sweep is alive 15 s after its end, and no folder of Ray is left."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    assert not list(folder.glob("runs/*/ray*"))


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a sweep whose driver was killed once, and in its second start one of its trials."""
    folder = tiny_sweep.world(tmp_path_factory.mktemp("sweep"))
    target = {"target": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 4}, "tracking": {"mlflow": True}}
    file = tiny_sweep.write(folder, tiny_sweep.plain(folder, run=target))
    runs = [folder / "runs" / "tiny" / f"trial-{number:03d}-s{seed}" for number in (0, 1) for seed in (0, 1)]
    first = start(file)
    wait_for(lambda: alive(runs, first.pid) or first.poll() is not None)
    exposed = [one.laddr for process in processes_of(folder) for one in listening(process) if not is_loopback(one.laddr.ip)]
    assert exposed == []
    first.kill()
    first.communicate()
    second = start(file, "--resume")
    pid, killed = wait_for(lambda: alive(runs, second.pid) or second.poll() is not None)  # type: ignore[misc]
    os.kill(pid, signal.SIGKILL)
    text, _ = second.communicate(timeout=500)
    assert second.returncode == 0, text
    assert f"{killed.name} (" in text
    assert "starts again after failure 1" in text
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
        assert [{**line, "time": 0} for line in found if line["stage"] != "sweep"] == [{**line, "time": 0} for line in expected]
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
        expected: dict[str, list] = {}
        for record in lines(folder):
            for name, value in record["metrics"].items():
                expected.setdefault(metric_key(record["stage"], name), []).append((record["step"], value))
        history = {name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert {name: sorted(points) for name, points in history.items()} == expected
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

    mlflow.set_tracking_uri(f"sqlite:///{disturbed / 'runs' / 'mlflow.db'}")
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
