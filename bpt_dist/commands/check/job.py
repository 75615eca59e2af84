"""What `bpt-dist check --config` examines: backbone, tokenizer, rows and tracking store of every run of a job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import typer

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.config.mlflow_environment import experiment_of, notes
from bpt_dist.errors import UserError
from bpt_dist.storage.file_system import nearest_folder, what_is_missing
from bpt_dist.tracking.answer import Silent, ask
from bpt_dist.tracking.places import sqlite_path, store_uri
from bpt_dist.tracking.store import NO_LOCKS

SENTENCE = "this is a test"
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `text` describes it; a `remedy`, even an empty one, marks a failure."""

    name: str
    text: str
    remedy: str | None = None

    def print(self) -> bool:
        """Print one line and return whether the check passed."""
        mark = "ok  " if self.remedy is None else "FAIL"
        typer.echo(f"{mark}  {self.name}: {self.text}{f'; {self.remedy}' if self.remedy else ''}")
        return self.remedy is None


def report(findings: Iterable[Finding], *, as_json: bool) -> bool:
    """Print each finding as soon as there is one, or all of them as data, and return whether all checks passed."""
    if not as_json:
        return all([finding.print() for finding in findings])
    found = list(findings)
    facts = [{"name": one.name, "passed": one.remedy is None, "text": one.text, "remedy": one.remedy} for one in found]
    typer.echo(json.dumps(facts, indent=1))
    return all(one.remedy is None for one in found)


def attempt(name: str, work: Callable[[], T]) -> tuple[Finding, T | None]:
    """Return what `work` returned, and a finding that carries the message of its error."""
    try:
        outcome = work()
    except UserError as error:
        # Our messages end in their own remedy.
        return Finding(name, str(error), ""), None
    return Finding(name, "read"), outcome


def job_findings(config: RunConfig) -> Iterator[Finding]:
    """Check what the runs of one configuration need: backbones, tokenizers, tasks, tracking stores."""
    seen: set[str] = set()
    tokenizers: dict[str, tuple[Any, Any]] = {}
    for run in configuration.expand(config):
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            repr(run.backbone): partial(_backbone, run, tokenizers),
            repr((run.data, run.backbone)): partial(_data, run, tokenizers),
            repr(run.tracking.mlflow and (store_uri(run), experiment_of(run))): partial(_tracking, run),
        }
        for key, examine in checks.items():
            if key not in seen:
                seen.add(key)
                yield from examine()


def _backbone(run: RunConfig, tokenizers: dict[str, tuple[Any, Any]]) -> Iterator[Finding]:
    """Load the backbone and read a sentence with its tokenizer, which is kept in `tokenizers` for the texts of the tasks."""
    from bpt_dist.data.tokens import encode, plain_encoder
    from bpt_dist.distributed.mesh import World
    from bpt_dist.training.sharding.placement import load_backbone

    plain = run.model_copy(update={"distribution": type(run.distribution)()})
    finding, backbone = attempt("backbone", lambda: load_backbone(plain, World()))
    if backbone is None:
        yield finding
        return
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    yield Finding("backbone", f"{backbone.name}, {count:,} parameters, {run.backbone.dtype}")
    finding, encoder = attempt("tokenizer", lambda: plain_encoder(backbone.tokenizer, backbone.text_form))
    if encoder is None:
        yield finding
        return
    tokenizers[repr(run.backbone)] = backbone.tokenizer, backbone.text_form
    (ids,) = encode(encoder, [SENTENCE], int(backbone.tokenizer.eos_token_id))
    text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
    good = bool(text.strip()) and int(ids.max()) < backbone.vocabulary_size
    read = f"{len(backbone.tokenizer):,} pieces, {SENTENCE!r} is {len(ids)} of them and reads back as {text!r}"
    yield Finding("tokenizer", read,
                  None if good else "it does not belong to this backbone; give the folder or revision of both")  # fmt: skip


def _data(run: RunConfig, tokenizers: dict[str, tuple[Any, Any]]) -> Iterator[Finding]:
    """Read the rows of every task and, where there is a tokenizer, encode them as a run would."""
    from bpt_dist.data import rows
    from bpt_dist.data.prepare import WORLD_SEED, default_cache, prepare, specs
    from bpt_dist.data.unknown_text import describe
    from bpt_dist.tasks import catalogue
    from bpt_dist.tasks.mini import world

    user_tasks = specs(run.data)
    miniature = (run.data.cache or default_cache()) / "mini"
    tokenizer, form = tokenizers.get(repr(run.backbone), (None, None))
    for name in dict.fromkeys((*run.data.source_tasks, *run.data.target_tasks)):
        spec = catalogue.get(name, user_tasks)
        if spec.folder is not None and spec.folder.parent == miniature:
            world.write(miniature, WORLD_SEED)
        options = run.data if name in run.data.target_tasks else run.data.model_copy(update={"shots": None})
        finding, splits = attempt(f"task {name}", partial(rows.load, spec, options, seed=run.seed))
        if splits is None:
            yield finding
            continue
        text = ", ".join(f"{len(kept):,} {split}" for split, kept in splits.items()) + " rows, all valid"
        text += "".join(f"; {note.removeprefix(f'task {name!r}: ')}" for note in splits.notes)
        if tokenizer is not None:
            read = partial(prepare, [name], options, tokenizer, splits=tuple(splits), seed=run.seed, form=form)
            finding, prepared = attempt(f"task {name}", read)
            if prepared is None:
                yield finding
                continue
            unknown = describe({split: tokens.unknown for split, tokens in prepared[0].splits.items()}, least_share=0.0)
            text += f"; characters that the tokenizer does not know: {unknown}" if unknown else ""
        yield Finding(f"task {name}", text)


def _tracking(run: RunConfig) -> Iterator[Finding]:
    """Ask the store whether it takes this run, without MLflow, whose import takes longer than all checks together."""
    if not run.tracking.mlflow:
        yield Finding("tracking", "off, metrics.jsonl only")
        return
    store = sqlite_path(store_uri(run))
    with suppress(OSError):  # a folder that cannot be written is reported as the output
        if store is not None and (reason := what_is_missing(nearest_folder(store)).get("file locks")) is not None:
            yield Finding("tracking", f"{store}: its file system has no file locks ({reason})", NO_LOCKS)
            return
    variables = "".join(f"; {note}" for note in notes(run))
    try:
        yield Finding("tracking", f"{ask(store_uri(run), experiment_of(run))}, experiment {experiment_of(run)!r}{variables}")
    except Silent as error:
        yield Finding("tracking", f"{error}; training would continue, `bpt-dist sync` completes it{variables}", "")
    except UserError as error:
        yield Finding("tracking", f"{error}{variables}", "")
