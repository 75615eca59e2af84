"""F3: a full disk ends a run with 74 and loses nothing; with space again the same command resumes to the undisturbed bits."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_figures import measured
from hooks import FileSizeLimit, Filling
from oracle import stage_folders
from server import ForkServer
from trials import Job, Trials

POINTS = (
    "run.opened", "metrics.before_append,stage=source,step=1", "metrics.before_append,stage=target/count,step=2",
    "ckpt.before_write,step=2", "ckpt.before_write,step=4", "ckpt.before_rename,step=4", "ckpt.before_write,step=3",
    "posterior.before_write", "export.before_write,task=mood", "export.before_write,task=count",
    "results.before_write,stage=target/mood", "stage.finished,stage=target/count",
)  # fmt: skip


def can_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="a size-limited tmpfs needs root; file-size limits are tested anyway")


@pytest.fixture(scope="module")
def confined() -> Iterator[ForkServer]:
    """A fork server whose mounts nobody else sees; they end with it."""
    with ForkServer(mounts=True) as found:
        yield found


def mount(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder], check=True)


def checkpoints_verify(run: Path) -> int:
    from oracle import states

    states(run)
    return len(stage_folders(run))


def free_and_copy(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target)


def free(folder: Path) -> None:
    (folder / "ballast").unlink()


@needs_mounts
@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_loses_nothing(point: str, trials: Trials, confined: ForkServer) -> None:
    with measured("F3", "tmpfs in a mount namespace", point):
        job = trials.job()
        seen = Job(confined, job.world, job.folder)  # the same run, from inside the namespace
        disk = job.folder / "runs"
        confined.call(mount, disk, 4 << 20)
        seen.directory = Path(f"/proc/{confined.process.pid}/root{seen.directory}")
        ended = seen.start(f"{point},fill:0", prepare=Filling(disk))
        assert ended.codes == [74], ended.screen
        assert "No space left on device" in ended.screen
        assert not list(seen.directory.rglob("step-*.tmp-*"))
        before = confined.call(checkpoints_verify, job.directory)
        assert before or not point.startswith(("posterior", "export", "results", "stage"))
        confined.call(free, disk)
        seen.finish()
        job.directory = seen.directory
        trials.assert_as_undisturbed(job)


@pytest.mark.parametrize("num_bytes", [600, 2500])
def test_a_file_that_may_not_grow_is_a_full_disk(num_bytes: int, trials: Trials) -> None:
    """600 bytes end in the metrics, 2,500 in a checkpoint."""
    with measured("F3", "file-size limit", str(num_bytes)):
        job = trials.job()
        ended = job.start(prepare=FileSizeLimit(num_bytes))
        assert ended.codes == [74], ended.screen
        assert "rerun the same command to resume" in ended.screen
        job.finish()
        trials.assert_as_undisturbed(job)
