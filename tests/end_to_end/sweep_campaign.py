"""`make sweep-campaign`: kill the driver of a sweep at random moments, restore it each time, and compare with undisturbed runs.

python tests/end_to_end/sweep_campaign.py FOLDER KILLS SEED
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import tiny_run
import tiny_sweep
from safetensors.torch import load_file
from test_sweep import STEPS, assert_nothing_left, lines, start

from bpt_dist import config as configuration
from bpt_dist.files import read_json
from bpt_dist.tracking import connect, metric_key

LATEST_KILL = 75.0  # seconds after a start: Ray and the imports of the trials need some twenty


def main(folder: Path, kills: int, seed: int) -> None:
    """Run the campaign and say what was found."""
    source = random.Random(seed)
    tiny_sweep.world(folder)
    run = {"target": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 4}, "tracking": {"mlflow": True}}
    space = {"method.sigma_relative": [0.1, 1.0, 10.0], "method.lr_full": [0.1, 0.3]}
    file = tiny_sweep.write(folder, tiny_sweep.plain(folder, run=run, space=space))
    say(f"seed {seed}, {kills} kills, 12 trials of {STEPS} steps")
    done = 0
    while done < kills:
        driver = start(file, "--resume")
        moment = source.uniform(3.0, LATEST_KILL)
        began = time.monotonic()
        while time.monotonic() - began < moment and driver.poll() is None:
            time.sleep(0.05)
        if driver.poll() is not None:
            say(f"the sweep ended before kill {done + 1}: {finished(folder)} trials finished; longer trials give more moments")
            break
        driver.kill()
        driver.communicate()
        done += 1
        say(f"kill {done} after {moment:.1f} s: {finished(folder)} trials finished")
    driver = start(file, "--resume")
    text, _ = driver.communicate(timeout=1200)
    assert driver.returncode == 0, text
    check(folder)
    assert_nothing_left(folder)
    say(f"{done} kills: 12 trials once each, prompts and points as undisturbed, no process left")


def finished(folder: Path) -> int:
    """Return how many trials have finished."""
    return len(list((folder / "runs" / "tiny").glob("trial-*/results.json")))


def check(folder: Path) -> None:
    """Compare every trial with the same configuration trained alone, and MLflow with the metrics, point by point."""
    client = connect(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "tiny")
    mirrored = {run.data.tags["bpt.run_id"]: run for run in client.search_runs([experiment.experiment_id])}
    trials = read_json(folder / "runs" / "tiny" / "sweep.json")["trials"]
    assert len(trials) == len(mirrored) == len({one["name"] for one in trials}) == 12
    for one in trials:
        assert one["state"] == "finished", one
        config = configuration.load(
            folder / "runs" / "tiny" / "configs" / f"{one['name']}.yaml", ["mlflow=false", "experiment=null"]
        )
        alone = config.model_copy(update={"run_dir": folder / "runs" / "alone" / config.name})
        tiny_run.trained(alone)
        prompts = [run.directory / "target" / "mood" / "adapter" / "adapter_model.safetensors" for run in (config, alone)]
        tiny_run.assert_same(load_file(prompts[0]), load_file(prompts[1]))
        expected: dict[str, list] = {}
        for record in lines(config.directory):
            for name, value in record["metrics"].items():
                expected.setdefault(metric_key(record["stage"], name), []).append((record["step"], value))
        run = mirrored[read_json(config.directory / "run.json")["id"]]
        history = {name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert {name: sorted(points) for name, points in history.items()} == expected
        assert run.info.status == "FINISHED"


def say(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
