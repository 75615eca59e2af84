"""F12, F11: what happens to one trial of a sweep, or to the tracking server beside it, harms neither it nor the others.

The driver and a trial's process of an `adapt` sweep are killed in tests/end_to_end/test_sweep.py.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import tiny_run
import tiny_sweep
from fault_figures import measured
from outages import Relay
from records import repeatable
from safetensors.torch import load_file
from sweep_process import assert_nothing_left, lines, points_of, processes_of, start, wait_for
from test_full_disk import needs_mounts

from bpt_dist import config as configuration
from bpt_dist.commands.sweep.record import Record
from bpt_dist.commands.sweep.settings import load
from bpt_dist.config import RunConfig
from bpt_dist.storage.files import read_json
from bpt_dist.tracking.store import connect
from bpt_dist.tracking.ui import ui

pytestmark = pytest.mark.timeout(600)
STEPS = 12


def config_of(folder: Path, name: str) -> RunConfig:
    return configuration.load(
        folder / "runs" / "tiny" / "configs" / f"{name}.yaml", ["mlflow=false", "uri=null", "experiment=null"]
    )


def assert_as_alone(folder: Path, name: str) -> None:
    """Assert that a trial ended with the bits of the same configuration trained by itself, and logged each step once."""
    config = config_of(folder, name)
    alone = config.model_copy(update={"run_dir": folder / "runs" / "alone" / name})
    tiny_run.trained(alone)
    found, expected = (repeatable(line for line in lines(run.directory) if line["stage"] != "sweep") for run in (config, alone))
    assert found == expected
    for file in sorted(alone.directory.glob("*/*/adapter/adapter_model.safetensors")):
        tiny_run.assert_same(load_file(config.directory / file.relative_to(alone.directory)), load_file(file))


def standings(folder: Path) -> dict[str, tuple[str, str | None]]:
    trials = read_json(folder / "runs" / "tiny" / "sweep.json")["trials"]
    return {one["name"]: (one["state"], one["reason"]) for one in trials}


@needs_mounts
def test_a_full_disk_of_one_trial_is_its_own(tmp_path: Path) -> None:
    """One trial's folder is a file system of a few pages: it cannot even write down why it fails."""
    folder = tiny_sweep.world(tmp_path)
    space = {"method.sigma_relative": [0.1, 1.0, 10.0], "method.lr_full": [0.1]}
    file = tiny_sweep.write(folder, tiny_sweep.plain(folder, space=space, seeds=[0], max_failures=1))
    Record.open(load(file), resume=False)
    small = folder / "runs" / "tiny" / "trial-001-s0"
    small.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o size=96k,mode=700 tmpfs "{small}" && exec "$@"'
    with measured("F12", "disk full in one of 3 trials"):
        driver = start(file, "--resume", prefix=["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"])
        text, _ = driver.communicate(timeout=300)
        assert driver.returncode == 70, text
        (again,) = (line for line in text.splitlines() if "trial-001-s0 (sigma_relative=1 lr_full=0.1 s0) starts again" in line)
        assert "after failure 1: " in again
        assert "No space left on device" in again
        assert "Traceback" not in text
        states = standings(folder)
        assert [states[f"trial-00{number}-s0"][0] for number in (0, 1, 2)] == ["finished", "failed", "finished"]
        assert "No space left on device" in (states["trial-001-s0"][1] or "")
        table = text.partition("validation")[2]
        assert "1 failed (" in table
        assert "No space left on device" in table
        assert "trial-001-s0 failed: " in table
        assert_as_alone(folder, "trial-000-s0")
        assert_nothing_left(folder)
    with measured("F12", "the same sweep with space again"):
        again = start(file, "--resume")
        text, _ = again.communicate(timeout=300)
        assert again.returncode == 0, text
        assert "1 of 3 trials to run" in text
        assert_as_alone(folder, "trial-001-s0")
        assert_nothing_left(folder)


@needs_mounts
def test_a_full_disk_of_the_whole_sweep_is_said_in_one_line(tmp_path: Path) -> None:
    folder = tiny_sweep.world(tmp_path)
    small = folder / "small"
    small.mkdir()
    file = tiny_sweep.write(folder, tiny_sweep.plain(folder, seeds=[0], max_failures=0, output=str(small)))
    mount = f'mount -t tmpfs -o size=180k,mode=700 tmpfs "{small}" && exec "$@"'
    with measured("F12", "disk of the whole sweep full"):
        driver = start(file, prefix=["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"])
        text, _ = driver.communicate(timeout=300)
        # The sweep itself or, where its own files still found room, each of its trials.
        place = {74: small, 70: "trial-00[01]-s0 failed: "}[driver.returncode]
        assert re.search(f"^{place}.*[Nn]o space left on", text.splitlines()[-1]), text
        assert "Traceback" not in text
        assert_nothing_left(folder)


