"""Checkpoints: one directory, published by one rename, believed only if every byte has the right checksum.

    step-00000120/{state.safetensors, meta.json, MANIFEST.json}

There is no `latest` pointer: the newest checkpoint is the highest step whose manifest verifies. An older one
is deleted only after the newer one was read back. Tensors are safetensors, the rest is strict JSON; nothing
is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.files import (
    OS_FILES,
    Content,
    Files,
    decode_json,
    encode_json,
    num_bytes_of,
    pieces_of,
    read_bytes,
    remove_leftovers,
    remove_tree,
    temporary_name,
    write_atomic,
    write_or_explain,
)

FORMAT = 1
MANIFEST, STATE, META = "MANIFEST.json", "state.safetensors", "meta.json"
# `.old-*` is a step that was set aside while it is written again: still a checkpoint until the new one is
# published.
_DIRECTORY = re.compile(r"step-(\d{8,12})(\.old-[0-9a-f]{8})?")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified: `files` maps each name to its size in bytes and SHA-256."""

    path: Path
    step: int
    fingerprint: str | None
    files: Mapping[str, tuple[int, str]]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    fs: Files = OS_FILES,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`, read it back, then delete all but the newest `keep` intact ones.

    `meta["fingerprint"]`, if given, is what `latest` compares. Saving a step twice replaces it. Called by
    rank 0 only. Raises StorageError after a second attempt on a full disk; nothing valid is lost then.
    """
    assert keep > 1, "the newest checkpoint may be the one a disk has just torn"
    fault_point("ckpt.before_write", step=step)
    files = _encode(step, tensors, meta)
    final = folder_of(folder, step)
    write_or_explain(final, sum(map(num_bytes_of, files.values())), lambda: _publish(final, files, fs))
    fault_point("ckpt.after_rename", step=step)
    _verify(final)
    _delete_older(folder, step, keep, fs)
    fault_point("ckpt.after_delete", step=step)
    return final


def latest(folder: Path, *, fingerprint: str | None, warn: Callable[[str], object]) -> Checkpoint | None:
    """Return the highest step that verifies, or None if no checkpoint was ever published.

    A torn one is named through `warn` and passed over. Raises StorageError if there are checkpoints and none
    verifies (never a silent fresh start), ConfigError if the newest was written under another fingerprint.
    """
    candidates = _candidates(folder)
    for path in candidates:
        try:
            checkpoint = _verify(path)
        except StorageError as error:
            warn(f"{error}; passing over this checkpoint")
            continue
        if fingerprint is not None and checkpoint.fingerprint != fingerprint:
            raise ConfigError(f"{path}: written under another configuration; restore that one or choose another name=")
        return checkpoint
    if candidates:
        raise StorageError(
            f"{folder}: none of its {len(candidates)} checkpoints is intact; restore one from a backup, "
            "or start again under another name="
        )
    return None


def folder_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def at(folder: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step that another rank has verified; `load` hashes what this one reads, once.

    Raises StorageError where its manifest is not intact.
    """
    return _manifest(folder_of(folder, step))


def load(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU) and the meta data; what is parsed is what was hashed."""
    state = _checked_bytes(checkpoint, STATE)
    meta = decode_json(_checked_bytes(checkpoint, META))
    return _decode_tensors(state, checkpoint.path / STATE), meta


def write_tensors_atomic(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    fs: Files = OS_FILES,
) -> Path:
    """Write one safetensors file; a reader sees the old file or the new one. Raises StorageError."""
    return write_atomic(path, encode_tensors(tensors, metadata), fs=fs)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata onto the CPU; anything else is a StorageError (no pickle)."""
    data = read_bytes(path)
    tensors = _decode_tensors(data, path)
    return tensors, _header(data).get("__metadata__", {})


def _encode(step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Content]:
    files: dict[str, Content] = {STATE: encode_tensors(tensors), META: encode_json(meta)}
    manifest = {
        "format": FORMAT,
        "step": step,
        "fingerprint": meta.get("fingerprint"),
        "files": {name: {"bytes": num_bytes_of(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    # The manifest carries its own checksum: a flipped bit in the fingerprint must not look like another
    # configuration.
    return files | {MANIFEST: encode_json(manifest | {"sha256": _sha256(encode_json(manifest))})}


def _publish(final: Path, files: Mapping[str, Content], fs: Files) -> None:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, "step-*.tmp-*", fs)
    if final.is_dir() and _is_identical(final, files[MANIFEST]):
        return
    temporary = temporary_name(final)
    try:
        fs.mkdir(temporary)
        for name, data in files.items():
            fs.write(temporary / name, data)
            fs.fsync(temporary / name)
        fs.fsync(temporary)
        fault_point("ckpt.before_rename", step=int(final.name[5:]))
        if final.exists():
            fs.rename(final, final.with_name(temporary.name.replace(".tmp-", ".old-")))
        fs.rename(temporary, final)
    except OSError:
        if temporary.exists():
            remove_tree(temporary, OS_FILES)
        raise
    fs.fsync(folder)


def _is_identical(path: Path, manifest: Content) -> bool:
    try:
        _verify(path)
        return read_bytes(path / MANIFEST) == manifest
    except StorageError:
        return False


def _delete_older(folder: Path, step: int, keep: int, fs: Files) -> None:
    intact = 0
    # A higher step is torn, or `latest` would have resumed from it; it is replaced when training gets there.
    for path in [path for path in _candidates(folder) if _step(path) <= step]:
        if intact < keep and not _is_backup(path) and _looks_intact(path):
            intact += 1
            continue
        try:
            # Renamed first, so that a crash in the middle leaves a leftover and not a torn checkpoint.
            to_delete = temporary_name(path)
            fs.rename(path, to_delete)
            fs.fsync(folder)
            remove_tree(to_delete, fs)
        except OSError as error:
            log.warning("%s: an old checkpoint could not be deleted (%s)", path, error)


def _is_backup(path: Path) -> bool:
    return ".old-" in path.name


def _candidates(folder: Path) -> list[Path]:
    """Published checkpoints, highest step first; of one step the new one before the one set aside."""
    if not folder.is_dir():
        return []
    steps = [path for path in folder.iterdir() if _DIRECTORY.fullmatch(path.name)]
    return sorted(steps, key=lambda path: (-_step(path), path.name))


def _step(path: Path) -> int:
    match = _DIRECTORY.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _looks_intact(path: Path) -> bool:
    """Manifest and sizes only: enough to decide which older checkpoints count, without reading gigabytes."""
    try:
        manifest = _manifest(path)
        return all((path / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    except (StorageError, OSError):
        return False


def _verify(path: Path) -> Checkpoint:
    checkpoint = _manifest(path)
    for name, (size, sha256) in checkpoint.files.items():
        digest = hashlib.sha256()
        try:
            with (path / name).open("rb") as file:
                if file.seek(0, 2) != size:
                    raise StorageError(f"{path / name}: {file.tell()} bytes instead of {size}")
                file.seek(0)
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise StorageError(f"{path / name}: cannot be read ({error.strerror})") from error
        if digest.hexdigest() != sha256:
            raise StorageError(f"{path / name}: its SHA-256 is not the one in {MANIFEST}")
    return checkpoint


def _manifest(path: Path) -> Checkpoint:
    file = path / MANIFEST
    data = read_bytes(file, limit=1 << 16)
    try:
        manifest = decode_json(data)
        sha256 = manifest.pop("sha256")
        unaltered = sha256 == _sha256(encode_json(manifest)) and data == encode_json(manifest | {"sha256": sha256})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise StorageError(f"{file}: not a manifest ({type(error).__name__})") from error
    if not unaltered:
        raise StorageError(f"{file}: altered after it was written")
    if manifest["format"] != FORMAT:
        raise StorageError(f"{file}: format {manifest['format']}, this version reads {FORMAT}")
    if manifest["step"] != _step(path) or set(manifest["files"]) != {STATE, META}:
        raise StorageError(f"{file}: the manifest of step {manifest['step']}, found in {path.name}")
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    return Checkpoint(path, manifest["step"], manifest["fingerprint"], files)


def _checked_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    size, sha256 = checkpoint.files[name]
    data = read_bytes(checkpoint.path / name, limit=size)
    if _sha256(data) != sha256:
        raise StorageError(f"{checkpoint.path / name}: changed after it was verified")
    return data


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """Return the bytes of `safetensors.torch.save` in pieces: a header, then the memory of each tensor, which is not copied.

    Metadata are sorted, so that the bytes are a function of the content. The library writes all tensors into one buffer and, for
    metadata, in a random order. A tensor of a GPU is copied to the CPU.
    """
    # The library decides order and names of types; of empty tensors it copies nothing.
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    layout = _header(safetensors.torch.save(empty))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pieces, end = [], 0
    for name, entry in layout.items():
        value = tensors[name].detach().cpu().contiguous()
        header[name] = {"dtype": entry["dtype"], "shape": list(value.shape), "data_offsets": [end, end + value.nbytes]}
        pieces.append(value.reshape(-1).view(torch.uint8).numpy().data)
        end += value.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


def _header(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = decode_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def _decode_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise StorageError(f"{path}: not a safetensors file ({error})") from error


def _sha256(data: Content) -> str:
    digest = hashlib.sha256()
    for piece in pieces_of(data):
        digest.update(piece)
    return digest.hexdigest()
