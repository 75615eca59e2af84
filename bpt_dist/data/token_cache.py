"""Prepared splits kept on disk: what was read, checked and tokenised once is only read the next time.

One file a split, `<task>-<split>-<key>.safetensors`. The key is a SHA-256 over everything that shapes the tokens
(`data/prepare` collects it), so a file is never out of date: it exists or it does not. A file is used only if its checksum
is right. Nothing is ever unpickled. A cache that cannot be read or written costs time, never a run.

Files are mapped into memory (`data/columns`): the ranks of a host share them, and a rank reads the rows it uses. One rank of a host
verifies a file and hands over which file that was (`StoredFile`); the others open the same file without reading it through.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import safetensors.numpy

from bpt_dist.data.columns import ExampleRows, fact_columns, id_columns, stored_ids, stored_texts, text_columns
from bpt_dist.data.mapped_arrays import CHECKSUM, FileIdentity, MappedArrays, checksum_of
from bpt_dist.data.tokens import TokenisedTask
from bpt_dist.data.unknown_text import UnknownText
from bpt_dist.storage.files import OS_FILES, temporary_name
from bpt_dist.tasks.text_to_text import Example

log = logging.getLogger(__name__)
MAX_BYTES = 4 << 30  # some four times the thirteen tasks of GLUE and SuperGLUE with their sources
LEFTOVER_SECONDS = 3600.0  # a file this old that is still not whole belongs to a process that was killed
SUFFIX = ".safetensors"
IDS = ("source_ids", "target_ids", "label_ids")
TEXTS, FACTS = ("source", "target", "row_id"), "facts"
# Rows become tokens in these modules; a change in one of them gives every file another key.
MODULES = (
    "data/columns", "data/mapped_arrays", "data/prepare", "data/published", "data/row_checks", "data/rows", "data/splits",
    "data/token_cache", "data/tokens", "data/unknown_text", "tasks/spec", "tasks/text_to_text", "tasks/writings",
)  # fmt: skip


class StoredFile(NamedTuple):
    """A file of the cache that this process, or another one of its host, has verified."""

    path: Path
    identity: FileIdentity


@dataclass(frozen=True)
class Split:
    """The examples of one split, their tokens in the same order, and what was noted about the data when they were read."""

    examples: Sequence[Example]
    tokens: TokenisedTask
    notes: tuple[str, ...] = ()
    unknown: tuple[UnknownText, ...] = ()
    stored_hash: str | None = None
    file: StoredFile | None = None  # where it is kept

    @cached_property
    def content_hash(self) -> str:
        """The SHA-256 of what is trained or evaluated on: row ids, source, target and label tokens, in order."""
        if self.stored_hash is not None:
            return self.stored_hash  # under the checksum of the file
        digest = hashlib.sha256()
        tokens = self.tokens
        for row_id, source, target in zip(tokens.row_ids, tokens.source_ids, tokens.target_ids, strict=True):
            for part in (row_id.encode(), source.astype(np.int64).tobytes(), target.astype(np.int64).tobytes()):
                digest.update(len(part).to_bytes(8, "little") + part)
        for label in tokens.label_ids:
            digest.update(label.astype(np.int64).tobytes() + b";")
        return digest.hexdigest()


# Splits that are still in use in this process: source and target stage may read the same one, and so may the next run.
_held: WeakValueDictionary[Path, Split] = WeakValueDictionary()


def _code() -> dict[str, str]:
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update((Path(__file__).parents[1] / f"{name}.py").read_bytes() + b"\0")
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
    """Return the split at `path`, or None where there is no intact one; a damaged file is named and ignored."""
    if (held := _held.get(path)) is not None:
        return held
    try:
        split = _opened(path, verify=True)
    except OSError:
        return None  # there is none, it is not readable for this user, or it was just removed to make room
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: is damaged (%s); the data are prepared again", path, error)
        return None
    with suppress(OSError):
        os.utime(path)  # those used longest ago go first
    _held[path] = split
    return split


def read_verified(file: StoredFile) -> Split | None:
    """Return a split that a rank of this host has verified, without reading it through; another file is verified as by `read`."""
    if (held := _held.get(file.path)) is not None:
        return held
    try:
        split = _opened(file.path, verify=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return read(file.path)
    if split.file != file:
        return read(file.path)
    _held[file.path] = split
    return split


def write(path: Path, split: Split) -> Split:
    """Keep a split at `path` and return it as it is kept, out of memory; a folder that cannot be written is a warning.

    No fsync: what a power loss leaves fails its checksum. Processes that write the same file write the same bytes to temporary
    files of their own; the last one stays.
    """
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
            "start; free some space there, or set data.cache to a folder you can write"
        )
    else:
        with suppress(OSError):  # another process may have made room already
            split = _opened(path, verify=False)
    _held[path] = split
    return split


@lru_cache(maxsize=16)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _make_room(newest: Path) -> None:
    """Remove the files used longest ago until the rest is at most MAX_BYTES, and what interrupted writes left behind."""
    files = []
    for path in newest.parent.glob(f"*{SUFFIX}*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # another process makes room as well
            continue
        if path.suffix == SUFFIX:
            files.append((path != newest, -facts.st_mtime_ns, facts.st_size, path))
        elif time.time() - facts.st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)
    total = 0
    for is_older, _, size, path in sorted(files):
        total += size
        if is_older and total > MAX_BYTES:
            path.unlink(missing_ok=True)


def _encoded(name: str, split: Split) -> bytes:
    tokens, examples = split.tokens, split.examples
    arrays: dict[str, np.ndarray] = {}
    for part in IDS:
        arrays |= id_columns(part, getattr(tokens, part))
    for part in TEXTS:
        arrays |= text_columns(part, (getattr(example, part) for example in examples))
    arrays |= fact_columns(FACTS, examples)
    whole = {
        "name": tokens.name,
        "num_truncated_sources": tokens.num_truncated_sources,
        "num_truncated_targets": tokens.num_truncated_targets,
        "notes": split.notes,
        "unknown": [[field.field, field.num_unknown, field.num_characters, field.examples] for field in split.unknown],
        "content_hash": split.content_hash,
    }
    # Plain ASCII: half a surrogate pair, which JSON of a user may hold in a column nobody checks, comes back as it was.
    arrays["split"] = np.frombuffer(json.dumps(whole, allow_nan=False).encode("ascii"), dtype=np.uint8)
    arrays[CHECKSUM] = np.frombuffer(checksum_of(name, arrays), dtype=np.uint8)
    return safetensors.numpy.save(arrays)


def _opened(path: Path, *, verify: bool) -> Split:
    """Return what `write` has kept. Raises OSError, and ValueError, KeyError, TypeError or AttributeError for anything else."""
    mapped = MappedArrays(path, verify=verify)
    columns = mapped.arrays
    whole = json.loads(columns["split"].tobytes())
    sources, targets, labels = (stored_ids(columns, part) for part in IDS)
    source, target, row_ids, facts = (stored_texts(columns, part) for part in (*TEXTS, FACTS))
    cut = whole["num_truncated_sources"], whole["num_truncated_targets"]
    tokens = TokenisedTask(whole["name"], sources, targets, row_ids, tuple(labels), *cut)
    unknown = tuple(UnknownText(name, num, total, tuple(shown)) for name, num, total, shown in whole["unknown"])
    examples = ExampleRows(source, target, row_ids, facts)
    return Split(examples, tokens, tuple(whole["notes"]), unknown, whole["content_hash"], StoredFile(path, mapped.identity))
