"""F17, F20, F25: the number of ranks, the clock, the order of a listing and the hash seed change nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from fault_figures import measured, record_figure
from hooks import Clock, Listing
from oracle import assert_close_run, assert_same_run, final_hash
from server import REPOSITORY
from trials import Job, Trials

FULL = os.environ.get("FAULTS") == "full"
EXACT = {"distribution": {"exact": True}}
LONG = {"source": {"steps": 8}}
# After so many steps of the source stage the next start has another number of ranks.
CHANGES = (
    (1, 2, 3, 1), (3, 1, 2, 3), (2, 1, 3, 2), (1, 3, 1, 3), (3, 3, 2, 1), (2, 3, 2, 3), (1, 1, 2, 2), (2, 2, 1, 1), (3, 2, 3, 2),
    (1, 2, 1, 2),
)  # fmt: skip


def resumed(job: Job, sizes: tuple[int, ...]) -> None:
    """Stop after steps 2 and 4 of the source stage and in the target stage, and resume with the next number of ranks."""
    stops = (
        "step.after_update,stage=source,step=2",
        "step.after_update,stage=source,step=5",
        "step.after_update,stage=target/mood,step=1",
    )
    for size, stop in zip(sizes, stops, strict=False):
        assert set(job.start(f"{stop},kill", size).codes) == {-9}
    job.finish(sizes[-1])


@pytest.mark.parametrize("sizes", CHANGES if FULL else CHANGES[:4], ids=str)
def test_the_same_bits_on_changing_numbers_of_ranks(sizes: tuple[int, ...], trials: Trials) -> None:
    with measured("F17", "exact: true, three changes", str(sizes)):
        job = trials.job(**EXACT, **LONG)
        resumed(job, sizes)
        trials.assert_as_undisturbed(job, 1, **EXACT, **LONG)


@pytest.mark.parametrize("sizes", CHANGES[:3], ids=str)
def test_close_without_exact_sums(sizes: tuple[int, ...], trials: Trials) -> None:
    with measured("F17", "default sums, three changes", str(sizes)) as figures:
        job = trials.job(**LONG)
        resumed(job, sizes)
        figures["worst_relative_difference"] = float(f"{assert_close_run(job.directory, trials.reference(1, **LONG)):.1e}")


def test_ranks_without_texts_take_part_and_are_reported(trials: Trials) -> None:
    with measured("F17", "more ranks than texts"):
        job = trials.job(source={"batch_size": 1}, method={"num_particles": 1}, target={"batch_size": 2})
        ended = job.start("", 3)
        assert ended.codes == [0, 0, 0], ended.screen
        assert "1 of 3 ranks have no texts" in ended.screen


@pytest.mark.parametrize(("hours", "zone"), product((-24, 24, -1), ("UTC", "Asia/Kathmandu")))
def test_clocks_choose_no_checkpoint(hours: float, zone: str, trials: Trials) -> None:
    with measured("F20", "clock shifted between the starts", f"{hours} h, {zone}"):
        job = trials.job()
        job.start("ckpt.after_rename,step=2,kill", prepare=Clock(0))
        job.start("stage.finished,stage=source,kill", prepare=Clock(hours, zone))
        job.finish(prepare=Clock(-hours))
        trials.assert_as_undisturbed(job)


@pytest.mark.parametrize("seconds", [0, 1, -86400, 86400])
def test_time_stamps_choose_no_checkpoint(seconds: int, trials: Trials) -> None:
    """The older checkpoint looks newer, or both the same."""
    with measured("F20", "time stamps of the folders changed", str(seconds)):
        job = trials.job()
        job.start("stage.finished,stage=source,kill")
        folder = job.directory / "source" / "checkpoints"
        for number, step in enumerate(sorted(folder.iterdir(), reverse=True)):
            for place in (step, *step.iterdir()):
                os.utime(place, (10**9 + seconds * number,) * 2)
        ended = job.start()
        assert "resuming at step 4" in (job.directory / "logs" / "rank-0.log").read_text()
        assert ended.codes == [0]
        trials.assert_as_undisturbed(job)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_a_listing_is_irrelevant(seed: int, trials: Trials) -> None:
    with measured("F25", "shuffled directory listings", str(seed)):
        job = trials.job()
        job.start("stage.finished,stage=target/mood,kill", prepare=Listing(seed))
        job.finish(prepare=Listing(seed + 10))
        trials.assert_as_undisturbed(job)


def test_five_runs_have_one_hash(trials: Trials) -> None:
    with measured("F25", "2 ranks, five runs", trials=5):
        hashes = set()
        for _ in range(5):
            job = trials.job()
            job.finish(2)
            hashes.add(final_hash(job.directory))
        assert len(hashes) == 1


def test_the_hash_seed_and_the_process_are_irrelevant(trials: Trials) -> None:
    """A fresh interpreter with another seed, not a fork."""
    with measured("F25", "fresh interpreter, other hash seed"):
        job = trials.job()
        environment = {**os.environ, "PYTHONHASHSEED": "4321", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, REPOSITORY / "launcher" / "train.py", "--config", job.config]
        subprocess.run(command, env=environment, check=True, timeout=300, cwd=REPOSITORY, capture_output=True)
        trials.assert_as_undisturbed(job)


class Threads:
    """So many threads a rank."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, rank: int) -> None:
        import torch

        torch.set_num_threads(self.number)


def test_two_threads_agree_to_rounding_and_the_figure_says_whether_to_the_bit(trials: Trials) -> None:
    job = trials.job()
    job.finish(prepare=Threads(2))
    worst = assert_close_run(job.directory, trials.reference(1))
    record_figure(
        "F25", "2 threads against 1 (documented, not promised)", worst_relative_difference=worst, same_bits=str(worst == 0)
    )


def test_a_copied_run_directory_is_the_same_run(trials: Trials, tmp_path: Path) -> None:
    job = trials.job()
    job.start("stage.finished,stage=source,kill")
    copy = Job(trials.server, trials.world, tmp_path / "copy")
    shutil.copytree(job.directory, copy.directory)
    copy.finish()
    assert_same_run(copy.directory, trials.reference())
