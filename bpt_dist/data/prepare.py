"""From task names to tokens: rows are read, checked, written as text and encoded before anything is trained.

What was prepared once is read from `data.cache` the next time (`token_cache`), by the next run or by the next rank of this one.
Ranks that are handed the files another rank of their host has verified look neither at the rows nor through the files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bpt_dist.config import DataConfig, RunConfig
from bpt_dist.data import rows, token_cache, unknown_text
from bpt_dist.data.token_cache import Split, StoredFile
from bpt_dist.data.tokens import encoder_hash, plain_encoder, report_cuts, tokenise
from bpt_dist.distributed.environment import cache_home
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.tasks import catalogue
from bpt_dist.tasks.mini import TASKS, world
from bpt_dist.tasks.spec import Protocol, TaskSpec
from bpt_dist.tasks.text_to_text import ENCODED, TextForm, render
from bpt_dist.tasks.user_tasks import load_user_tasks

log = logging.getLogger(__name__)
WORLD_SEED = 0  # the miniature world is one data set, like any published one; runs differ by their own seed
LEAST_BYTES = 50_000  # of data files: fewer are prepared in some ten milliseconds, and keeping them would only fill a folder


@dataclass(frozen=True)
class TaskData:
    """One task, ready to train on and to evaluate."""

    spec: TaskSpec
    protocol: Protocol
    splits: Mapping[str, Split]

    @property
    def train(self) -> Split:
        """Return the training split."""
        return self.splits["train"]

    @property
    def files(self) -> dict[str, StoredFile]:
        """The splits that the cache keeps, as `prepare` of another rank of this host takes them."""
        return {name: split.file for name, split in self.splits.items() if split.file is not None}


class Encoding(NamedTuple):
    """What turns texts into the ids that one backbone reads."""

    tokenizer: Any
    form: TextForm


class Needed(NamedTuple):
    """Tasks a stage of a run needs, with the options and splits to prepare them with."""

    stage: str
    names: Sequence[str]
    options: DataConfig
    splits: tuple[str, ...]


def data_of_run(config: RunConfig) -> list[Needed]:
    """Return what a run needs of its data: source tasks where it has a source stage to train, then target tasks."""
    needed, options = [], config.data
    if config.method.HAS_SOURCE_STAGE and config.source.posterior is None:
        few_shot_off = options.model_copy(update={"shots": None})
        needed.append(Needed("source", options.source_tasks, few_shot_off, ("train",)))
    splits = tuple(dict.fromkeys(("train", "validation", *config.evaluation.splits)))
    return [*needed, Needed("target", options.target_tasks, options, splits)]


def prepare(
    names: Sequence[str],
    data: DataConfig,
    tokenizer: Any,
    *,
    splits: Sequence[str],
    seed: int,
    heartbeat: Callable[[str], None] = lambda _: None,
    handed: Mapping[str, Mapping[str, StoredFile]] | None = None,
    form: TextForm = ENCODED,
) -> list[TaskData]:
    """Return the named tasks with the wanted `splits`; `seed` draws the few-shot rows, `heartbeat` gets each task's name.

    `form` is how the backbone reads texts (`Backbone.text_form`). `handed` are the `files` of tasks that a rank of this host has
    prepared with the same settings.

    Raises DataError naming file, line and field of bad rows, what to do about a missing data set, and fields the tokenizer does
    not know; ConfigError for label words that it does not know or cannot tell apart.
    """
    user_tasks = specs(data)
    wanted = [catalogue.get(name, user_tasks) for name in names]
    miniature = _cache(data) / "mini"
    if any(spec.folder is not None and spec.folder.parent == miniature for spec in wanted):
        world.write(miniature, WORLD_SEED)
    prepared = []
    for spec in wanted:
        heartbeat(f"preparing {spec.name}")
        found = _handed_splits(spec, data, splits, (handed or {}).get(spec.name, {}))
        found = _splits(spec, data, Encoding(tokenizer, form), splits, seed) if found is None else found
        prepared.append(TaskData(spec, data.protocol, found))
        _report(spec, data, found, seed)
    return prepared


def specs(data: DataConfig) -> dict[str, TaskSpec]:
    """Return the tasks that are not in the catalogue: the user's, and those of the miniature world."""
    folder = _cache(data) / "mini"
    miniature = {name: spec.with_folder(folder / name) for name, spec in load_user_tasks([TASKS]).items()}
    return {**miniature, **load_user_tasks(data.task_files)}


def default_cache() -> Path:
    """Return the user's cache folder of this project; a temporary one for a user without a usable home directory."""
    return cache_home() / "bpt_dist"