def ranks_of(folder: Path) -> list[int]:
    """Return the processes that have a rank's log of the trial open."""
    found = {}
    for process in processes_of(folder):
        for rank in (0, 1):
            log = folder / "runs" / "tiny" / "trial-000-s0" / "logs" / f"rank-{rank}.log"
            try:
                if str(log) in [opened.path for opened in process.open_files()]:
                    found[rank] = process.pid
            except psutil.Error:
                pass
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("rank", [0, 1] if os.environ.get("FAULTS") == "full" else [1])
def test_a_killed_rank_of_a_trial_is_started_again(rank: int, tmp_path: Path) -> None:
    tiny_run.world(tmp_path)
    plain = tiny_sweep.of_source(tmp_path, STEPS, target={"steps": 4})
    file, run = tiny_sweep.write(tmp_path, plain), tmp_path / "runs" / "tiny" / "trial-000-s0"
    with measured("F12", "a rank of a Ray Train trial killed", str(rank)) as figures:
        # A quarter of a second for each step: the rank is killed between two of them, not before the first or after the last.
        driver = start(file, BPT_FAULT="step.before_forward,stage=source,sleep:0.25")
        wait_for(lambda: len(lines(run)) >= 5 or driver.poll() is not None)
        os.kill(ranks_of(tmp_path)[rank], signal.SIGKILL)
        began = time.monotonic()
        text, _ = driver.communicate(timeout=400)
        figures["worst_seconds"] = round(time.monotonic() - began, 1)
        assert driver.returncode == 0, text
        assert "trial-000-s0 (kernel=imq s0) starts again after failure 1" in text
        openings = read_json(run / "run.json")["openings"]
        assert [opening["world_size"] for opening in openings] == [2, 2]
        assert standings(tmp_path) == {"trial-000-s0": ("finished", None)}
        assert [line["step"] for line in lines(run) if line["stage"] == "source"] == list(range(1, STEPS + 1))
        undisturbed = alone_on_two_ranks(tmp_path)
        place = Path("source") / "posterior" / "posterior.safetensors"
        tiny_run.assert_same(load_file(run / place), load_file(undisturbed / place))
        assert_nothing_left(tmp_path)


def alone_on_two_ranks(folder: Path) -> Path:
    """Train the trial's configuration as two ranks without Ray and return its folder."""
    from server import ForkServer, Start

    config, alone = folder / "runs" / "tiny" / "configs" / "trial-000-s0.yaml", folder / "runs" / "alone"
    with ForkServer() as server:
        ended = server.start(Start(config, 2, words=(f"run_dir={alone}",)))
    assert ended.codes == [0, 0], ended.screen
    return alone


def test_a_server_that_comes_and_goes_beside_a_sweep_has_every_point_once(tmp_path: Path) -> None:
    """Away when the sweep starts, there, away again in the middle, back, and away at the end; `--resume` sends what is missing."""
    folder = tiny_sweep.world(tmp_path)
    page = ui(f"sqlite:///{folder / 'mlflow.db'}")
    try:
        with measured("F11", "a sweep, server away at start, middle and end") as figures:
            figures.update(come_and_go(folder, page.address))
    finally:
        page.close()


def come_and_go(folder: Path, address: str) -> dict[str, float]:
    """Run the sweep while its server comes and goes, resume it, and return the figures."""
    with Relay(int(address.rpartition(":")[2])) as relay:
        relay.set("refused")
        tracking = {"mlflow": True, "uri": f"http://127.0.0.1:{relay.port}"}
        plain = tiny_sweep.plain(folder, run={"tracking": tracking, "target": {"steps": STEPS}}, concurrency=1)
        file = tiny_sweep.write(folder, plain)
        driver = start(file, BPT_FAULT="step.before_forward,sleep:0.2")
        runs = [folder / "runs" / "tiny" / f"trial-{number:03d}-s{seed}" for number in (0, 1) for seed in (0, 1)]
        moments = zip(("open", "refused", "open", "refused"), ((0, 6), (1, 6), (2, 2), (3, 6)), strict=True)
        for mode, (number, num_lines) in moments:
            wait_for(lambda: len(lines(runs[number])) >= num_lines or driver.poll() is not None)  # noqa: B023
            relay.set(mode)
        wait_for(lambda: (runs[3] / "results.json").is_file() or driver.poll() is not None)
        began = time.monotonic()
        text, _ = driver.communicate(timeout=300)
        seconds = round(time.monotonic() - began, 1)
        assert driver.returncode == 0, text
        assert text.count(f"tracking: nobody answers at http://127.0.0.1:{relay.port}") == 1  # once, when the sweep starts
        assert text.count("the tracking store did not get all of the sweep") == 1
        assert [state for state, _ in standings(folder).values()] == ["finished"] * 4
        relay.set("open")
        again = start(file, "--resume")
        text, _ = again.communicate(timeout=300)
        assert again.returncode == 0, text
        assert "did not get all" not in text
        assert_nothing_left(folder)
        return {"worst_end_seconds": seconds, "points": assert_mirrored(address, runs)}


def assert_mirrored(uri: str, runs: list[Path]) -> int:
    """Assert that the server holds the records of each run once and no other run, and return their number."""
    client, num_points = connect(uri), 0
    (experiment,) = (one for one in client.search_experiments() if one.name == "tiny")
    mirrored = {run.data.tags["bpt.run_id"]: run for run in client.search_runs([experiment.experiment_id])}
    assert len(mirrored) == len(runs)
    for folder in runs:
        run, expected = mirrored[read_json(folder / "run.json")["id"]], points_of(folder)
        history = {name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        assert {name: sorted(points) for name, points in history.items()} == expected
        assert run.info.status == "FINISHED"
        num_points += sum(map(len, expected.values()))
    assert client.get_model_version_by_alias("tiny-mood", "champion").run_id in {run.info.run_id for run in mirrored.values()}
    return num_points
