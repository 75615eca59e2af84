"""Find exported prompts and read what they are, without their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpt_dist.artifacts.hub import local_folder
from bpt_dist.artifacts.task_record import TaskEntry, TaskRecord, read_record
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout


@dataclass(frozen=True)
class Export:
    """The prompt of one task, in `folder`, under the `name` by which rows ask for it."""

    name: str
    folder: Path
    record: TaskRecord
    task: TaskEntry


def read_exports(place: Path, name: str | None = None, *, ensemble: bool = False, best: bool = False) -> list[Export]:
    """Return the prompts of an export, of all exports of a finished run, or of all exports that a folder or a hub repository holds.

    `name` replaces the task's name, where there is one. Where a task has a MAP prompt and others, `ensemble` and `best` choose.
    Raises ConfigError for a folder without a prompt, or with more than `name` can name.
    """
    if ensemble and best:
        raise ConfigError("--best: contradicts --ensemble; choose one of them")
    wanted = "ensemble" if ensemble else "best" if best else "map"
    found = [export for folder in _folders(place, wanted) for export in _of_folder(folder)]
    # The export of a joint stage repeats the prompts of single tasks, that of all particles those of source tasks.
    alone = {export.name for export in found if len(export.record.tasks) == 1}
    found = [export for export in found if len(export.record.tasks) == 1 or export.name not in alone]
    as_asked = {export.name for export in found if export.record.predict == wanted}
    found = [export for export in found if export.record.predict == wanted or export.name not in as_asked]
    if name is None:
        return found
    if len(found) > 1:
        names = ", ".join(export.name for export in found)
        raise ConfigError(f"--prompt {name}={place}: has prompts for {names}; give {place} without a name, or one of its folders")
    return [Export(name, export.folder, export.record, export.task) for export in found]


def read_given(places: Iterable[Path], named: Iterable[str], *, ensemble: bool = False, best: bool = False) -> list[Export]:
    """Return the prompts that a command line gives: those of `places`, and those named as `NAME=FOLDER`.

    Raises ConfigError where there is none, where two have one name, and where they belong to different backbones.
    """
    exports = [export for place in places for export in read_exports(place, ensemble=ensemble, best=best)]
    for one in named:
        name, _, folder = one.partition("=")
        if not name or not folder:
            raise ConfigError(f"--prompt {one}: is not NAME=FOLDER; write for example --prompt reviews=exports/reviews")
        exports += read_exports(Path(folder), name, ensemble=ensemble, best=best)
    if not exports:
        raise ConfigError("no prompt is given; name a folder written by `bpt-dist export`, a run, or --prompt NAME=FOLDER")
    refuse_duplicates(exports)
    refuse_several_backbones(exports)
    return exports


def refuse_duplicates(exports: Iterable[Export]) -> None:
    """Raise ConfigError where two prompts have one name: a row could not say which of them it means."""
    owners: dict[str, Path] = {}
    for export in exports:
        if (other := owners.setdefault(export.name, export.folder)) is not export.folder:
            raise ConfigError(
                f"task {export.name!r}: has a prompt in {other} and another in {export.folder}; leave one out, or name it by "
                f"--prompt NAME={export.folder}"
            )


def refuse_several_backbones(exports: Sequence[Export]) -> None:
    """Raise ConfigError where prompts belong to different backbones or tokenizers, which no one model can serve."""
    first = exports[0]
    for other in exports[1:]:
        for what, one, two in (
            ("backbone", first.record.backbone.sha256, other.record.backbone.sha256),
            ("tokenizer", first.record.tokenizer_sha256, other.record.tokenizer_sha256),
        ):
            if one != two:
                raise ConfigError(
                    f"{other.folder}: belongs to another {what} (SHA-256 {two[:12]}) than {first.folder} ({one[:12]}); "
                    "start one process for each backbone"
                )


def _folders(place: Path, wanted: str) -> list[Path]:
    """Return the folders with a `task.json` that `place`, a folder or an id of the hub, means."""
    place = local_folder(place)
    if not place.is_dir():
        raise ConfigError(
            f"{place}: there is no such folder; give an exported prompt, a run, a folder of exports, or owner/name of the hub"
        )
    if (place / layout.STATUS).is_file():
        kind = {"ensemble": layout.ENSEMBLE, "best": layout.BEST, "map": layout.ADAPTER}[wanted]
        folders = sorted({path.parent for path in place.glob(f"{layout.TARGET}/*/{kind}/*.json")})
        if not folders:
            remedy = "give a run whose method trains soft prompts" if wanted == "map" else f"leave --{wanted} out"
            what = {"ensemble": "ensemble", "best": "best particle", "map": "prompt"}[wanted]
            raise ConfigError(f"{place}: the run has exported no {what}; {remedy}")
        return folders
    if (place / layout.TASK_RECORD).is_file() or (place / layout.ADAPTER_CONFIG).is_file():
        return [place]
    below = [path.parent for kind in (layout.TASK_RECORD, layout.ADAPTER_CONFIG) for path in sorted(place.glob(f"*/{kind}"))]
    below = [folder for folder in below if not (folder / layout.POSTERIOR_FACTS).is_file()]  # which is beside them on the hub
    if not below:
        raise ConfigError(f"{place}: holds no exported prompt; give a folder written by `bpt-dist export`, or a run")
    return list(dict.fromkeys(below))


def _of_folder(folder: Path) -> list[Export]:
    record = read_record(folder)
    if not record.prompts:
        raise ConfigError(f"{folder}: holds no soft prompt, which is all that answers in batches; use `bpt-dist eval {folder}`")
    return [Export(task.name, folder, record, task) for task in record.tasks]
