"""`bpt-dist export`: what a finished run trained, as PEFT folders where PEFT knows it, from the files the run keeps."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bpt_dist.artifacts.hub import check_push, push
from bpt_dist.artifacts.stored_run import StoredRun
from bpt_dist.errors import ConfigError, StorageError, UserError
from bpt_dist.storage import layout
from bpt_dist.storage.files import write_json_atomic

if TYPE_CHECKING:
    from bpt_dist.methods.base import SharedPrompt

log = logging.getLogger(__name__)
ROUNDING = 1e-6  # of a product computed for one task or for all at once


def export_run(
    folder: Path,
    task: str | None,
    out: Path | None,
    *,
    particles: bool = False,
    posterior: bool = False,
    push_to: str | None = None,
    private: bool = False,
) -> None:
    """Export what `folder` holds, write it to the hub where that is asked for, and print the places.

    Raises ConfigError for a run that is not finished or has no such task, and for what the hub refuses; StorageError.
    """
    if private and push_to is None:
        raise ConfigError("--private: has no effect without --push-to OWNER/NAME; remove it")
    run = StoredRun.open(folder)
    destination = None if push_to is None else check_push(push_to)
    names = [task] if task else run.targets
    for name in names:
        _complete(run, name)
    written = list(dict.fromkeys(_single(run, name, out) for name in names))
    for kind in (layout.ENSEMBLE, layout.BEST):
        written += [_other(run, name, kind, out) for name in names if (_other(run, name, kind) / layout.TASK_RECORD).is_file()]
    others = out or folder / "export"
    joint = bool(run.targets) and run.config.target.joint and task is None
    factors = _joint_factors(run) if joint and run.weights(run.targets[0]) is None else None
    if factors is not None:
        written.append(_joint(run, factors, others / "joint"))
    if particles:
        written.append(_particles(run, others / "particles"))
    if posterior:
        written.append(_posterior(run, out))
    if not written:
        raise ConfigError(f"{folder}: the run has no target task; export what it learnt from its source tasks by --posterior")
    for place in written:
        typer.echo(place)
    if destination is not None:
        _warn_of_own_backbone(run)
        typer.echo(push(_by_name(run, written), destination, private=private))
    typer.echo(_how_to_load(run, written[0]))


def _single(run: StoredRun, task: str, out: Path | None) -> Path:
    """Return the export of one task, copied below `out` if that is given: the run checked and wrote it already."""
    exported = run.exported(task)
    return exported if out is None else _copied(exported, out / task)


def _other(run: StoredRun, task: str, kind: str, out: Path | None = None) -> Path:
    """Return the prompts of a task's ensemble, or its best particle, copied as `_single` does."""
    exported = run.folder / layout.TARGET / task / kind
    return exported if out is None else _copied(exported, out / f"{task}-{kind}")


def _complete(run: StoredRun, task: str) -> None:
    """Write the `task.json` of an export that an earlier version made without one, where that is still possible."""
    exported = run.exported(task)
    if (exported / layout.TASK_RECORD).is_file():
        return
    try:
        if exported == run.weights(task):
            tasks = run.targets if run.config.target.joint else [task]
            record = run.record(tasks).with_prompts([])
        else:
            record = run.record([task])
    except UserError as error:
        log.warning("%s: stays without %s, which `bpt-dist predict` needs: %s", exported, layout.TASK_RECORD, error)
        return
    write_json_atomic(exported / layout.TASK_RECORD, record.as_json())


