"""F4, F20 and section 3 of the fault table: what is damaged or hostile is noticed, and never run."""

import errno
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import torch

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage import checkpoint, files

NAMES = ("state.safetensors", "meta.json", "MANIFEST.json")


def state(step):
    return {"particles": torch.full((2, 3, 4), float(step)), "bf16": torch.ones(3, dtype=torch.bfloat16)}


def save(folder, step, fingerprint="f", **keywords):
    return checkpoint.save(folder, step, state(step), {"fingerprint": fingerprint, "lr": 0.1}, **keywords)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "checkpoints", 10)
    save(tmp_path / "checkpoints", 20)
    return tmp_path / "checkpoints"


def newest_step(folder, warnings=None):
    found = checkpoint.latest(folder, fingerprint="f", warn=([] if warnings is None else warnings).append)
    return None if found is None else found.step


def test_what_is_saved_is_loaded(folder):
    tensors, meta = checkpoint.load(checkpoint.latest(folder, fingerprint="f", warn=pytest.fail))
    assert meta == {"fingerprint": "f", "lr": 0.1}
    assert set(tensors) == set(state(20))
    for name, value in state(20).items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_saved_bytes_depend_on_the_content_only(tmp_path):
    metadata = {f"key{i}": str(i) for i in range(9)}
    data = {checkpoint.write_tensors_atomic(tmp_path / "p", state(1), metadata).read_bytes() for _ in range(5)}
    assert len(data) == 1
    assert checkpoint.read_tensors(tmp_path / "p")[1] == metadata


def test_views_and_transposes_are_saved_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    checkpoint.write_tensors_atomic(tmp_path / "p", {"row": whole[1], "turned": whole.T, "first": whole[0]})
    tensors, _ = checkpoint.read_tensors(tmp_path / "p")
    assert torch.equal(tensors["row"], whole[1])
    assert torch.equal(tensors["turned"], whole.T)


def test_two_newest_are_kept(folder):
    for step in (30, 40):
        save(folder, step)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000030", "step-00000040"]


