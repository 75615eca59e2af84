"""`bpt-dist export`: what a finished run trained, as PEFT folders where PEFT knows it, from the files the run keeps."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bpt_dist import config as configuration
from bpt_dist.config import Config
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from bpt_dist.methods.base import SharedPrompt
    from bpt_dist.model_card import CardFacts

log = logging.getLogger(__name__)
ROUNDING = 1e-6  # of a product computed for one task or for all at once


@dataclass(frozen=True)
class StoredRun:
    """A finished run directory, read without its backbone."""

    folder: Path
    config: Config

    @classmethod
    def open(cls, folder: Path) -> StoredRun:
        """Read the configuration and status of a run. Raises ConfigError unless it is a finished one."""
        if not (folder / "config.yaml").is_file() or not (folder / "status.json").is_file():
            runs = [path.parent.name for path in sorted(folder.glob("*/status.json"))]
            hint = f"; it holds the runs {', '.join(runs)}: give one of them" if runs else "; give the folder of a run"
            raise ConfigError(f"{folder}: is no run{hint}")
        state = read_json(folder / "status.json")["state"]
        if state != "finished":
            raise ConfigError(f"{folder}: the run is {state}, not finished; run its command again to complete it")
        return cls(folder, configuration.load(folder / "config.yaml"))

    @property
    def targets(self) -> Sequence[str]:
        """Return the target tasks."""
        return self.config.data.target_tasks

    def adapter(self, task: str) -> Path:
        """Return the PEFT folder the run wrote for one target task. Raises ConfigError where there is none."""
        if task not in self.targets:
            raise ConfigError(f"--task {task}: is no target task of {self.folder}; it has {', '.join(self.targets)}")
        folder = self.folder / "target" / task / "adapter"
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{folder}: does not exist; what method {self.config.method.name} trains is no soft prompt")
        return folder

    def weights(self, task: str) -> Path | None:
        """Return the folder of the trained tensors that serve a target task, None where its prompt is all there is."""
        stage = "joint" if self.config.target.joint else task
        folder = self.folder / "target" / stage / "weights"
        return folder if (folder / "weights.json").is_file() else None

    def exported(self, task: str) -> Path:
        """Return what the run exported for one target task: a PEFT folder, or the trained tensors where PEFT knows no such thing.

        Raises ConfigError where there is neither.
        """
        weights = self.weights(task)
        if weights is None or (self.folder / "target" / task / "adapter" / "adapter_config.json").is_file():
            return self.adapter(task)
        return weights

    @cached_property
    def posterior(self) -> Path | None:
        """Return the folder of the source posterior, the run's own or the one it started from."""
        given = self.config.source.posterior
        places = [self.folder / "source" / "posterior"]
        places += [] if given is None else [given, given / "source" / "posterior", given.parent, given / "posterior"]
        return next((place for place in places if (place / "posterior.json").is_file()), None)

    def base(self) -> dict[str, Any]:
        """Return what an export says of the backbone; its shape is all that is read of it."""
        from bpt_dist import mini
        from bpt_dist.backbone_shapes import shape_of

        settings = self.config.backbone
        path = str(mini.BACKBONE) if settings.path == "mini" else settings.path
        facts = shape_of(path, revision=settings.revision).config.to_dict()
        return {"base_model": path, "revision": settings.revision, "config_facts": facts}

    def card(self, title: str, tasks: Sequence[str], particles: Tensor | None) -> CardFacts:
        """Return the facts of a card about prompts of `tasks` that started from `particles`."""
        from bpt_dist.model_card import CardFacts, PosteriorFacts

        results = read_json(self.folder / "results.json")
        facts: Mapping[str, Any] = read_json(self.folder / results[0]["stage"] / "result.json")
        return CardFacts(
            title=title,
            method=self.config.method.name,
            backbone_hash=facts["backbone_hash"],
            tokenizer_hash=facts["tokenizer_hash"],
            protocol=self.config.data.protocol,
            target_tasks=tasks,
            source_tasks=self._source_tasks(),
            results=[entry for entry in results if entry["task"] in tasks and entry["predict"] == "map"],
            posterior=None if particles is None else PosteriorFacts.of(particles, self._source_steps()),
        )

    def _source_tasks(self) -> Sequence[str]:
        """Return the tasks the posterior was learnt from: where it was given, those of the configuration need not be."""
        if self.posterior is None:
            return self.config.data.source_tasks
        return list(read_json(self.posterior / "posterior.json")["source_tasks"])

    def _source_steps(self) -> int:
        assert self.posterior is not None
        return int(read_json(self.posterior / "posterior.json")["steps"])

    def particles(self) -> Tensor | None:
        """Return the particles [M, P, D] of the source posterior, None for a method without."""
        from bpt_dist.checkpoint import read_tensors

        return None if self.posterior is None else read_tensors(self.posterior / "posterior.safetensors")[0].get("particles")


