"""What `bpt-dist check --config` examines: backbone, tokenizer, rows and tracking store of every run of a job."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import typer

from bpt_dist import config as configuration
from bpt_dist.config import Config
from bpt_dist.errors import UserError

SOCKET_SECONDS = 3
SENTENCE = "this is a test"
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `text` says what was found; a `remedy`, even an empty one, that it failed."""

    name: str
    text: str
    remedy: str | None = None

    def print(self) -> bool:
        """Print one line and return whether the check passed."""
        mark = "ok  " if self.remedy is None else "FAIL"
        typer.echo(f"{mark}  {self.name}: {self.text}{f'; {self.remedy}' if self.remedy else ''}")
        return self.remedy is None


def attempt(name: str, work: Callable[[], T]) -> tuple[Finding, T | None]:
    """Return what `work` returned, and a finding that carries the message of its error."""
    try:
        found = work()
    except UserError as error:
        # Our messages end in their own remedy.
        return Finding(name, str(error), ""), None
    return Finding(name, "read"), found


def job_findings(config: Config) -> Iterator[Finding]:
    """Check what the runs of one configuration need: backbones, tokenizers, tasks, tracking stores."""
    seen: set[str] = set()
    for run in configuration.expand(config):
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            repr(run.backbone): partial(_backbone, run),
            repr(run.data): partial(_data, run),
            repr((run.tracking.mlflow, run.tracking.uri)): partial(_tracking, run, config),
        }
        for key, examine in checks.items():
            if key not in seen:
                seen.add(key)
                yield from examine()


def _backbone(run: Config) -> Iterator[Finding]:
    from bpt_dist.data.tokens import encode, plain_encoder
    from bpt_dist.mesh import World
    from bpt_dist.opening import load_backbone

    plain = run.model_copy(update={"distribution": type(run.distribution)()})
    finding, backbone = attempt("backbone", lambda: load_backbone(plain, World()))
    if backbone is None:
        yield finding
        return
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    yield Finding("backbone", f"{backbone.name}, {count:,} parameters, {run.backbone.dtype}")
    finding, encoder = attempt("tokenizer", lambda: plain_encoder(backbone.tokenizer))
    if encoder is None:
        yield finding
        return
    (ids,) = encode(encoder, [SENTENCE], int(backbone.tokenizer.eos_token_id))
    text = backbone.tokenizer.decode(ids, skip_special_tokens=True)
    good = bool(text.strip()) and int(ids.max()) < backbone.model.config.vocab_size
    read = f"{len(backbone.tokenizer):,} pieces, {SENTENCE!r} is {len(ids)} of them and reads back as {text!r}"
    yield Finding("tokenizer", read,
                  None if good else "it does not belong to this backbone; give the folder or revision of both")  # fmt: skip


def _data(run: Config) -> Iterator[Finding]:
    from bpt_dist.data import rows, tasks
    from bpt_dist.data.prepared import WORLD_SEED, default_cache, specs
    from bpt_dist.mini import world

    known = specs(run.data)
    miniature = (run.data.cache or default_cache()) / "mini"
    for name in dict.fromkeys((*run.data.source_tasks, *run.data.target_tasks)):
        spec = tasks.get(name, known)
        if spec.folder is not None and spec.folder.parent == miniature:
            world.write(miniature, WORLD_SEED)
        options = run.data if name in run.data.target_tasks else run.data.model_copy(update={"shots": None})
        finding, splits = attempt(f"task {name}", partial(rows.load, spec, options, seed=run.seed))
        if splits is None:
            yield finding
        else:
            yield Finding(
                f"task {name}", ", ".join(f"{len(found):,} {split}" for split, found in splits.items()) + " rows, all valid"
            )


def _tracking(run: Config, config: Config) -> Iterator[Finding]:
    """Reach the store without MLflow, whose import takes longer than all checks together."""
    if not run.tracking.mlflow:
        yield Finding("tracking", "off, metrics.jsonl only")
        return
    parts = urlsplit(run.tracking.uri or "")
    if parts.hostname:
        try:
            port = parts.port or {"https": 443}.get(parts.scheme, 80)
            socket.create_connection((parts.hostname, port), timeout=SOCKET_SECONDS).close()
        except OSError as error:
            yield Finding(
                "tracking", f"{parts.hostname}: {error}", "start the server; training would go on, `bpt-dist sync` completes it"
            )
            return
        yield Finding("tracking", f"{parts.hostname}:{port} answers")
        return
    store = Path(run.tracking.uri.removeprefix("sqlite:///")) if run.tracking.uri else config.output.resolve() / "mlflow.db"
    if not store.is_file():
        yield Finding("tracking", f"{store} will be made by the first run")
        return
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=SOCKET_SECONDS) as database:
            database.execute("select version_num from alembic_version").fetchone()
    except sqlite3.Error as error:
        yield Finding("tracking", f"{store}: {error}", "move it away (a new one is made) or give another tracking.uri")
        return
    yield Finding("tracking", f"{store} can be read")
