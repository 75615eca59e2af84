"""Rank variables of every launcher; the SLURM values are those documented for `srun`, there is no SLURM in the tests."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from bpt_dist.distributed import environment as ranks
from bpt_dist.errors import ConfigError

# Task 5 of `srun --nodes 3 --ntasks 7` on gpu008, gpu009 and gpu015: two, two and three tasks.
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_JOB_NODELIST": "gpu[003-020]", "SLURM_STEP_NODELIST": "gpu[008-009,015]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}  # fmt: skip


def adopted(**environment: str) -> dict[str, str]:
    ranks.adopt(environment)
    return environment


def test_srun_gives_every_variable_that_torch_reads():
    found = adopted(**SRUN)
    assert {name: found[name] for name in (*ranks.NEEDED, "LOCAL_WORLD_SIZE")} == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu008",
        "MASTER_PORT": str(20_000 + (16 * 4711 + 2) % 12_000), "LOCAL_WORLD_SIZE": "3",
    }  # fmt: skip


def test_what_a_launcher_or_the_user_set_is_never_replaced():
    torchrun = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
    assert adopted(**SRUN, **torchrun) == SRUN | torchrun
    chosen = adopted(**SRUN, MASTER_ADDR="10.1.1.1", MASTER_PORT="4000")
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"], chosen["RANK"]) == ("10.1.1.1", "4000", "5")


def test_alone_needs_no_variables():
    assert adopted() == {}
    one_task = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert adopted(**one_task) == one_task
    # A batch script that calls python without srun is one process, though SLURM_PROCID and SLURM_NTASKS are set.
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert adopted(**batch) == batch


def test_local_rank_is_not_derived_from_rank():
    with pytest.raises(ConfigError, match="set without LOCAL_RANK"):
        adopted(RANK="3", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")
    without = {name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}
    with pytest.raises(ConfigError, match="LOCAL_RANK: is no number"):
        adopted(**without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "7"}, "do not fit WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK: is no number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE: is no number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: is no number"),
    ],
    ids=str,
)
def test_variables_that_make_no_sense_are_refused(change, message):
    good = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    assert adopted(**good) == good
    with pytest.raises(ConfigError, match=message):
        adopted(**good | change)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("a,b", "a"), ("gpu[3-5]", "gpu3"), ("gpu[007,009-010],login", "gpu007"),
        ("rack[1-2]n[04-07]", "rack1n04"), ("login,gpu[1-2]", "login"), ("n[1]-ib,x", "n1-ib"),
    ],
)  # fmt: skip
def test_first_name_of_a_node_list(nodes, first):
    assert ranks.first_host(nodes) == first


def test_steps_and_jobs_that_share_a_node_use_different_ports():
    ports = {adopted(**SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
             for job in range(4700, 4800) for step in range(4)}  # fmt: skip
    assert len(ports) == 400
    assert all(1024 < int(port) < 32768 for port in ports)


@pytest.mark.parametrize("left", [{"MASTER_ADDR": "node001"}, {"MASTER_PORT": "29500"}, {"LOCAL_RANK": "3"},
                                  {"MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}])  # fmt: skip
def test_variables_left_in_a_shell_make_no_job(left: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        adopted(**left)
    assert not ranks.is_launched(left)
    (line,) = caplog.messages
    assert "set without RANK" in line
    assert all(name in line for name in left if name != "WORLD_SIZE")


def test_a_process_with_left_variables_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bpt_dist.distributed.mesh import World

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node001")
    assert World.start(5).size == 1


@pytest.mark.parametrize(
    ("variables", "read"),
    [({}, False), ({"CROSS_SIZE": "1"}, False), ({"CROSS_SIZE": "2"}, True), ({"WORLD_SIZE": "8"}, False)],
)  # fmt: skip
def test_shells_read_the_command_line_of_deepspeed_on_several_hosts(variables: dict[str, str], read: bool) -> None:
    assert ranks.passed_through_shells(variables) is read


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without HOME whom /etc/passwd does not know; returns the temporary folder."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(nowhere))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    ranks.cache_home.cache_clear()
    yield tmp_path
    ranks.cache_home.cache_clear()


def test_a_user_without_a_home_gets_a_private_cache_and_one_warning(no_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ranks.home_folder() is None
    with caplog.at_level(logging.WARNING):
        assert ranks.cache_home() == ranks.cache_home() == no_home / f"bpt_dist-{os.getuid()}" / ".cache"
    assert stat.S_IMODE((no_home / f"bpt_dist-{os.getuid()}").stat().st_mode) == 0o700
    (line,) = caplog.messages
    assert "no home directory" in line
    assert "set data.cache= or HOME=" in line


def test_other_libraries_find_that_folder_as_their_home(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    ranks.prepare_process()
    assert os.environ["HOME"] == str(no_home / f"bpt_dist-{os.getuid()}")


@pytest.mark.parametrize("spoilt", ["link", "file", "writable by others"])
def test_a_cache_that_others_could_write_is_refused(no_home: Path, spoilt: str) -> None:
    folder = no_home / f"bpt_dist-{os.getuid()}"
    if spoilt == "link":
        folder.symlink_to(no_home)
    elif spoilt == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"set data\.cache= or HOME="):
        ranks.cache_home()


def test_a_home_that_cannot_be_written_is_none_for_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in `docker run --user`, where HOME is / or another folder of root."""
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    ranks.cache_home.cache_clear()
    assert ranks.cache_home() == tmp_path / f"bpt_dist-{os.getuid()}" / ".cache"
    assert "the home directory /proc cannot be written" in caplog.text
    ranks.cache_home.cache_clear()


def test_a_relative_home_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "relative/home")
    assert ranks.home_folder() is None
