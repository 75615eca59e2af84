"""`bpt-dist configs`: list the configurations that come with the package, or copy some of them into a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from bpt_dist.config import shipped
from bpt_dist.config.base import did_you_mean
from bpt_dist.errors import ConfigError, StorageError


def print_configs(names: Sequence[str], to: Path | None, *, as_json: bool) -> None:
    """Print all shipped configurations with their purpose, or copy `names` (files or folders) below `to` (default: here).

    Raises ConfigError for an unknown name and for a file that is already there, StorageError where it cannot be written.
    """
    if not names and to is None:
        known = {name: shipped.purpose(name) for name in shipped.names()}
        typer.echo(json.dumps(known, indent=1) if as_json else _listed(known))
        return
    copied = _copy(_chosen(names), to or Path())
    typer.echo(json.dumps(list(map(str, copied)), indent=1) if as_json else "\n".join(map(str, copied)))


def _listed(known: dict[str, str]) -> str:
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {purpose}".rstrip() for name, purpose in known.items())


def _chosen(names: Sequence[str]) -> list[str]:
    known = shipped.names()
    if not names:
        return known
    chosen: dict[str, None] = {}
    for name in names:
        wanted = name.removeprefix("configs/").rstrip("/")
        found = [each for each in known if each in (wanted, f"{wanted}.yaml") or each.startswith(f"{wanted}/")]
        if not found:
            raise ConfigError(f"{name}: is no shipped configuration{did_you_mean(wanted, known)}; `bpt-dist configs` lists them")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _copy(names: Sequence[str], to: Path) -> list[Path]:
    files = {name: to / name for name in names}
    for file in files.values():
        if file.exists():
            raise ConfigError(f"{file}: exists, and nothing is overwritten; move it away or give another --to")
    try:
        for name, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((shipped.folder() / name).read_bytes())
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be written ({error.strerror}); give another --to") from error
    return list(files.values())