def export_run(folder: Path, task: str | None, out: Path | None, *, particles: bool) -> None:
    """Export what `folder` holds and print the places.

    Raises ConfigError for a run that is not finished or has no such task, StorageError.
    """
    run = StoredRun.open(folder)
    written = list(dict.fromkeys(_single(run, name, out) for name in ([task] if task else run.targets)))
    destination = out or folder / "export"
    prompts = run.weights(run.targets[0]) is None
    factors = _joint_factors(run) if prompts and run.config.target.joint and task is None else None
    if factors is not None:
        written.append(_joint(run, factors, destination / "joint"))
    if particles:
        written.append(_particles(run, destination / "particles"))
    for place in written:
        typer.echo(place)
    typer.echo(_how_to_load(run, written[0]))


def _single(run: StoredRun, task: str, out: Path | None) -> Path:
    """Return the export of one task, copied below `out` if that is given: the run checked and wrote it already."""
    exported = run.exported(task)
    if out is None:
        return exported
    place = out / task
    if place.exists() and not any((place / name).is_file() for name in ("adapter_config.json", "weights.json")):
        raise StorageError(f"{place}: exists and is not an export; remove it or choose another --out")
    try:
        shutil.copytree(exported, place, dirs_exist_ok=True)
    except OSError as error:
        raise StorageError(f"{place}: cannot be written ({error}); mend that and export again") from error
    return place


def _joint(run: StoredRun, found: SharedPrompt, place: Path) -> Path:
    from bpt_dist.export import export_multitask

    card = run.card(f"Soft prompts for {', '.join(run.targets)}", run.targets, run.particles())
    return export_multitask(found.full, found.u.mT, found.v, place, tasks=run.targets, card=card, **run.base())


def _joint_factors(run: StoredRun) -> SharedPrompt | None:
    """Return what the prompts of a joint stage share and own, from its newest checkpoint; None where the method has no such parts.

    Raises StorageError unless their products are the prompts the run selected.
    """
    import torch

    from bpt_dist import checkpoint
    from bpt_dist.methods.base import method_class
    from bpt_dist.objective import low_rank_product
    from bpt_dist.prompt_files import read_prompt

    found = checkpoint.newest(run.folder / "target" / "joint" / "checkpoints", fingerprint=None, warn=log.warning)
    if found is None:
        raise StorageError(
            f"{run.folder}/target/joint: has no checkpoint left; the prompts of single tasks can be exported with --task"
        )
    state, _ = checkpoint.load(found)
    parts = [key.removeprefix("trained/").removesuffix("/value") for key in state if key.endswith("/value")]
    factors = method_class(run.config.method.name).shared_prompt(
        {name: state.get(f"best/{name}", state[f"trained/{name}/value"]) for name in parts}
    )
    if factors is None:
        return None
    prompts = low_rank_product(*factors)
    stored = [read_prompt(run.adapter(task), prompts.shape[-1]) for task in run.targets]
    if not torch.allclose(prompts, torch.stack(stored), rtol=ROUNDING):
        raise StorageError(
            f"{found.path}: is older than the prompts the run selected (the stage ended between two checkpoints); "
            "export single tasks with --task"
        )
    return factors


def _particles(run: StoredRun, place: Path) -> Path:
    particles = run.particles()
    if particles is None:
        raise ConfigError(f"--particles: {run.folder} has no source posterior with particles; leave the option out")
    from bpt_dist.export import export_particles

    return export_particles(particles, place, card=run.card("Particles of the source posterior", (), particles), **run.base())


def _how_to_load(run: StoredRun, place: Path) -> str:
    from bpt_dist import mini

    if (place / "weights.json").is_file():
        return f"\nbpt-dist eval {place} --task {run.targets[0]} -c {run.folder / 'config.yaml'}"
    settings = run.config.backbone
    base = str(mini.BACKBONE) if settings.path == "mini" else settings.path
    at = "" if settings.revision is None else f", revision={settings.revision!r}"
    return (
        "\nfrom peft import PeftModel; from transformers import AutoModelForSeq2SeqLM\n"
        f"base = AutoModelForSeq2SeqLM.from_pretrained({base!r}{at})\n"
        f"model = PeftModel.from_pretrained(base, {str(place.resolve())!r}).eval()"
    )
