"""From task names to tokens: rows are read, checked, worded and encoded before anything is trained.

What was prepared once is read from `data.cache` the next time (`token_cache`), by the next run or by the next rank of this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpt_dist.config import Data
from bpt_dist.data import rows, tasks, token_cache
from bpt_dist.data.spec import Protocol, TaskSpec
from bpt_dist.data.text_to_text import render
from bpt_dist.data.token_cache import Split
from bpt_dist.data.tokens import encoder_hash, report_cuts, tokenise
from bpt_dist.faults import fault_point
from bpt_dist.mini import TASKS, world

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


def prepare(
    names: Sequence[str],
    data: Data,
    tokenizer: Any,
    *,
    splits: Sequence[str],
    seed: int,
    beat: Callable[[str], None] = lambda _: None,
) -> list[TaskData]:
    """Return the named tasks with the wanted `splits`; `seed` draws the few-shot rows, `beat` hears where this process is.

    Raises DataError naming file, line and field of bad rows, and what to do about a data set that is not there.
    """
    known = specs(data)
    found = [tasks.get(name, known) for name in names]
    miniature = _cache(data) / "mini"
    if any(spec.folder is not None and spec.folder.parent == miniature for spec in found):
        world.write(miniature, WORLD_SEED)
    prepared = []
    for spec in found:
        beat(f"preparing {spec.name}")
        prepared.append(TaskData(spec, data.protocol, _splits(spec, data, tokenizer, splits, seed)))
    return prepared


def specs(data: Data) -> dict[str, TaskSpec]:
    """Return the tasks that are not in the catalogue: the user's, and those of the miniature world."""
    known = dict(tasks.load_user_tasks([TASKS]))
    folder = _cache(data) / "mini"
    known = {name: spec.with_folder(folder / name) for name, spec in known.items()}
    return {**known, **tasks.load_user_tasks(data.task_files)}


def default_cache() -> Path:
    """Return the user's cache folder of this project."""
    return Path.home() / ".cache" / "bpt_dist"


def _cache(data: Data) -> Path:
    return data.cache or default_cache()


def _splits(spec: TaskSpec, data: Data, tokenizer: Any, names: Sequence[str], seed: int) -> dict[str, Split]:
    """Return the named splits from the cache; where one is missing, read all rows and keep what comes of them."""
    origin = rows.origin_of(spec, data)
    paths = _paths(spec, data, tokenizer, names, seed, origin)
    found = {name: split for name, path in paths.items() if (split := token_cache.read(path)) is not None}
    missing = [name for name in names if name not in found]
    for split in found.values():
        report_cuts(spec, split.tokens, data.max_source_length)
    if missing:
        made = _make(spec, data, tokenizer, missing, seed, origin)
        found = {name: made.get(name) or found[name] for name in names}
        # Files that were written to in the meantime have given other rows than their key says.
        if paths and (origin.hub is not None or rows.origin_of(spec, data) == origin):
            for name in missing:
                token_cache.write(paths[name], found[name])
    else:
        for note in dict.fromkeys(note for split in found.values() for note in split.notes):
            log.warning("%s", note)
    if data.shots is not None and "train" in found:
        log.warning("task %r: few-shot: %d training examples, drawn with seed %d", spec.name, len(found["train"].tokens), seed)
    return found


def _make(spec: TaskSpec, data: Data, tokenizer: Any, names: Sequence[str], seed: int, origin: rows.Origin) -> dict[str, Split]:
    loaded = rows.load(spec, data, seed=seed, origin=origin)
    made = {}
    for name in names:
        examples = []
        for row in loaded[name]:
            fault_point("data.row", task=spec.name)
            examples += render(spec, row, data.protocol, evaluation=name != "train")
        tokens = tokenise(spec, examples, tokenizer, data.max_source_length, protocol=data.protocol)
        made[name] = Split(tuple(examples), tokens, loaded.notes)
    return made


def _paths(spec: TaskSpec, data: Data, tokenizer: Any, names: Sequence[str], seed: int, origin: rows.Origin) -> dict[str, Path]:
    """Return where the cache keeps each split, by all that shapes its tokens; none for a task too small to be kept."""
    if not origin.fingerprint or origin.num_bytes < LEAST_BYTES:
        return {}
    facts: dict[str, object] = {
        **token_cache.CODE,
        "rows": origin.fingerprint,
        "task": repr(replace(spec, folder=None)),  # where the rows lie does not shape them
        "protocol": data.protocol,
        "max_source_length": data.max_source_length,
        "encoder": encoder_hash(tokenizer),
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
