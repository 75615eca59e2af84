"""Where the tracking store of a run and its artifacts are: one answer for training, check, sync, the page and sweeps.

The default store is `<output>/mlflow.db`. The artifacts of a sqlite store are in `mlartifacts` beside the database, one folder
for each experiment; no experiment name leads out of it. MLflow keeps absolute locations: a moved store is corrected when opened.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from bpt_dist.config import RunConfig
from bpt_dist.config.mlflow_environment import uri_of_environment
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.files import read_json
from bpt_dist.storage.layout import ARTIFACTS, STORE, TRACKING

SQLITE = "sqlite:///"
PLAIN_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST_STEM, DIGITS = 40, 12
BUSY_SECONDS = 10
# Columns of MLflow's tables that hold locations below that of the experiment.
LOCATIONS = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)
log = logging.getLogger(__name__)


def default_store(output: Path) -> Path:
    """Return the database file of the runs below `output`."""
    return output.resolve() / STORE


def sqlite_uri(store: Path) -> str:
    """Return the tracking address of a database file."""
    return f"{SQLITE}{store}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a sqlite store, None for a server."""
    return Path(uri.partition("?")[0].removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def store_uri(config: RunConfig) -> str:
    """Return the address of the store that mirrors a run: `tracking.uri`, MLFLOW_TRACKING_URI, or sqlite in `<output>/mlflow.db`.

    Earlier versions made the default store two folders above `run_dir`. A run that was begun there continues there. Raises
    ConfigError for a folder that no address of sqlite can name.
    """
    if config.tracking.uri is not None:
        return config.tracking.uri
    if (given := uri_of_environment(config.tracking)) is not None:
        return given
    default = default_store(config.output)
    if "?" in str(default):
        raise ConfigError(
            f"output: {config.output} cannot hold the tracking store, because addresses of sqlite end at '?'; choose another "
            "output= or set tracking.uri"
        )
    earlier = config.directory.resolve().parent.parent / STORE
    recorded = recorded_uri(config.directory)
    if recorded is not None and sqlite_path(recorded) == earlier != default and earlier.is_file():
        log.info("%s: this run was begun in %s and continues there (new runs: %s)", config.directory, earlier, default)
        return recorded
    return sqlite_uri(default)


def recorded_uri(folder: Path) -> str | None:
    """Return the address of the store in a run's `tracking.json`, None without one.

    For a sqlite store that was moved together with the run it is the present place.
    """
    if not (folder / TRACKING).is_file():
        return None
    state = read_json(folder / TRACKING)
    uri = str(state["uri"])
    store = sqlite_path(uri)
    if store is None:
        return uri
    folder = folder.resolve()
    begun_in = state.get("folder")  # since when is recorded: tracking.json of earlier versions lacks it
    if begun_in not in (None, str(folder)):
        moved = Path(os.path.normpath(folder / os.path.relpath(store, begun_in)))
        if moved.is_file():
            return uri.replace(str(store), str(moved), 1)
    if store.is_file():
        return uri
    above = next((place / STORE for place in folder.parents if (place / STORE).is_file()), None)
    return uri if above is None else uri.replace(str(store), str(above), 1)


def check_recorded(folder: Path, uri: str) -> None:
    """Raise StorageError for a sqlite store whose folder is gone: making it again would write outside the moved runs."""
    store = sqlite_path(uri)
    if store is not None and not store.parent.is_dir():
        raise StorageError(
            f"{store}: this store is gone and there is none above {folder}; move it beside the runs, or set its new place in "
            f"{folder / TRACKING} (uri)"
        )


def experiment_folder(experiment: str) -> str:
    """Return the folder of an experiment's artifacts: its name, or a part of the name and a hash if it is no plain folder name."""
    if PLAIN_FOLDER.fullmatch(experiment):
        return experiment
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", experiment).strip("._-")[:LONGEST_STEM]
    return f"{stem or 'experiment'}-{hashlib.sha256(experiment.encode()).hexdigest()[:DIGITS]}"


def artifact_root(store: Path) -> Path:
    """Return the folder that holds the artifacts of a sqlite store."""
    return store.parent / ARTIFACTS


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where the artifacts of a new experiment go, None for a server, which decides itself."""
    store = sqlite_path(uri)
    return None if store is None else (artifact_root(store) / experiment_folder(experiment)).as_uri()


def follow_moved_store(store: Path) -> None:
    """Correct the artifact locations in a sqlite store that was moved, and those that earlier versions made of experiment names.

    Only locations of our own making are changed. Where the database was moved alone and its artifacts are still in the old place,
    they stay valid, and a warning names that place. Call it with the lock of the store held.
    """
    root = artifact_root(store)
    with closing(sqlite3.connect(store, timeout=BUSY_SECONDS)) as database:
        experiments = database.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for number, name, location in experiments:
            place = _local(location)
            right = root / experiment_folder(name)
            if place is None or place == right or place.name == str(number):
                continue
            old_root = _root_of(place, name)
            if old_root is None:
                if place == Path(os.path.normpath(root / name)):
                    # The name led out of the root: what was written there stays, new runs are kept below the root.
                    _set_location(database, number, right.as_uri())
            elif old_root == root:
                continue  # by the name, below the root: an earlier version
            elif old_root.is_dir() and not (root / place.relative_to(old_root)).is_dir():
                log.warning("%s: its artifacts are still in %s; move that folder to %s", store, old_root, root)
            else:
                _move(database, number, location, (root / place.relative_to(old_root)).as_uri())
                if old_root.is_dir():
                    log.warning("%s: new artifacts go to %s; what is in %s belongs to the old place", store, root, old_root)
        database.commit()


def _local(location: str | None) -> Path | None:
    """Return the folder of a `file:` location, None for every other one."""
    parts = urlsplit(location or "")
    return Path(os.path.normpath(unquote(parts.path))) if parts.scheme == "file" else None


def _root_of(folder: Path, experiment: str) -> Path | None:
    """Return the artifact root under which a location was made for an experiment, None if it is not of our making."""
    for name in (experiment_folder(experiment), experiment):
        depth = len(Path(name).parts)
        if not Path(name).is_absolute() and ".." not in Path(name).parts and folder.parts[-depth:] == Path(name).parts:
            root = folder.parents[depth - 1]
            if root.name == ARTIFACTS:
                return root
    return None


def _set_location(database: Any, number: int, location: str) -> None:
    database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (location, number))


def _move(database: Any, number: int, old: str, new: str) -> None:
    """Replace the location of an experiment, and of all that is stored below it."""
    _set_location(database, number, new)
    for table, column in LOCATIONS:
        columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
        if column in columns:  # an older MLflow has fewer tables
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608 constants
                (new, len(old) + 1, len(old) + 1, f"{old}/"),
            )
