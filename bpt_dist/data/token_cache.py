"""Prepared splits kept on disk: what was read, checked, worded and tokenised once is only read the next time.

One file a split, `<task>-<split>-<key>.safetensors`. The key is a SHA-256 over everything that shapes the tokens
(`prepared` collects it), so a file is never out of date: it is found or it is not. What is in a file is believed only
if its checksum is right. Nothing is ever unpickled. A cache that cannot be read or written costs time, never a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from bpt_dist.data.text_to_text import Example
from bpt_dist.data.tokens import TokenisedTask
from bpt_dist.files import OS_FILES, temporary_name

log = logging.getLogger(__name__)
MAX_BYTES = 4 << 30  # some four times the thirteen tasks of GLUE and SuperGLUE with their sources
LEFTOVER_SECONDS = 3600.0  # a file this old that is still not whole belongs to a process that was killed
SUFFIX = ".safetensors"
IDS = ("source_ids", "target_ids", "label_ids")
CHECKSUM = "sha256"
# Rows become tokens in these modules; a changed one makes every file of before unfindable.
MODULES = ("checks", "prepared", "rows", "spec", "text_to_text", "token_cache", "tokens")


@dataclass(frozen=True)
class Split:
    """The examples of one split, their tokens in the same order, and what was noted about the data when they were read."""

    examples: tuple[Example, ...]
    tokens: TokenisedTask
    notes: tuple[str, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of what is trained or evaluated on: row ids, source, target and label tokens, in order."""
        digest = hashlib.sha256()
        tokens = self.tokens
        for row_id, source, target in zip(tokens.row_ids, tokens.source_ids, tokens.target_ids, strict=True):
            for part in (row_id.encode(), source.astype(np.int64).tobytes(), target.astype(np.int64).tobytes()):
                digest.update(len(part).to_bytes(8, "little") + part)
        for label in tokens.label_ids:
            digest.update(label.astype(np.int64).tobytes() + b";")
        return digest.hexdigest()


# Splits that somebody in this process still holds: source and target stage may read the same one, and so may the next run.
_held: WeakValueDictionary[Path, Split] = WeakValueDictionary()


def _code() -> dict[str, str]:
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes() + b"\0")
    libraries = {package: version(package) for package in ("numpy", "tokenizers", "torch")}
    return {"code": digest.hexdigest(), "python": platform.python_version(), **libraries}


# What makes other tokens of the same rows when it changes. Read with the modules themselves, not when they are edited.
CODE = _code()


def key_of(facts: Mapping[str, object]) -> str:
    """Return the SHA-256, 64 hexadecimal digits, of facts that JSON can write."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def path_of(folder: Path, task: str, split: str, key: str) -> Path:
    """Return the file of a split."""
    return folder / f"{task}-{split}-{key}{SUFFIX}"


def read(path: Path) -> Split | None:
    """Return the split at `path`, or None where there is none that can be believed; a damaged file is named and ignored."""
    if (held := _held.get(path)) is not None:
        return held
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError:
        data = None  # of somebody else, or just removed to make room
    if data is None:
        return None
    try:
        split = _decoded(path.name, data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: is damaged (%s); the data are prepared again", path, error)
        return None
    with suppress(OSError):
        os.utime(path)  # those used longest ago go first
    _held[path] = split
    return split


def write(path: Path, split: Split) -> None:
    """Keep a split at `path`; a folder that cannot be written is a warning.

    No fsync: what a power loss leaves fails its checksum. Processes that write the same file write the same bytes under names of
    their own; the last one stays.
    """
    _held[path] = split
    temporary = temporary_name(path)
    try:
        # Rows may be private, and a stranger who could write here would choose what is trained on.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            OS_FILES.write(temporary, _encoded(path.name, split))
            OS_FILES.rename(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _make_room(path)
    except OSError as error:
        _warn_once(
            f"{path.parent}: prepared data cannot be kept ({error.strerror or type(error).__name__}) and will be prepared at every "
            "start; free some space there, or set data.cache to a folder of yours"
        )


@lru_cache(maxsize=16)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _make_room(newest: Path) -> None:
    """Remove the files used longest ago until the rest is at most MAX_BYTES, and what interrupted writes left behind."""
    found = []
    for path in newest.parent.glob(f"*{SUFFIX}*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # another process makes room as well
            continue
        if path.suffix == SUFFIX:
            found.append((path != newest, -facts.st_mtime_ns, facts.st_size, path))
        elif time.time() - facts.st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)
    total = 0
    for is_older, _, size, path in sorted(found):
        total += size
        if is_older and total > MAX_BYTES:
            path.unlink(missing_ok=True)


def _encoded(name: str, split: Split) -> bytes:
    tokens, examples = split.tokens, split.examples
    arrays = {}
    for part in IDS:
        rows = getattr(tokens, part)
        arrays[part] = np.concatenate([np.zeros(0, dtype=np.int32), *rows])
        arrays[f"{part}.lengths"] = np.array([len(row) for row in rows], dtype=np.int64)
    columns = {
        "name": tokens.name,
        "num_truncated_sources": tokens.num_truncated_sources,
        "num_truncated_targets": tokens.num_truncated_targets,
        "notes": split.notes,
        "source": [example.source for example in examples],
        "target": [example.target for example in examples],
        "row_id": [example.row_id for example in examples],
        "label": [example.label for example in examples],
        "references": [example.references for example in examples],
        "group": [example.group for example in examples],
    }
    # Plain ASCII: half a surrogate pair, which JSON of a user may hold in a column nobody checks, comes back as it was.
    arrays["text"] = np.frombuffer(json.dumps(columns, allow_nan=False).encode("ascii"), dtype=np.uint8)
    arrays[CHECKSUM] = np.frombuffer(_checksum(name, arrays), dtype=np.uint8)
    return safetensors.numpy.save(arrays)


def _decoded(name: str, data: bytes) -> Split:
    """Return what `_encoded` wrote. Raises ValueError, KeyError, TypeError or SafetensorError for anything else."""
    arrays = safetensors.numpy.load(data)
    if arrays.pop(CHECKSUM).tobytes() != _checksum(name, arrays):
        raise ValueError("its checksum is wrong")
    columns = json.loads(arrays["text"].tobytes())
    examples = tuple(
        Example(source, target, row_id, label, tuple(references), group)
        for source, target, row_id, label, references, group in zip(
            *(columns[part] for part in ("source", "target", "row_id", "label", "references", "group")), strict=True
        )
    )
    sources, targets, labels = (_cut_apart(arrays[part], arrays[f"{part}.lengths"]) for part in IDS)
    row_ids = tuple(columns["row_id"])
    cut = columns["num_truncated_sources"], columns["num_truncated_targets"]
    return Split(examples, TokenisedTask(columns["name"], sources, targets, row_ids, labels, *cut), tuple(columns["notes"]))


def _cut_apart(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    ends = np.cumsum(lengths).tolist()
    return tuple(ids[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _checksum(name: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the SHA-256 of the arrays and of the name of their file: a file that was renamed is not believed."""
    digest = hashlib.sha256(name.encode())
    for part, array in sorted(arrays.items()):
        digest.update(f"\0{part} {array.dtype} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
