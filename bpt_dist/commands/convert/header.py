"""What a GGUF says of itself, and its tensors, still quantised and in the file."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from bpt_dist.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

MAGIC = b"GGUF"
AGAIN = "copy or download it again"
DAMAGED = (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError, OSError)
"""What `GGUFReader` raises where a file ends too early or its lengths make no sense."""


def gguf_package() -> ModuleType:
    """Return the package `gguf`. Raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "convert: reads GGUF files with the package gguf, which is not installed; run `pip install 'bpt_dist[convert]'` or "
            "`pip install gguf`"
        ) from error
    return gguf


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a GGUF, of all its parts."""

    name: str
    readers: tuple[GGUFReader, ...]

    def __contains__(self, key: str) -> bool:
        return key in self.readers[0].fields

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` if the file has none."""
        field = self.readers[0].fields.get(key)
        if field is None:
            return default
        with _damage_named(self.name):
            return field.contents()

    def length(self, key: str) -> int:
        """Return how many values the list of a key has, unread; 0 if the file has none."""
        field = self.readers[0].fields.get(key)
        return 0 if field is None else len(field.data)

    def keys(self) -> list[str]:
        """Return the keys of the metadata."""
        return list(self.readers[0].fields)

    @property
    def architecture(self) -> str:
        """The family that the file names, an empty text if none."""
        return str(self.get("general.architecture", ""))

    @cached_property
    def tensors(self) -> dict[str, ReaderTensor]:
        """The tensors by name."""
        return {tensor.name: tensor for reader in self.readers for tensor in reader.tensors}

    @property
    def types(self) -> dict[str, int]:
        """How many tensors are stored in each type, by its name."""
        return dict(sorted(Counter(tensor.tensor_type.name for tensor in self.tensors.values()).items()))


def open_gguf(files: Sequence[Path], name: str) -> Header:
    """Return the header of a GGUF in one or several files. Raises ConfigError for what is none, damaged, or cannot be converted."""
    header = Header(name, tuple(_reader(file) for file in files))
    _refuse_wrong_parts(header, files)
    kind = header.get("general.type", "model")
    if kind != "model":
        raise ConfigError(f"{name}: holds no model but a GGUF of type {kind}; give the file of the model")
    if not header.tensors:
        raise ConfigError(f"{name}: holds a vocabulary without weights; give the file of the model")
    _refuse_types(header)
    return header


def _reader(file: Path) -> GGUFReader:
    gguf = gguf_package()
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a file that you may read") from error
    if start != MAGIC:
        raise ConfigError(f"{file}: is no GGUF file (it does not begin with {MAGIC.decode()}); give a GGUF file")
    with _damage_named(str(file)):
        reader = gguf.GGUFReader(file)
    if reader.byte_order != "I":
        raise ConfigError(f"{file}: was written for processors of the other byte order; give a file for this one")
    return reader


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn what `GGUFReader` raises into one line that names the file."""
    try:
        with np.errstate(over="ignore"):  # a length beyond the file's end: what is there is too short, and that is raised
            yield
    except DAMAGED as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if "GGMLQuantizationType" in reason:
            raise ConfigError(
                f"{name}: stores tensors in a type that gguf {_version()} does not know ({reason}); update gguf, or give another "
                "quantisation of the model"
            ) from error
        raise ConfigError(f"{name}: is cut short or damaged ({reason}); {AGAIN}") from error


def _version() -> str:
    from importlib import metadata

    return metadata.version("gguf")


def _refuse_wrong_parts(header: Header, files: Sequence[Path]) -> None:
    """Refuse parts that do not belong together, and a part that was renamed so that the others cannot be found."""
    count = int(header.get("split.count", 0))
    if count > 1 and len(files) == 1:
        raise ConfigError(
            f"{header.name}: is one of {count} parts, which are called NAME-00001-of-{count:05}.gguf and so on; give it its name "
            "back beside the others"
        )
    numbers = [reader.fields["split.no"].contents() if "split.no" in reader.fields else None for reader in header.readers]
    total = sum(len(reader.tensors) for reader in header.readers)
    is_whole = header.get("split.tensors.count", total) == total == len(header.tensors)
    if len(files) > 1 and (numbers != list(range(len(files))) or not is_whole):
        raise ConfigError(f"{header.name}: its parts are not those of one model; {AGAIN}")


def _refuse_types(header: Header) -> None:
    gguf = gguf_package()
    refused = {}
    for tensor in header.tensors.values():
        kind = tensor.tensor_type
        if kind.name not in refused and not can_dequantize(kind):
            refused[kind.name] = tensor.name
    if refused:
        known = ", ".join(kind.name for kind in gguf.GGMLQuantizationType if can_dequantize(kind))
        listed = ", ".join(f"{kind} ({tensor})" for kind, tensor in refused.items())
        raise ConfigError(f"{header.name}: stores tensors as {listed}, which gguf cannot dequantise; give one of {known}")


def can_dequantize(kind: Any) -> bool:
    """Return whether `gguf` turns this type into numbers: it is asked to, with one block of zeros."""
    gguf = gguf_package()
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
