"""The run directory: one live process, no silent fresh start, a status that is true."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from bpt_dist.errors import ConfigError, DataError, NonFinite, PeerLost, Stopped, StorageError, exit_code
from bpt_dist.storage import lock as lock_module
from bpt_dist.storage.files import encode_json
from bpt_dist.storage.lock import RunLock, holder_of
from bpt_dist.storage.run_directory import RunDirectory, read_status


def open_run(folder, fingerprint="f", changed=lambda old: ["target.steps: 100 -> 200"], **keywords):
    return RunDirectory.open("name: x\n", fingerprint, changed, folder, **keywords)


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_from_start_to_finish(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, extra={"command": "deepspeed launcher/train.py --config c.yaml"}) as run:
        assert (folder.stat().st_mode & 0o777) == 0o700
        assert status_of(folder)["state"] == "created"
        run.status("running", step=3, stage="source")
        assert read_status(folder).state == "running"
        assert not run.resumed
    with pytest.raises(Stopped), open_run(folder, extra={"command": "again"}) as run:
        assert run.resumed
        raise Stopped("SIGTERM; checkpoint of step 7 written")
    assert status_of(folder) | {"updated": 0} == {
        "state": "stopped",
        "reason": "SIGTERM; checkpoint of step 7 written",
        "step": 3,
        "stage": "source",
        "next": "again",
        "updated": 0,
    }
    with open_run(folder) as run:
        run.status("finished", step=9)
    record = json.loads((folder / "run.json").read_text())
    assert len(record["openings"]) == 3
    assert {"python", "packages", "git", "host", "argv", "world_size"} <= set(record["openings"][0])
    with open_run(folder) as run:
        assert run.finished
    assert json.loads((folder / "run.json").read_text()) == record, "a finished run is left alone"
    assert (folder / "config.yaml").read_text() == "name: x\n"
    assert not (folder / "run.lock").exists()


def test_a_run_whose_process_is_gone_has_failed(tmp_path):
    script = (
        "import sys, os; from pathlib import Path; from bpt_dist.storage.run_directory import RunDirectory\n"
        "run = RunDirectory.open('name: x\\n', 'f', lambda old: [], Path(sys.argv[1])); run.status('running')\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=False)
    assert status_of(tmp_path / "run")["state"] == "running"
    assert read_status(tmp_path / "run").state == "failed"
    with open_run(tmp_path / "run") as run:
        assert run.resumed
    opening = json.loads((tmp_path / "run" / "run.json").read_text())["openings"][-1]
    assert "pid" in opening["taken_from"]
    assert "taken over" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def test_a_second_live_run_is_refused_with_host_and_pid(tmp_path):
    with open_run(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"host .*, pid {os.getpid()}") as refused:
            open_run(tmp_path / "run")
        assert exit_code(refused.value) == 2
        assert (tmp_path / "run" / "run.lock").exists()


def test_another_configuration_is_refused_with_what_changed(tmp_path):
    open_run(tmp_path / "run").close()
    with pytest.raises(ConfigError, match=r"(?s)target\.steps: 100 -> 200.*another name=.*--fresh"):
        open_run(tmp_path / "run", fingerprint="g")
    assert holder_of(tmp_path / "run") is None
    with open_run(tmp_path / "run") as run:
        assert run.resumed


def test_a_record_of_another_version_is_taken_over_and_its_fingerprint_stays(tmp_path):
    """Checkpoints carry the first fingerprint; the second is remembered, so that the next resume need not ask again."""
    open_run(tmp_path / "run", fingerprint="old").close()
    asked = []
    with open_run(tmp_path / "run", fingerprint="new", is_same=lambda record: asked.append(record["fingerprint"]) or True) as run:
        assert run.resumed
        assert run.fingerprint == "old"
    with open_run(tmp_path / "run", fingerprint="new") as run:
        assert run.fingerprint == "old"
    assert asked == ["old"]
    with pytest.raises(ConfigError, match=r"target\.steps: 100 -> 200"):
        open_run(tmp_path / "run", fingerprint="other")


def test_a_choice_is_kept_from_start_to_start(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert run.choice("attention") is None
        run.record_choice("attention", "eager")
    with open_run(tmp_path / "run") as run:
        assert run.choice("attention") == "eager"
        assert len(json.loads((tmp_path / "run" / "run.json").read_text())["openings"]) == 2


def test_fresh_needs_an_empty_directory(tmp_path):
    open_run(tmp_path / "run", fresh=True).close()
    with pytest.raises(ConfigError, match="--fresh needs an empty directory"):
        open_run(tmp_path / "run", fresh=True)


@pytest.mark.parametrize("content", ["config.yaml", "notes.txt", "checkpoints/", ".git/"])
def test_a_foreign_directory_is_refused_and_not_touched(tmp_path, content):
    place = tmp_path / "run" / content
    place.mkdir(parents=True) if content.endswith("/") else (place.parent.mkdir(), place.write_text("mine"))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="is not a run but holds"):
        open_run(tmp_path / "run")
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_run_that_ended_before_its_record_was_written_starts_over(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json.tmp-0123abcd").write_text("{")
    (folder / "run.lock.draft-00").write_text("{}")
    with open_run(folder) as run:
        assert not run.resumed


def test_another_version_is_recorded_and_named(tmp_path, monkeypatch):
    open_run(tmp_path / "run").close()
    monkeypatch.setattr("bpt_dist.storage.run_directory.git_state", lambda: {"commit": "abc", "dirty": False})
    open_run(tmp_path / "run").close()
    assert "resuming with another git" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


BAD_NAMES = [
    "../x",
    "..",
    ".",
    "",
    "/etc",
    "a/../b",
    "a//b",
    "a\0b",
    "A",
    "-x",
    ".x",
    "a b",
    "a\nb",
    "ä",
    "\u2024\u2024",
]
BAD_NAMES += [
    "x" * 65,
    "a;b",
    "a$b",
    "a'b",
    "a\\b",
    "~",
    "a*",
    "a\u200b",
    "a\u202e",
    "con:",
    "a%2e",
    "\x1b[0m",
    "a|b",
    "a&b",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_leave_the_directory_are_refused(tmp_path, name):
    with open_run(tmp_path / "run") as run, pytest.raises(ConfigError, match="no name for a file of a run"):
        run.path("target", name)


def test_links_inside_a_run_and_to_a_run_are_refused(tmp_path):
    with open_run(tmp_path / "run") as run:
        (tmp_path / "run" / "target").symlink_to(tmp_path)
        with pytest.raises(StorageError, match="is a link"):
            run.path("target/boolq")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ConfigError, match="is a link"):
        open_run(tmp_path / "link")
    for bad in ("a\nb", "..", "a b"):
        with pytest.raises(ConfigError, match="run directory"):
            open_run(tmp_path / bad)


def test_only_rank_0_writes_shared_files(tmp_path):
    with open_run(tmp_path / "run", rank=0, world_size=2):
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        with pytest.raises(DataError), open_run(tmp_path / "run", rank=1, world_size=2) as run:
            run.status("running")
            raise DataError("rows.jsonl:3: no label")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert "rows.jsonl:3" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert status_of(tmp_path / "run")["state"] == "created"


def test_logs_hold_no_secret_and_no_control_character(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-123")
    with open_run(tmp_path / "run") as run:
        logging.getLogger("bpt_dist.x").info("text \x1b[31m from data, canary-123, https://me:canary-456@host/")
        run.status("failed", "at https://me:canary-456@host/")
    written = "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert "canary" not in written
    assert "\x1b" not in written
    assert "\\x1b[31m" in written


def test_exit_codes():
    codes = {ConfigError: 2, DataError: 65, PeerLost: 69, StorageError: 74, Stopped: 75, NonFinite: 77}
    assert {kind: exit_code(kind("x")) for kind in codes} == codes
    assert exit_code(None) == 0
    assert exit_code(RuntimeError("x")) == exit_code(MemoryError()) == 70
    assert exit_code(KeyboardInterrupt()) == 75
    assert exit_code(OSError(errno.ENOSPC, "full")) == 74
    assert exit_code(SystemExit(3)) == 3


def hold(folder, barrier, results, all_reported):
    barrier.wait()
    lock = RunLock(folder)
    try:
        lock.acquire()
    except ConfigError:
        results.put(None)
        return
    results.put(os.getpid())
    all_reported.wait(20)
    lock.release()


def race(folder, num):
    context = multiprocessing.get_context("fork")
    barrier, results, all_reported = context.Barrier(num), context.Queue(), context.Event()
    racers = [context.Process(target=hold, args=(folder, barrier, results, all_reported)) for _ in range(num)]
    for racer in racers:
        racer.start()
    winners = [pid for pid in (results.get(timeout=20) for _ in racers) if pid]
    all_reported.set()
    for racer in racers:
        racer.join(timeout=20)
    return winners


def dead_holder(folder, **fields):
    """A lock whose process is gone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    holder = replace(RunLock(folder).me, id="0" * 32, pid=gone.pid, born="1", **fields)
    (folder / "run.lock").write_bytes(encode_json(asdict(holder)))
    return holder


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_exactly_one_gets_the_lock(tmp_path, stale):
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        if stale:
            dead_holder(folder)
        assert len(race(folder, 6)) == 1
        assert not list(folder.iterdir())


