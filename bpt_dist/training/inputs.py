"""What a run reads beside its backbone and its rows, pinned by content: `inputs.json` {what: SHA-256}.

The backbone is pinned by backbone.json and the rows by data.json. Here are the file of a method outside the package, the posterior
a run starts from, the stored prompt of `init: file`, the definitions of the user's tasks and the settings of DeepSpeed. Places are
not pinned: files may move.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bpt_dist.artifacts.hub import INIT_FILE, with_local_prompt
from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.backbones.prompts import read_stored
from bpt_dist.config import RunConfig
from bpt_dist.config.own_method import OwnMethod, digest
from bpt_dist.data.prepare import data_of_run
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import ConfigError, UserError
from bpt_dist.storage import layout
from bpt_dist.storage.digest import SHORT, digest_of
from bpt_dist.storage.files import read_json, write_atomic, write_json_atomic
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.user_tasks import load_user_tasks

log = logging.getLogger(__name__)
METHOD_FILE = "method.path"
POSTERIOR = "source.posterior"
TASK_FILES, ZERO_CONFIG = "data.task_files", "distribution.zero_config"
SPEED_ONLY = (ZERO_CONFIG,)  # must be equal on all ranks, and may change from start to start
SHAPING_FACTS = ("method", "protocol", "source_tasks")  # what a run takes from posterior.json
ABSENT = "absent"
OLD_ID = "id"  # the column of the ids where a task file named none, in versions that pinned it


def read_inputs(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of everything this rank reads for `config`, by the key that names it.

    Raises ConfigError for a file that cannot be read or is no such thing.
    """
    return dict(_inputs(config))


def pin_inputs(directory: RunDirectory, config: RunConfig, world: World) -> dict[str, str]:
    """Check that the inputs are the same on all ranks and unchanged since the run started, and return their hashes.

    Collective: every rank, before the backbone is loaded. Raises ConfigError on all ranks with what differs, where, and a remedy.
    """
    try:
        answer: dict[str, str] | UserError = read_inputs(config)
    except UserError as error:
        answer = error
    answers = world.gather_objects(answer)
    for rank, other in enumerate(answers):
        if isinstance(other, UserError):
            raise other if rank == 0 else ConfigError(f"rank {rank} on {world.hosts[rank]}: {other}")
    problem = _difference(answers, world.hosts)
    if problem is None and world.rank == 0:
        problem = _compare_with_start(directory.folder / layout.INPUTS, answers[0], directory.folder, _earlier_hashes(config))
    problem = world.broadcast(problem)
    if problem:
        raise ConfigError(problem)
    if world.rank == 0 and isinstance(config.method, OwnMethod):
        _keep(config.method, directory.folder / layout.METHOD)
    return dict(answers[0])


def _keep(method: OwnMethod, folder: Path) -> None:
    """Write a copy of the file of a method outside the package, by which the finished run is read wherever the file is by then."""
    write_atomic(folder / f"{method.name}.py", type(method).SOURCE.encode())


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    method, given = config.method, config.source.posterior
    own = digest(method)
    if own is not None:
        yield METHOD_FILE, own
    if config.method.HAS_SOURCE_STAGE and given is not None:
        posterior = Posterior.read(given)
        yield POSTERIOR, digest_of(posterior.tensors)
        yield f"{POSTERIOR} (facts)", _hash({name: posterior.facts.get(name) for name in SHAPING_FACTS})
    stored = getattr(with_local_prompt(config).method, "init_file", None)
    # With a posterior the prompt only says how that was made, unless the method asks for it: then it must be there.
    if stored is not None and (given is None or Path(stored).exists()):
        yield INIT_FILE, digest_of({"prompt": read_stored(stored)})
    for name, spec in _own_tasks(config).items():
        yield f"{TASK_FILES}: {name}", _hash(_definition(spec))
    if config.distribution.zero_config is not None:
        yield ZERO_CONFIG, _hash_file(config.distribution.zero_config)


def _own_tasks(config: RunConfig) -> dict[str, TaskSpec]:
    """Return the tasks of the run that the user's files define, sorted by name."""
    if not config.data.task_files:
        return {}
    defined = load_user_tasks(config.data.task_files)
    used = {name for stage in data_of_run(config) for name in stage.names}
    return {name: defined[name] for name in sorted(used & defined.keys())}


def _earlier_hashes(config: RunConfig) -> dict[str, set[str]]:
    """Return the hashes that an earlier version pinned for the same inputs: it counted the column of the ids, named or not."""
    return {
        f"{TASK_FILES}: {name}": {_hash({**_definition(spec), "id_column": column}) for column in (OLD_ID, spec.id_column)}
        for name, spec in _own_tasks(config).items()
    }


def _definition(spec: TaskSpec) -> dict[str, Any]:
    """Return what defines a task, apart from its place, its summary and the ids, which are only checked.

    Defaults are left out, so that a field of a later version changes no hash.
    """
    fields = dataclasses.fields(spec)
    plain = {field.name: getattr(spec, field.name) for field in fields if field.name not in ("folder", "summary", "id_column")}
    defaults = dataclasses.asdict(TaskSpec(name="", summary="", kind="text", metrics=()))
    given = {name: _plain(value) for name, value in plain.items()}
    return {name: value for name, value in given.items() if name in ("name", "kind", "metrics") or value != defaults[name]}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return tuple(_plain(entry) for entry in value) if isinstance(value, tuple) else value


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{ZERO_CONFIG}: {file} cannot be read ({error.strerror}); give a DeepSpeed JSON file") from error


def _difference(answers: list[dict[str, str]], hosts: tuple[str, ...]) -> str | None:
    """Return what differs between rank 0 and the first rank that read something else."""
    for rank, other in enumerate(answers):
        for what in sorted({*answers[0], *other}):
            ours, theirs = answers[0].get(what, ABSENT), other.get(what, ABSENT)
            if ours != theirs:
                return (
                    f"{what}: differs between rank 0 on {hosts[0]} (hash {ours[:SHORT]}) and rank {rank} on {hosts[rank]} "
                    f"({theirs[:SHORT]}); copy the same files to all hosts"
                )
    return None


def _compare_with_start(file: Path, inputs: dict[str, str], folder: Path, earlier: Mapping[str, set[str]]) -> str | None:
    """Write down the inputs of a new run; return how those of an old one changed (rank 0). `earlier`: other hashes of the same."""
    written = read_json(file) if file.is_file() else {}
    pinned = {what: inputs.get(what, found) if found in earlier.get(what, ()) else found for what, found in written.items()}
    pinned = pinned or inputs
    changed = [what for what in sorted({*pinned, *inputs}) if pinned.get(what, ABSENT) != inputs.get(what, ABSENT)]
    for what in changed:
        before, now = pinned.get(what, ABSENT)[:SHORT], inputs.get(what, ABSENT)[:SHORT]
        if not what.startswith(SPEED_ONLY):
            return (
                f"{what}: changed since {folder} was started (hash {before} -> {now}); restore the original to resume, or choose "
                "another name="
            )
        log.info("%s: changed (hash %s -> %s)", what, before, now)
    if written != inputs or not file.is_file():
        write_json_atomic(file, inputs)
    return None
