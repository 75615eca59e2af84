"""Read the `results.json` files of finished runs: the input of every table, checked entry by entry."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bpt_dist.errors import DataError

COPIES, SWEEP = "mlartifacts", "sweep.json"


@dataclass(frozen=True)
class Result:
    """One entry of a run's `results.json`; `value` and `majority` are percent, `n` counts test examples."""

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

    @property
    def predictions(self) -> Path:
        """Return where the run keeps the per-example predictions behind this entry (the file may be missing)."""
        parts = [part for part in (self.split, self.predict) if part not in ("test", "map")]
        return self.folder / "target" / self.task / ("-".join(["predictions", *parts]) + ".jsonl")


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
    for file in (file for file in files if _is_wanted(file, paths)):
        state = _run_state(file.parent)
        if state != "finished":
            notes.append(f"Left out: run {file.parent.name} is {state}, not finished.")
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
    found: dict[Path, None] = {}
    for path in paths:
        # A tracking store beside the runs holds copies of their files.
        files = sorted(file for file in Path(path).rglob("results.json") if COPIES not in file.relative_to(path).parts)
        if not files:
            raise DataError(f"{path}: no results.json at or below it; give folders of evaluated runs, or their parent")
        found.update(dict.fromkeys(file.resolve() for file in files))
    return list(found)


def _is_wanted(file: Path, paths: Sequence[Path]) -> bool:
    """Return whether a result belongs to no sweep, or to one that was asked for."""
    sweep = file.parent.parent
    return not (sweep / SWEEP).is_file() or any(Path(path).resolve().is_relative_to(sweep) for path in paths)


def _run_state(folder: Path) -> str:
    file = folder / "status.json"
    if not file.exists():
        return "without status.json"
    status = _read_json(file)
    return str(status.get("state", "unknown")) if isinstance(status, dict) else "unknown"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); evaluate the run again or leave its folder out") from error


def _result(entry: Any, file: Path, index: int) -> Result:
    place = f"{file}: entry {index}"
    if not isinstance(entry, dict):
        raise DataError(f"{place} is {type(entry).__name__}, expected an object; evaluate the run again")
    fields = [name for name in Result.__dataclass_fields__ if name != "folder"]
    missing = [name for name in fields if name not in entry and name != "majority"]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}; the run was evaluated by another version, evaluate it again")
    known: dict[str, Any] = {name: entry.get(name) for name in fields}
    result = Result(**known, folder=file.parent)
    if not isinstance(result.value, int | float) or not math.isfinite(result.value):
        raise DataError(
            f"{place}: {result.metric} of '{result.task}' is {result.value!r}, expected a number; evaluate the run again"
        )
    return result