def test_no_checkpoint_is_a_fresh_start_but_a_broken_one_is_not(tmp_path):
    assert newest_step(tmp_path / "nothing") is None
    save(tmp_path, 5)
    (tmp_path / "step-00000005" / "meta.json").unlink()
    with pytest.raises(StorageError, match="none of its 1 checkpoints is intact"):
        newest_step(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_is_noticed(folder, name):
    path = folder / "step-00000020" / name
    whole = path.read_bytes()
    for cut in sorted({len(whole) * i // 50 for i in range(50)}):
        path.write_bytes(whole[:cut])
        warnings = []
        assert newest_step(folder, warnings) == 10
        assert name in warnings[0]
    path.write_bytes(whole)
    assert newest_step(folder) == 20


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_noticed(folder, name):
    path = folder / "step-00000020" / name
    whole = path.read_bytes()
    rng = random.Random(3)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        warnings = []
        assert newest_step(folder, warnings) == 10
        assert "step-00000020" in warnings[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["delete", "empty", "swap", "append", "directory", "link"])
def test_a_file_that_is_not_the_one_written_is_noticed(folder, name, damage):
    path = folder / "step-00000020" / name
    other = folder / "step-00000010" / name
    if damage == "append":
        path.write_bytes(path.read_bytes() + b"\n")
    elif damage == "swap":
        checkpoint.save(folder / "x", 10, {"a": torch.ones(3)}, {"fingerprint": "g", "lr": 9})
        shutil.copy(folder / "x" / "step-00000010" / name, path)
    else:
        path.unlink()
        if damage == "empty":
            path.touch()
        elif damage == "directory":
            path.mkdir()
        elif damage == "link" and name == "MANIFEST.json":
            path.symlink_to(other)
        elif damage == "link":
            path.symlink_to("/dev/null")
    assert newest_step(folder) == 10


def test_the_manifest_of_another_step_is_noticed(folder):
    (folder / "step-00000020").rename(folder / "step-00000099")
    warnings = []
    assert newest_step(folder, warnings) == 10
    assert "manifest of step 20, found in step-00000099" in warnings[0]


def test_damage_after_the_choice_is_noticed(folder):
    chosen = checkpoint.latest(folder, fingerprint="f", warn=pytest.fail)
    path = chosen.path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match="changed after it was verified"):
        checkpoint.load(chosen)


def test_another_configuration_is_refused(folder):
    with pytest.raises(ConfigError, match="another configuration"):
        checkpoint.latest(folder, fingerprint="g", warn=pytest.fail)


def test_clocks_do_not_decide_which_is_newest(folder):
    for day, step in ((+1, 10), (-1, 20)):
        stamp = 1e9 + day * 86400
        os.utime(folder / f"step-{step:08d}", (stamp, stamp))
    assert newest_step(folder) == 20


def test_saving_again_replaces_a_torn_step(folder):
    (folder / "step-00000020" / "state.safetensors").write_bytes(b"torn")
    save(folder, 20)
    assert newest_step(folder) == 20
    assert len(list(folder.iterdir())) == 2


class FullDisk(files.OsFiles):
    def __init__(self, failures):
        self.failures = failures

    def fsync(self, path):
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        super().fsync(path)


def test_a_full_disk_is_tried_twice(folder):
    save(folder, 30, fs=FullDisk(failures=1))
    assert newest_step(folder) == 30
    with pytest.raises(StorageError, match="free some space"):
        save(folder, 40, fs=FullDisk(failures=2))
    assert newest_step(folder) == 30
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_disk_that_lies_keeps_the_older_ones(folder):
    class Lying(files.OsFiles):
        def write(self, path, data):
            whole = b"".join(files.pieces_of(data))
            super().write(path, whole[:-1] + b"!" if path.name == "state.safetensors" else whole)

    with pytest.raises(StorageError, match="SHA-256"):
        save(folder, 30, fs=Lying())
    assert newest_step(folder) == 20
    assert (folder / "step-00000010").exists()


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def test_the_bytes_are_those_of_the_library():
    """In its order of types and names, whatever order they came in; views are written as their own numbers only."""
    tensors = {f"{'zyx'[n % 3]}/{n}": torch.arange(-3, n + 3).to(dtype) for n, dtype in enumerate(DTYPES)}
    tensors |= {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "columns": torch.arange(12.0).view(3, 4).t(),
        "é": torch.ones(1),
    }
    tensors["view"] = torch.arange(100.0)[40:50]
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    assert b"".join(checkpoint.encode_tensors(tensors)) == safetensors.torch.save(plain)
    one = {"only": "one"}  # the library writes several in a random order
    assert b"".join(checkpoint.encode_tensors(tensors, one)) == safetensors.torch.save(plain, one)


def test_saving_makes_no_copy_of_the_tensors(tmp_path):
    """A fine-tuned T5-large is 12 GB with its moments: a second copy beside it would not fit where training does."""
    program = """
import resource, sys, torch
from pathlib import Path
from bpt_dist.storage import checkpoint
state = {f"w{n}": torch.ones(16 << 20) for n in range(6)}  # 64 MB each
checkpoint.save(Path(sys.argv[1]), 1, {"small": torch.ones(3)}, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.save(Path(sys.argv[1]), 2, state, {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 * 1024  # kilobytes; every copy is 393,216


def hostile_files():
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    overlap = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}).encode()
    call = b"cposix\nsystem\n(S'touch /tmp/bpt-pwned'\ntR."
    yield "pickle", call
    yield "pickle protocol 4", b"\x80\x04" + call
    yield "length 2^63", struct.pack("<Q", 1 << 63) + b"{}"
    yield "length beyond the file", struct.pack("<Q", 1000) + b"{}"
    yield "huge tensor", struct.pack("<Q", len(header)) + header
    yield "overlap", struct.pack("<Q", len(overlap)) + overlap + bytes(4)
    yield "not JSON", struct.pack("<Q", 4) + b"abcd"
    yield "list", struct.pack("<Q", 2) + b"[]"
    yield "deep", struct.pack("<Q", 200_000) + b"[" * 200_000
    yield "empty", b""
    yield "seven bytes", bytes(7)


@pytest.mark.parametrize(("name", "data"), hostile_files())
def test_hostile_tensor_files_are_refused(tmp_path, name, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(StorageError, match="safetensors"):
        checkpoint.read_tensors(path)
    assert not os.path.exists("/tmp/bpt-pwned")


def test_a_torch_archive_and_a_link_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(StorageError, match="not a safetensors file"):
        checkpoint.read_tensors(tmp_path / "x.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(StorageError, match="cannot be read"):
        checkpoint.read_tensors(tmp_path / "link")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": 1, "a": 2}', "{", "\ufeff{}", ""])
def test_json_is_strict_when_read(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StorageError, match="not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_json_is_strict_when_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json_atomic(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    files.write_json_atomic(tmp_path / "x.json", {"b": torch.tensor(1.5), "a": tmp_path})
    assert files.read_json(tmp_path / "x.json") == {"a": str(tmp_path), "b": 1.5}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = files.write_json_atomic(tmp_path / "results.json", [1])
    with pytest.raises(StorageError, match="free some space"):
        files.write_json_atomic(path, [1, 2], fs=FullDisk(failures=2))
    assert files.read_json(path) == [1]
    assert len(list(tmp_path.iterdir())) == 1