def _cache(data: DataConfig) -> Path:
    return data.cache or default_cache()


def _handed_splits(
    spec: TaskSpec, data: DataConfig, names: Sequence[str], files: Mapping[str, StoredFile]
) -> dict[str, Split] | None:
    """Return the named splits from files that were handed over; None where one is missing."""
    if not {*names} <= files.keys():
        return None
    splits = {name: split for name in names if (split := token_cache.read_verified(files[name])) is not None}
    if len(splits) < len(names):
        return None
    _repeat_notes(spec, data, splits, splits)
    return splits


def _splits(spec: TaskSpec, data: DataConfig, encoding: Encoding, names: Sequence[str], seed: int) -> dict[str, Split]:
    """Return the named splits from the cache; where one is missing, read all rows and keep what comes of them."""
    origin = rows.origin_of(spec, data)
    paths = _paths(spec, data, encoding, names, seed, origin)
    splits = {name: split for name, path in paths.items() if (split := token_cache.read(path)) is not None}
    missing = [name for name in names if name not in splits]
    _repeat_notes(spec, data, splits, {} if missing else splits)
    if missing:
        made = _make(spec, data, encoding, missing, seed, origin)
        # Files that were written to in the meantime have given other rows than their key states.
        if paths and (origin.hub is not None or rows.origin_of(spec, data) == origin):
            made = {name: token_cache.write(paths[name], split) for name, split in made.items()}
        splits = {name: made.get(name) or splits[name] for name in names}
    return splits


def _repeat_notes(spec: TaskSpec, data: DataConfig, stored: Mapping[str, Split], noted: Mapping[str, Split]) -> None:
    """Log of `stored` splits what tokenising said of them, and of those `noted` what reading their rows said."""
    for split in stored.values():
        report_cuts(spec, split.tokens, data.max_source_length)
    for note in dict.fromkeys(note for split in noted.values() for note in split.notes):
        log.warning("%s", note)


def _report(spec: TaskSpec, data: DataConfig, splits: Mapping[str, Split], seed: int) -> None:
    """Refuse a task of unknown text, and log what a user must know of its rows."""
    unknown = {name: split.unknown for name, split in splits.items()}
    unknown_text.refuse(spec.name, unknown)
    unknown_text.report(spec.name, unknown)
    if data.shots is not None and "train" in splits:
        log.warning("task %r: few-shot: %d training examples, drawn with seed %d", spec.name, len(splits["train"].tokens), seed)


def _make(
    spec: TaskSpec, data: DataConfig, encoding: Encoding, names: Sequence[str], seed: int, origin: rows.Origin
) -> dict[str, Split]:
    tokenizer, form = encoding
    loaded = rows.load(spec, data, seed=seed, origin=origin)
    made = {}
    for name in names:
        examples, owners = [], []
        for number, row in enumerate(loaded[name]):
            fault_point("data.row", task=spec.name)
            rendered = render(spec, row, data.protocol, evaluation=name != "train")
            examples += rendered
            owners += [number] * len(rendered)
        tokens = tokenise(spec, examples, tokenizer, data.max_source_length, protocol=data.protocol, form=form)
        unknown = unknown_text.measure(spec, loaded[name], owners, tokens, plain_encoder(tokenizer, form), data.protocol)
        made[name] = Split(tuple(examples), tokens, loaded.notes, unknown)
    return made


def _paths(
    spec: TaskSpec, data: DataConfig, encoding: Encoding, names: Sequence[str], seed: int, origin: rows.Origin
) -> dict[str, Path]:
    """Return where the cache keeps each split, by all that shapes its tokens; none for a task too small to be kept."""
    if not origin.fingerprint or origin.num_bytes < LEAST_BYTES:
        return {}
    facts: dict[str, object] = {
        **token_cache.CODE,
        "rows": origin.fingerprint,
        "task": repr(replace(spec, folder=None)),  # where the rows are does not shape them
        "protocol": data.protocol,
        "max_source_length": data.max_source_length,
        "encoder": encoder_hash(*encoding),
        "split_seed": data.split_seed,
    }
    paths = {}
    for name in names:
        is_train = name == "train"
        facts["split"] = name
        facts["cap"] = data.max_train_rows if is_train else data.max_eval_rows
        facts["few_shot"] = [data.shots, seed] if is_train and data.shots is not None else None
        paths[name] = token_cache.path_of(_cache(data) / "tokens", spec.name, name, token_cache.key_of(facts))
    return paths
