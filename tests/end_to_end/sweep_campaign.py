"""`make sweep-campaign`: kill the driver of a sweep at random moments, restore it each time, and compare with undisturbed runs.

python tests/end_to_end/sweep_campaign.py FOLDER KILLS SEED
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny_run
import tiny_sweep
from fault_figures import record_figure
from safetensors.torch import load_file
from sweep_process import assert_nothing_left, lines, points_of, start

from bpt_dist import config as configuration
from bpt_dist.storage.files import read_json
from bpt_dist.tracking.store import connect

STEPS, NUM_TRIALS = 24, 12
LAST_KILL = 0.8  # of all steps: so much is left that no start can end the sweep before it
START_SECONDS = (
    1.0,
    25.0,
)  # when a start is killed that has nothing to wait for: Ray and the imports of the trials need some twenty
LONGEST_START = 300.0


def main(folder: Path, kills: int, seed: int) -> None:
    """Run the campaign and say what was found."""
    source = random.Random(seed)
    tiny_sweep.world(folder)
    run = {"target": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 4}, "tracking": {"mlflow": True}}
    space = {"method.sigma_relative": [0.1, 1.0, 10.0], "method.lr_full": [0.1, 0.3]}
    file = tiny_sweep.write(folder, tiny_sweep.plain(folder, run=run, space=space))
    say(f"seed {seed}, {kills} kills, {NUM_TRIALS} trials of {STEPS} steps")
    for number, moment in enumerate(sorted(source.uniform(0, LAST_KILL) for _ in range(kills)), 1):
        driver = start(file, "--resume")
        try:
            await_moment(folder, driver, moment, source.uniform(*START_SECONDS))
        finally:
            driver.kill()
            text, _ = driver.communicate()
        assert driver.returncode == -signal.SIGKILL, text
        where = f"{progress(folder):.0%} of all steps (drawn: {moment:.0%})"
        say(f"kill {number} of {kills} at {where}: {finished(folder)} trials finished")
    driver = start(file, "--resume")
    text, _ = driver.communicate(timeout=1200)
    assert driver.returncode == 0, text
    check(folder)
    assert_nothing_left(folder)
    say(f"{kills} kills: {NUM_TRIALS} trials once each, prompts and points as undisturbed, no process left")
    record_figure("F12", "driver killed at random moments", case=str(seed), trials=kills, passed=kills)


def await_moment(folder: Path, driver: subprocess.Popen[str], moment: float, seconds: float) -> None:
    """Wait until so much of all steps is done; where it is done already, some seconds of a start that is still finding its way."""
    began, before = time.monotonic(), progress(folder)
    while driver.poll() is None:
        passed = time.monotonic() - began
        assert passed < LONGEST_START, f"no progress beyond {progress(folder):.0%} of all steps"
        if (passed >= seconds) if before >= moment else (progress(folder) >= moment):
            return
        time.sleep(0.02)


def progress(folder: Path) -> float:
    """Return the share of all steps that are logged."""
    logs = (folder / "runs" / "tiny").glob("trial-*/metrics.jsonl")
    done = sum(
        line["stage"].startswith("target/") and "target/loss" in line["metrics"] for log in logs for line in lines(log.parent)
    )
    return done / (STEPS * NUM_TRIALS)


def finished(folder: Path) -> int:
    """Return how many trials have finished."""
    return len(list((folder / "runs" / "tiny").glob("trial-*/results.json")))


def check(folder: Path) -> None:
    """Compare every trial with the same configuration trained alone, and MLflow with the metrics, point by point."""
    client = connect(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "tiny")
    mirrored = {run.data.tags["bpt.run_id"]: run for run in client.search_runs([experiment.experiment_id])}
    trials = read_json(folder / "runs" / "tiny" / "sweep.json")["trials"]
    assert len(trials) == len(mirrored) == len({one["name"] for one in trials}) == NUM_TRIALS
    for one in trials:
        assert one["state"] == "finished", one
        config = configuration.load(
            folder / "runs" / "tiny" / "configs" / f"{one['name']}.yaml", ["mlflow=false", "experiment=null"]
        )
        alone = config.model_copy(update={"run_dir": folder / "runs" / "alone" / config.name})
        tiny_run.trained(alone)
        prompts = [run.directory / "target" / "mood" / "adapter" / "adapter_model.safetensors" for run in (config, alone)]
        tiny_run.assert_same(load_file(prompts[0]), load_file(prompts[1]))
        run = mirrored[read_json(config.directory / "run.json")["id"]]
        history = {name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert {name: sorted(points) for name, points in history.items()} == points_of(config.directory)
        assert run.info.status == "FINISHED"


def say(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