def _copied(exported: Path, place: Path) -> Path:
    """Copy an export to `place`, replacing an earlier one as a whole."""
    markers = (layout.ADAPTER_CONFIG, layout.WEIGHTS_FACTS, layout.TASK_RECORD, layout.POSTERIOR_FACTS)
    if place.exists() and not any((place / name).is_file() for name in markers):
        raise StorageError(f"{place}: exists and is not an export; remove it or choose another --out")
    # Copied beside it and renamed: an interrupted export leaves the old one, never a mixture of two.
    copy, old = (place.with_name(f".{place.name}.{kind}") for kind in ("new", "old"))
    try:
        if old.exists() and not place.exists():
            old.rename(place)  # a kill between the two renames below
        for leftover in (copy, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(exported, copy)
        if place.exists():
            place.rename(old)
        copy.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        raise StorageError(f"{place}: cannot be written ({error}); fix this and export again") from error
    return place


def _joint(run: StoredRun, shared: SharedPrompt, place: Path) -> Path:
    from bpt_dist.artifacts.peft_export import export_multitask

    card = run.card(f"Soft prompts for {', '.join(run.targets)}", run.targets, run.particles())
    record = run.record(run.targets).with_task_ids()
    return export_multitask(shared.full, shared.u.mT, shared.v, place, tasks=run.targets, card=card, record=record, **run.base())


def _joint_factors(run: StoredRun) -> SharedPrompt | None:
    """Return what the prompts of a joint stage share and own, from its newest checkpoint; None where the method has no such parts.

    Raises StorageError unless their products are the prompts the run selected.
    """
    import torch

    from bpt_dist.backbones.prompts import read_prompt
    from bpt_dist.methods.base import class_of
    from bpt_dist.objective import low_rank_product
    from bpt_dist.storage import checkpoint

    newest = checkpoint.latest(run.folder / layout.TARGET / layout.JOINT / layout.CHECKPOINTS, fingerprint=None, warn=log.warning)
    if newest is None:
        raise StorageError(
            f"{run.folder}/target/joint: has no checkpoint left; the prompts of single tasks can be exported with --task"
        )
    state, _ = checkpoint.load(newest)
    parts = [key.removeprefix("trained/").removesuffix("/value") for key in state if key.endswith("/value")]
    factors = class_of(run.config.method).shared_prompt(
        {name: state.get(f"best/{name}", state[f"trained/{name}/value"]) for name in parts}
    )
    if factors is None:
        return None
    prompts = low_rank_product(*factors)
    stored = [read_prompt(run.adapter(task), prompts.shape[-1]) for task in run.targets]
    if not torch.allclose(prompts, torch.stack(stored), rtol=ROUNDING):
        raise StorageError(
            f"{newest.path}: is older than the prompts the run selected (the stage ended between two checkpoints); "
            "export single tasks with --task"
        )
    return factors


def _particles(run: StoredRun, place: Path) -> Path:
    particles = run.particles()
    if particles is None:
        raise ConfigError(f"--particles: {run.folder} has no source posterior with particles; leave the option out")
    from bpt_dist.artifacts.peft_export import export_particles

    card, record = run.card("Particles of the source posterior", (), particles), run.record(run.source_tasks())
    return export_particles(particles, place, card=card, record=record, **run.base())


def _posterior(run: StoredRun, out: Path | None) -> Path:
    """Return the posterior of the source stage, copied as `_single` does."""
    if run.posterior is None:
        raise ConfigError(f"--posterior: {run.folder} has no source posterior; leave the option out")
    return run.posterior if out is None else _copied(run.posterior, out / layout.POSTERIOR)


def _by_name(run: StoredRun, written: Sequence[Path]) -> dict[str, Path]:
    """Return exports by the names of their folders in a repository; one export alone is the repository."""
    if len(written) == 1:
        return {"": written[0]}
    names = {}
    for place in written:
        parts = place.relative_to(run.folder).parts if place.is_relative_to(run.folder) else ()
        if parts[:1] == (layout.TARGET,):
            kind = parts[2]
            names[parts[1] if kind in (layout.ADAPTER, layout.WEIGHTS) else f"{parts[1]}-{kind}"] = place
        else:
            names[place.name] = place
    return names


def _warn_of_own_backbone(run: StoredRun) -> None:
    """Say that nobody else has a backbone that is a folder here."""
    path = run.config.backbone.path
    if Path(path).is_dir():
        log.warning("backbone.path: %s is a folder of this machine; who loads the exports gives the same model by --backbone", path)


def _how_to_load(run: StoredRun, place: Path) -> str:
    from bpt_dist.artifacts.model_card import AUTO_CLASSES
    from bpt_dist.backbones.prompts import peft_config
    from bpt_dist.tasks import mini

    if (place / layout.POSTERIOR_FACTS).is_file():
        return f"\nsource: {{posterior: {place}}}"
    if (place / layout.WEIGHTS_FACTS).is_file():
        words = ["bpt-dist", "eval", str(place), "--task", run.targets[0], "-c", str(run.folder / layout.CONFIG)]
        return f"\n{shlex.join(words)}"
    settings = run.config.backbone
    base = mini.backbone_path(settings.path)
    adapter = place if (place / layout.ADAPTER_CONFIG).is_file() else place / "mean"  # of all particles
    auto_class = AUTO_CLASSES[peft_config(adapter)["task_type"]]
    at = "" if settings.revision is None else f", revision={settings.revision!r}"
    return (
        f"\nfrom peft import PeftModel; from transformers import {auto_class}\n"
        f"base = {auto_class}.from_pretrained({base!r}{at})\n"
        f"model = PeftModel.from_pretrained(base, {str(place.resolve())!r}).eval()"
    )
