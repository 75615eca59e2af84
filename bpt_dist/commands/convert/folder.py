"""The folder that comes out: weights written one tensor at a time, all of it under a name of its own until it is whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bpt_dist.commands.convert.tensors import Parameter
from bpt_dist.commands.output import size
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.file_system import sync_path
from bpt_dist.storage.files import FULL, OS_FILES, leftovers_of, remove_leftovers, temporary_name

ALIGNMENT = 8  # of the first number in a safetensors file
OTHER_FILES = 64 << 20  # bytes; a tokenizer of 262,144 pieces takes 33 million
WEIGHTS = "model.safetensors"


def refuse_occupied(out: Path) -> None:
    """Raise ConfigError unless `out` is free: absent, or an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out}: exists and is no folder; give another OUT")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: exists and is not empty; remove it or give another OUT")


def refuse_full(out: Path, num_bytes: int) -> None:
    """Raise ConfigError where the disk has no space for `num_bytes` of weights and the files beside them."""
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    needed, free = num_bytes + OTHER_FILES, shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(f"{out}: needs {size(needed)} of space, {size(free)} are free; free some space or give another OUT")


@contextlib.contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a new folder beside `out`, and rename it when all is done; on an error nothing is left, not even folders made above it.

    Raises StorageError where the disk fails.
    """
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    draft = temporary_name(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent, leftovers_of(out), OS_FILES)
        draft.mkdir()
        yield draft
        for file in draft.iterdir():
            sync_path(file)
        sync_path(draft)
        draft.rename(out)
        sync_path(out.parent)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise _explained(out, error) from error
        raise


def _explained(out: Path, error: OSError) -> StorageError:
    remedy = "free some space or give another OUT" if error.errno in FULL else "give another OUT"
    return StorageError(f"{out}: cannot be written ({os.strerror(error.errno or 0) if error.errno else error}); {remedy}")


def join_pieces(pieces: Sequence[Path], file: Path) -> Path:
    """Write the bytes of all pieces into one file."""
    with file.open("xb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole, 1 << 24)
    return file


def write_weights(found: Sequence[Parameter], file: Path, done: Callable[[Parameter], None]) -> float:
    """Write the parameters in single precision, one in memory at a time, and return the root mean square of the word embeddings.

    Raises ConfigError for numbers that are not finite.
    """
    rms = math.nan
    with file.open("xb") as stream:
        stream.write(_safetensors_header(found))
        for parameter in found:
            values = np.ascontiguousarray(parameter.values(), dtype="<f4").reshape(parameter.shape)
            if not np.isfinite(values).all():
                raise ConfigError(
                    f"{parameter.tensor.name}: holds numbers that are not finite, so the file is damaged; copy or download it again"
                )
            if parameter.name.endswith("embed_tokens.weight"):
                rms = math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))
            stream.write(values.data)
            done(parameter)
    return rms


def _safetensors_header(found: Sequence[Parameter]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for parameter in found:
        end = start + parameter.num_bytes
        entries[parameter.name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
