"""Read the `results.json` files of finished runs: the input of every table, checked entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bpt_dist.errors import DataError, StorageError
from bpt_dist.storage import layout
from bpt_dist.storage.files import read_json
from bpt_dist.storage.run_directory import RunStatus, read_status

OPTIONAL = ("majority", "selected_step", "inputs", "start_particle", "chosen_particle")


@dataclass(frozen=True)
class Result:
    """One entry of a run's `results.json`, for its writer and its readers.

    `value` and `majority` are percent, but for `nll` (nats); `n` counts the examples of the split. `selected_step` is the step of
    the best validation, 0 without one; results of version 0.1.0 and later have it. `inputs` holds the SHA-256 of what the run read
    beside its backbone and rows; results of earlier versions lack it. `start_particle` is the source particle that the target stage
    started from where it chose one, counted from 0; `chosen_particle` the adapted one that predicts where
    validation chose it. `folder`, where the run is, is not written.
    """

    method: str
    backbone: str
    task: str
    split: str
    n: int
    metric: str
    value: float
    seed: int
    steps: int
    trainable_parameters: int
    joint: bool
    stage: str
    run: str
    predict: str
    decode: str
    protocol: str
    headline: bool
    majority: float | None
    folder: Path
    selected_step: int | None = None
    inputs: dict[str, str] | None = None
    start_particle: int | None = None
    chosen_particle: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the entry as `results.json` holds it."""
        return {name: value for name, value in vars(self).items() if name != "folder"}

    @property
    def predictions(self) -> Path:
        """Return where the run keeps the per-example predictions behind this entry (the file may be missing)."""
        return self.folder / layout.TARGET / self.task / layout.predictions(self.split, self.predict)


class Collected(NamedTuple):
    """What was read, and one sentence for everything that was left out."""

    results: list[Result]
    notes: list[str]


def collect(paths: Sequence[Path]) -> Collected:
    """Read every `results.json` at or below `paths`, leaving out unfinished runs with a note.

    The trials of a sweep are tries, not results: they are read where their sweep's folder, or one inside it, is named.

    Raises DataError for a path without results and for an entry that cannot be read, naming file and entry.
    """
    results: list[Result] = []
    notes: list[str] = []
    files = _result_files(paths)
    for sweep in sorted({file.parent.parent for file in files if not _is_wanted(file, paths)}):
        num_trials = sum(file.parent.parent == sweep for file in files)
        notes.append(f"Left out: {num_trials} trials of sweep {sweep.name}; name {sweep} to see them.")
    owners: dict[str, Path] = {}
    for file in (file for file in files if _is_wanted(file, paths)):
        status = _status(file.parent)
        record = file.parent / layout.RUN
        run = _read_json(record).get("id") if record.is_file() else None
        if run is not None and (twin := owners.setdefault(run, file.parent)) != file.parent:
            raise DataError(f"{file.parent}: is the run that is also in {twin}; give only one of the two folders")
        if status is None or status.state != "finished":
            problem = f"has no {layout.STATUS}" if status is None else f"is {status.state}, not finished"
            notes.append(f"Left out: run {file.parent.name} {problem}.")
            continue
        entries = _read_json(file)
        if not isinstance(entries, list):
            raise DataError(f"{file}: holds {type(entries).__name__}, expected a list of results; evaluate the run again")
        for index, entry in enumerate(entries):
            if isinstance(entry, dict) and entry.get("value", 0.0) is None:
                notes.append(f"Undefined: {entry.get('metric')} on {entry.get('task')}, run {file.parent.name}.")
            else:
                results.append(_result(entry, file, index))
    return Collected(results, notes)


def _result_files(paths: Sequence[Path]) -> list[Path]:
    unique: dict[Path, None] = {}
    for path in paths:
        # A tracking store beside the runs holds copies of their files.
        files = sorted(file for file in Path(path).rglob(layout.RESULTS) if layout.ARTIFACTS not in file.relative_to(path).parts)
        if not files:
            raise DataError(f"{path}: no results.json at or below it; give folders of evaluated runs, or their parent")
        unique.update(dict.fromkeys(file.resolve() for file in files))
    return list(unique)


def _is_wanted(file: Path, paths: Sequence[Path]) -> bool:
    """Return whether a result belongs to no sweep, or to one that was asked for."""
    sweep = file.parent.parent
    return not (sweep / layout.SWEEP).is_file() or any(Path(path).resolve().is_relative_to(sweep) for path in paths)


def _status(folder: Path) -> RunStatus | None:
    try:
        return read_status(folder)
    except StorageError as error:
        raise DataError(f"{error}; or leave the folder out") from error


def _read_json(file: Path) -> Any:
    try:
        return read_json(file)
    except StorageError as error:
        raise DataError(f"{error}; or leave the folder out") from error


def _result(entry: Any, file: Path, index: int) -> Result:
    place = f"{file}: entry {index}"
    if not isinstance(entry, dict):
        raise DataError(f"{place} is {type(entry).__name__}, expected an object; evaluate the run again")
    fields = [name for name in Result.__dataclass_fields__ if name != "folder"]
    missing = [name for name in fields if name not in entry and name not in OPTIONAL]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}; the run was evaluated by another version, evaluate it again")
    values: dict[str, Any] = {name: entry.get(name) for name in fields}
    result = Result(**values, folder=file.parent)
    if not isinstance(result.value, int | float) or not math.isfinite(result.value):
        raise DataError(
            f"{place}: {result.metric} of '{result.task}' is {result.value!r}, expected a number; evaluate the run again"
        )
    return result