def test_a_successor_that_died_half_way_is_succeeded(tmp_path):
    first = dead_holder(tmp_path)
    (tmp_path / f"run.lock.after-{first.id}").write_bytes(encode_json(asdict(replace(first, id="1" * 32))))
    assert len(race(tmp_path, 6)) == 1
    assert not list(tmp_path.iterdir())


def test_an_old_observation_does_not_take_a_lock(tmp_path, monkeypatch):
    # A reads the dead holder X and pauses; B takes over; A continues with what it read.
    stale = dead_holder(tmp_path)
    winner, late = RunLock(tmp_path), RunLock(tmp_path)
    read, once = lock_module._read, []

    def pause(path):
        holder = read(path)
        if holder == stale and not once:
            once.append(path)
            winner.acquire()
        return holder

    monkeypatch.setattr(lock_module, "_read", pause)
    with pytest.raises(ConfigError, match="alive here"):
        late.acquire()
    winner.check()
    winner.release()
    assert not list(tmp_path.iterdir())


def test_a_reused_process_id_is_not_the_holder(tmp_path):
    dead_holder(tmp_path)
    held = json.loads((tmp_path / "run.lock").read_text()) | {"pid": os.getpid()}
    (tmp_path / "run.lock").write_bytes(encode_json(held))
    assert holder_of(tmp_path) is None


