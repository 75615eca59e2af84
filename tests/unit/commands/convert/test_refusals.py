"""What cannot be converted is refused in one line with the remedy, exit code 2, and nothing stays on the disk."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'bpt_dist[convert]'")
import tiny_gguf  # noqa: E402

from bpt_dist.commands.convert import folder, source  # noqa: E402
from bpt_dist.commands.main import main  # noqa: E402


def refused(given: Path | str, out: Path, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Return the one line that `bpt-dist convert` ends with; what is beside `out` is as it was."""
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
    capsys.readouterr()
    assert main(["convert", str(given), str(out)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert (sorted(out.parent.rglob("*")) if out.parent.exists() else None) == before
    return lines[0]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    tiny_gguf.write(tmp_path / "in" / "m.gguf")
    return tmp_path / "in" / "m.gguf"


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no gguf", b"GGU"], ids=["empty", "archive", "short"])
def test_other_files(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert "is no GGUF file (it does not begin with GGUF); give a GGUF file" in refused(
        tmp_path / "m.gguf", tmp_path / "o" / "out", capsys
    )


@pytest.mark.parametrize("kept", [6, 40, 0.1, 0.5, 0.9, -1], ids=str)
def test_files_that_end_too_early(kept: float, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert "is cut short or damaged (" in (line := refused(good, tmp_path / "o" / "out", capsys))
    assert line.endswith("copy or download it again")


def test_numbers_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_gguf.write(tmp_path / "m.gguf", change=lambda tensors: tensors["blk.1.ffn_up.weight"].fill(np.inf))
    line = refused(tmp_path / "m.gguf", tmp_path / "o" / "out", capsys)
    assert line == "blk.1.ffn_up.weight: holds numbers that are not finite, so the file is damaged; copy or download it again"


def test_a_type_that_gguf_does_not_know(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(good.read_bytes())
    place = (
        content.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    )  # after its number of axes and their sizes
    content[place : place + 4] = struct.pack("<I", 999)
    good.write_bytes(content)
    assert "in a type that gguf" in refused(good, tmp_path / "o" / "out", capsys)


def test_a_type_that_cannot_be_dequantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def integers(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_norm.weight"] = tensors["blk.0.ffn_norm.weight"].astype(np.int32)

    add = gguf.GGUFWriter.add_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf.GGUFWriter,
            "add_tensor",
            lambda self, name, array, raw_dtype: add(self, name, array, raw_dtype=raw_dtype if array.dtype == np.float32 else None),
        )
        tiny_gguf.write(tmp_path / "m.gguf", change=integers)
    line = refused(tmp_path / "m.gguf", tmp_path / "o" / "out", capsys)
    assert "stores tensors as I32 (blk.0.ffn_norm.weight), which gguf cannot dequantise; give one of F32, F16, Q4_0" in line


# --- models ----------------------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


def with_one(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.ones((32, 32), dtype=np.float32)})


def fewer_rows(tensors: dict[str, np.ndarray]) -> None:
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:200]


SPECIAL = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")]
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"change": dict.clear}, "holds a vocabulary without weights; give the file of the model"),
    "adapter": ({"keys": {"general.type": "adapter"}}, "holds no model but a GGUF of type adapter; give the file of the model"),
    "experts": ({"keys": {"llama.expert_count": 8}}, "is a mixture of experts, which is not converted; give a dense model"),
    "expert tensors": ({"change": with_one("blk.0.ffn_up_exps.weight")}, "is a mixture of experts, "),
    "scaled positions": ({"keys": {"llama.rope.scaling.type": "yarn"}},
          "(llama.rope.scaling.type = yarn); give a model without them"),
    "unknown setting": ({"keys": {"llama.logit_scale": 2.0}}, "has settings that are not converted (llama.logit_scale); "),
    "other positions": ({"family": "llama 3.1", "change": lambda tensors: tensors["rope_freqs.weight"].__imul__(1.5)},
          "by another rule than Llama 3's"),
    "missing setting": ({"keys": {"llama.block_count": None}}, "lacks llama.block_count, without which there is no model; "),
    "zero heads": ({"keys": {"llama.attention.head_count": 0}}, "llama.attention.head_count is no number above 0 (0); "),
    "lists": ({"keys": {"llama.feed_forward_length": [64, 32]}}, "llama.feed_forward_length is no number above 0 ([64, 32]); "),
    "values of another width": ({"keys": {"llama.attention.value_length": 4}},
          "llama.attention.value_length is 4, not the 8 of a head; "),
    "many blocks": ({"keys": {"llama.block_count": 2_000_000_000}}, "has fewer tensors than blocks; give the whole model"),
    "missing block": ({"keys": {"llama.block_count": 3}}, "lacks model.layers.2.input_layernorm.weight, "),
    "missing tensor": ({"change": without("blk.1.attn_v.weight")},
          "lacks model.layers.1.self_attn.v_proj.weight; give the file of a whole"),
    "no embeddings": ({"change": without("token_embd.weight")}, "lacks token_embd.weight, the word embeddings; "),
    "strange tensor": ({"change": with_one("blk.0.attn_sinks.weight")},
          "holds tensors that llama has not (blk.0.attn_sinks.weight); "),
    "other shape": ({"keys": {"llama.feed_forward_length": 48}}, "is [64, 32] and its settings ask for [48, 32]; "),
    "no tokenizer": ({"tokenizer": False}, "has no tokenizer; give a GGUF file with one"),
    "kind of tokenizer": ({"keys": {"tokenizer.ggml.model": "rwkv"}}, "its tokenizer is of the kind rwkv, not gpt2 or llama; "),
    "way to cut": ({"keys": {"tokenizer.ggml.pre": "default"}},
          "cuts texts by a rule that is not converted (tokenizer.ggml.pre = default); "),
    "too many pieces": ({"change": fewer_rows, "keys": dict.fromkeys(SPECIAL)}, "and its word embeddings 200 rows; "),
    "special piece": ({"change": fewer_rows}, "its settings make no model (Padding_idx must be within num_embeddings); "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_models(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = CASES[case]
    tiny_gguf.write(tmp_path / "m.gguf", **options)
    line = refused(tmp_path / "m.gguf", tmp_path / "o" / "out", capsys)
    assert line.startswith(f"{tmp_path}/m.gguf: ")
    assert words in line


def test_other_architectures_are_told_which_fit(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.write_bytes(good.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"))
    line = refused(good, tmp_path / "o" / "out", capsys)
    assert "is of the architecture mamba, which is not converted; give a model of llama (Llama, SmolLM2, Mistral), qwen2, " in line


# --- parts and packages --------------------------------------------------------------------------------------------


def test_a_missing_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    tiny_gguf.write(tmp_path / "in" / "m.gguf", split_max_tensors=8)
    (tmp_path / "in" / "m-00002-of-00003.gguf").unlink()
    line = refused(tmp_path / "in" / "m-00001-of-00003.gguf", tmp_path / "o" / "out", capsys)
    assert line.endswith("is one of 3 parts, and m-00002-of-00003.gguf is missing; put all parts into one folder")


def test_a_renamed_part_and_a_part_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    tiny_gguf.write(tmp_path / "in" / "m.gguf", split_max_tensors=8)
    shutil.copy(tmp_path / "in" / "m-00001-of-00003.gguf", tmp_path / "in" / "first.gguf")
    assert "is one of 3 parts, which are called NAME-00001-of-00003.gguf" in refused(
        tmp_path / "in" / "first.gguf", tmp_path / "o" / "out", capsys
    )
    shutil.copy(tmp_path / "in" / "m-00003-of-00003.gguf", tmp_path / "in" / "m-00002-of-00003.gguf")
    assert "its parts are not those of one model; " in refused(
        tmp_path / "in" / "m-00001-of-00003.gguf", tmp_path / "o" / "out", capsys
    )


def cut(file: Path, size: int) -> list[Path]:
    content = file.read_bytes()
    pieces = [file.with_name(f"{file.name}.part{number:02}") for number in range(-(-len(content) // size))]
    for number, piece in enumerate(pieces):
        piece.write_bytes(content[number * size : (number + 1) * size])
    file.unlink()
    return pieces


def test_pieces_are_joined_and_a_missing_one_is_named(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = cut(good, 40_000)
    assert len(pieces) >= 3
    assert main(["convert", str(pieces[2]), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "joined.gguf").exists()
    pieces[1].unlink()
    assert "m.gguf.part01 is missing" in refused(pieces[0], tmp_path / "o" / "out", capsys)
    pieces[-1].unlink()
    shutil.copy(pieces[0], pieces[1])
    assert "is cut short or damaged" in refused(pieces[0], tmp_path / "o" / "out", capsys)


class Shipped:
    """An installed package as `importlib.metadata` describes it."""

    def __init__(self, folder: Path, requires: tuple[str, ...] = ()) -> None:
        self.files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        self.requires, self.version, self.folder = requires, "1.2", folder
        self.metadata = {"Name": folder.name, "License": "Apache-2.0", "License-Expression": None}

    def locate_file(self, file: Path) -> Path:
        return self.folder / file


def test_a_package_that_ships_a_model_with_the_packages_it_asks_for(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = cut(good, 40_000)
    for number, piece in enumerate(pieces):
        (tmp_path / f"part{number}").mkdir()
        piece.rename(tmp_path / f"part{number}" / piece.name)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "LICENSE").write_text("terms")
    packages = {f"part{number}": Shipped(tmp_path / f"part{number}") for number in range(len(pieces))}
    packages["whole"] = Shipped(tmp_path / "whole", (*packages, "absent>=1"))

    def distribution(name: str) -> Shipped:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(source.metadata, "distribution", distribution)
    found = source.locate("whole")
    assert [file.name for file in found.files] == [piece.name for piece in pieces]
    assert found.in_pieces
    assert found.package == source.Package("whole", "1.2", "Apache-2.0", ("LICENSE",))
    monkeypatch.undo()


def test_packages_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is neither a file nor an installed package; " in refused("no-such-package", tmp_path / "o" / "out", capsys)
    assert "the installed package ships no GGUF file; " in refused("numpy", tmp_path / "o" / "out", capsys)
    assert "there is no such file; " in refused(tmp_path / "m.gguf", tmp_path / "o" / "out", capsys)


def test_a_folder_is_told_what_it_holds(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(good.parent, tmp_path / "o" / "out", capsys).endswith(": is a folder; it holds m.gguf; give one GGUF file")


# --- the folder that comes out -----------------------------------------------------------------------------------------


def test_an_occupied_folder_is_left_alone(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert refused(good, tmp_path / "full", capsys).endswith("exists and is not empty; remove it or give another OUT")
    assert refused(good, tmp_path / "file", capsys).endswith("exists and is no folder; give another OUT")
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(good), str(tmp_path / "empty")]) == 0


def test_a_full_disk_is_seen_before_it_is_written_to(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1 << 20))
    assert " of space, 1 MiB are free; free some space or give another OUT" in refused(good, tmp_path / "o" / "out", capsys)


def test_a_disk_that_fails_in_between_leaves_nothing(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bpt_dist.commands.convert.command.write_weights", full)
    assert "cannot be written (No space left on device); free some space" in refused(good, tmp_path / "o" / "out", capsys, 74)


def test_what_a_killed_conversion_left_is_removed_by_the_next(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out.tmp-12345678").mkdir()
    (tmp_path / "out.tmp-12345678" / "model.safetensors").write_bytes(b"half")
    assert main(["convert", str(good), str(tmp_path / "out")]) == 0
    assert not list(tmp_path.glob("out.tmp-*"))


def test_without_gguf_it_says_what_to_install(tmp_path: Path) -> None:
    script = "import sys; sys.modules['gguf'] = None; from bpt_dist.commands.main import main; raise SystemExit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "convert", str(tmp_path / "m.gguf"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "convert: reads GGUF files with the package gguf, which is not installed; run `pip install 'bpt_dist[convert]'` or "
        "`pip install gguf`\n"
    )
