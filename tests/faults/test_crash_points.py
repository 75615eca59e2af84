"""F2, F24: a crash at any file-system call leaves a checkpoint that is whole, and readers see old or new."""

import random
import shutil
import threading

import pytest
import torch
from crashing_fs import Crash, CrashingFiles
from fault_figures import record_figure

from bpt_dist.storage import checkpoint
from bpt_dist.storage.files import read_json, write_json_atomic


def state(step):
    return {"particles": torch.full((3, 4, 8), float(step)), "exp_avg": torch.arange(6.0) + step}


def save(folder, step, **keywords):
    return checkpoint.save(folder, step, state(step), {"fingerprint": "f", "step": step}, **keywords)


def loaded_step(folder):
    """The step a resume would start from, after proving that its tensors are those of that step.

    Nothing torn may ever carry the name of a published checkpoint.
    """
    found = checkpoint.latest(folder, fingerprint="f", warn=lambda text: None)
    if found is None:
        return None
    published = [path for path in folder.glob("step-*") if ".tmp-" not in path.name]
    assert all(len(list(path.iterdir())) == 3 for path in published)
    tensors, meta = checkpoint.load(found)
    assert meta["step"] == found.step
    assert all(torch.equal(tensors[name], value) for name, value in state(found.step).items())
    return found.step


def prepare(folder, steps):
    folder.mkdir()
    for step in steps:
        save(folder, step, keep=9)
    return folder


def crash_points(tmp_path, before, step):
    """Every (call number, before or after it) of saving `step` on a disk that holds checkpoints `before`."""
    folder = prepare(tmp_path / "count", before)
    files = CrashingFiles(folder)
    save(folder, step, fs=files)
    shutil.rmtree(folder)
    return [(call, after) for call in range(1, files.calls + 1) for after in (False, True)]


CASES = {"first": ((), 3), "second": ((2,), 3), "deletes older": ((1, 2), 3), "deletes two": ((0, 1, 2), 3)}


@pytest.mark.parametrize("case", CASES)
def test_crash_at_every_call(tmp_path, case):
    before, step = CASES[case]
    points = crash_points(tmp_path, before, step)
    rng = random.Random(7)
    allowed = {step, max(before, default=None)}
    for number, (call, after) in enumerate(points):
        folder = prepare(tmp_path / f"killed-{number}", before)
        files = CrashingFiles(folder, call, after=after)
        with pytest.raises(Crash):
            save(folder, step, fs=files)
        assert loaded_step(folder) in allowed
        for loss in range(4):
            disk = tmp_path / f"lost-{number}-{loss}"
            files.after_power_loss(disk, rng)
            assert loaded_step(disk) in allowed
        save(disk, step)
        assert loaded_step(disk) == step
        assert not list(disk.glob("*.tmp-*")), "leftovers are removed by the next save"
    assert len(points) >= 20
    record_figure("F2", "crash at every call, and power losses after it", case=case, trials=5 * len(points), passed=5 * len(points))


def test_crash_while_a_torn_checkpoint_is_replaced(tmp_path):
    def torn(folder):
        prepare(folder, (2, 3))
        (folder / "step-00000003" / "state.safetensors").write_bytes(b"torn")
        return folder

    files = CrashingFiles(torn(tmp_path / "count"))
    save(tmp_path / "count", 3, fs=files)
    for call in range(1, files.calls + 1):
        folder = torn(tmp_path / f"killed-{call}")
        crashing = CrashingFiles(folder, call)
        with pytest.raises(Crash):
            save(folder, 3, fs=crashing)
        assert loaded_step(folder) in {2, 3}
        crashing.after_power_loss(tmp_path / f"lost-{call}", random.Random(call))
        assert loaded_step(tmp_path / f"lost-{call}") in {2, 3}


def test_replacing_the_only_checkpoint_never_loses_it(tmp_path):
    def other(folder):
        folder.mkdir()
        checkpoint.save(folder, 3, state(3), {"fingerprint": "f", "step": 3, "extra": "so the bytes differ"})
        return folder

    files = CrashingFiles(other(tmp_path / "count"))
    save(tmp_path / "count", 3, fs=files)
    for call in range(1, files.calls + 1):
        for after in (False, True):
            folder = other(tmp_path / f"killed-{call}-{after}")
            with pytest.raises(Crash):
                save(folder, 3, fs=CrashingFiles(folder, call, after=after))
            assert loaded_step(folder) == 3


def test_crash_at_every_call_of_a_single_file(tmp_path):
    for call in range(1, 5):
        for after in (False, True):
            folder = tmp_path / f"{call}-{after}"
            folder.mkdir()
            write_json_atomic(folder / "status.json", {"state": "running"})
            files = CrashingFiles(folder, call, after=after)
            with pytest.raises(Crash):
                write_json_atomic(folder / "status.json", {"state": "finished"}, fs=files)
            assert read_json(folder / "status.json")["state"] in {"running", "finished"}
            files.after_power_loss(tmp_path / f"lost-{call}-{after}", random.Random(call))
            assert read_json(tmp_path / f"lost-{call}-{after}" / "status.json")["state"] in {
                "running",
                "finished",
            }
            write_json_atomic(folder / "status.json", {"state": "stopped"})
            assert [path.name for path in folder.iterdir()] == ["status.json"]


def test_a_concurrent_reader_sees_old_or_new(tmp_path):
    path = tmp_path / "prompt.safetensors"
    checkpoint.write_tensors_atomic(path, {"prompt": torch.zeros(100, 64)}, {"n": "0"})
    done = threading.Event()
    seen = []

    def read():
        while not done.is_set():
            tensors, metadata = checkpoint.read_tensors(path)
            seen.append((tensors["prompt"] == int(metadata["n"])).all().item())

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 200):
        checkpoint.write_tensors_atomic(path, {"prompt": torch.full((100, 64), float(n))}, {"n": str(n)})
    done.set()
    reader.join()
    assert len(seen) > 20
    assert all(seen)