def test_a_stopped_process_keeps_its_lock(tmp_path):
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(sleeper.pid, signal.SIGSTOP)
        holder = replace(RunLock(tmp_path).me, pid=sleeper.pid, born=lock_module._born(sleeper.pid))
        (tmp_path / "run.lock").write_bytes(encode_json(asdict(holder)))
        os.utime(tmp_path / "run.lock", (0, 0))
        with pytest.raises(ConfigError, match=f"pid {sleeper.pid}"):
            RunLock(tmp_path).acquire()
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("shift", [-86400, 86400, -3600])
def test_clocks_of_two_hosts_may_differ(tmp_path, shift):
    # The other host's clock is off: its lock looks old or from the future, its heartbeat shows that it lives.
    owner = RunLock(tmp_path, heartbeat=0.05)
    owner.me = replace(owner.me, machine="elsewhere", host="other")
    owner._draft = tmp_path / "run.lock.draft-x"
    owner.acquire()
    real = os.utime

    def skewed(descriptor):
        now = time.time() + shift
        real(descriptor, (now, now))

    lock_module.os.utime, original = skewed, os.utime
    try:
        time.sleep(0.2)
        with pytest.raises(ConfigError, match="host other"):
            RunLock(tmp_path, heartbeat=0.2, stale=1).acquire()
    finally:
        lock_module.os.utime = original
    owner._released.set()
    owner._thread.join()
    real(tmp_path / "run.lock", (time.time() + shift,) * 2)
    taker = RunLock(tmp_path, heartbeat=0.05, stale=1)
    taker.acquire()
    assert taker.taken_from.host == "other"
    with pytest.raises(StorageError, match="taken by host"):
        owner.check()
    owner.release()
    taker.check()
    taker.release()


def test_a_young_lock_of_another_host_is_refused_at_once(tmp_path):
    dead_holder(tmp_path, machine="elsewhere", host="other")
    started = time.monotonic()
    with pytest.raises(ConfigError, match="host other"):
        RunLock(tmp_path).acquire()
    assert time.monotonic() - started < 20
