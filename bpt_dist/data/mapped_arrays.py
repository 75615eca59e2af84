"""Arrays of a safetensors file, mapped into memory: ranks of one host share the pages, and what is never used is never read."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from bpt_dist.storage.file_system import keeps_removed_files

BLOCK = 1 << 20  # bytes read at once while a file is verified
TYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}  # as safetensors calls them
CHECKSUM = "sha256"


class FileIdentity(NamedTuple):
    """Which file it is on its host, and the checksum it states: equal for two ranks that have opened the same file."""

    device: int
    inode: int
    num_bytes: int
    checksum: bytes


class _Place(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


def checksum_of(name: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the SHA-256 of the arrays and of the name of their file: a file that was renamed is damaged."""
    digest = hashlib.sha256(name.encode())
    for part, array in sorted(arrays.items()):
        digest.update(_heading(part, array.dtype, array.shape))
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class MappedArrays:
    """The arrays of an open file by name, its checksum apart; nothing but the header is read, with `verify` all bytes once.

    Raises OSError, and ValueError, KeyError or TypeError for a file that is damaged.
    """

    def __init__(self, path: Path, *, verify: bool) -> None:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            places = _places(file, facts.st_size)
            if verify:
                _verify(path.name, file, places)
            # A page of a mapped file that another host has removed cannot be read again: that would end the process.
            buffer: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if keeps_removed_files(path) else _read(file)
        self.arrays = {part: _array(buffer, place) for part, place in places.items()}
        self.identity = FileIdentity(facts.st_dev, facts.st_ino, facts.st_size, self.arrays.pop(CHECKSUM).tobytes())


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _places(file: IO[bytes], num_bytes: int) -> dict[str, _Place]:
    """Return where each array is, from the header."""
    length = int.from_bytes(file.read(8), "little")
    if length > num_bytes - 8:
        raise ValueError("it is cut")
    places = {}
    for part, entry in json.loads(file.read(length)).items():
        dtype, shape = TYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if not 8 + length <= start <= end <= num_bytes or end - start != dtype.itemsize * math.prod(shape):
            raise ValueError("it is cut, or its header is wrong")
        places[part] = _Place(dtype, shape, start, end)
    return places


def _verify(name: str, file: IO[bytes], places: Mapping[str, _Place]) -> None:
    """Raise ValueError where the checksum is not that of the bytes; read, not mapped: a disk error is then an OSError."""
    digest = hashlib.sha256(name.encode())
    for part, place in sorted(places.items()):
        if part == CHECKSUM:
            continue
        digest.update(_heading(part, place.dtype, place.shape))
        file.seek(place.start)
        left = place.end - place.start
        while left and (block := file.read(min(left, BLOCK))):
            digest.update(block)
            left -= len(block)
    stated = places[CHECKSUM]
    file.seek(stated.start)
    if digest.digest() != file.read(stated.end - stated.start):
        raise ValueError("its checksum is wrong")


def _heading(part: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    return f"\0{part} {dtype} {shape}\0".encode()


def _array(buffer: Any, place: _Place) -> np.ndarray:
    count = math.prod(place.shape)
    if not count:
        return np.zeros(place.shape, place.dtype)
    return np.frombuffer(buffer, place.dtype, count, place.start).reshape(place.shape)
