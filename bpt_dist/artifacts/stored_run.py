"""A finished run directory, read back without its backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpt_dist import config as configuration
from bpt_dist.artifacts.hub import local_folder, real_file
from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout
from bpt_dist.storage.files import read_json
from bpt_dist.storage.run_directory import read_status

if TYPE_CHECKING:
    from torch import Tensor

    from bpt_dist.artifacts.model_card import CardFacts
    from bpt_dist.artifacts.task_record import TaskRecord


@dataclass(frozen=True)
class StoredRun:
    """A finished run directory, read without its backbone."""

    folder: Path
    config: RunConfig

    @classmethod
    def open(cls, folder: Path) -> StoredRun:
        """Read the configuration and status of a run. Raises ConfigError unless it is a finished one."""
        status = read_status(folder)
        if status is None or not (folder / layout.CONFIG).is_file():
            runs = [path.parent.name for path in sorted(folder.glob(f"*/{layout.STATUS}"))]
            hint = f"; it holds the runs {', '.join(runs)}: give one of them" if runs else "; give the folder of a run"
            raise ConfigError(f"{folder}: is not a run{hint}")
        if status.state != "finished":
            why = f" ({status.reason})" if status.reason else ""
            again = f"rerun `{status.next}`" if status.next else "rerun its command"
            raise ConfigError(f"{folder}: the run is {status.state}{why}, not finished; {again} to complete it")
        return cls(folder, stored_config(folder))

    @property
    def targets(self) -> Sequence[str]:
        """Return the target tasks."""
        return self.config.data.target_tasks

    def adapter(self, task: str) -> Path:
        """Return the PEFT folder the run wrote for one target task. Raises ConfigError where there is none."""
        if task not in self.targets:
            raise ConfigError(f"--task {task}: is no target task of {self.folder}; it has {', '.join(self.targets)}")
        folder = self.folder / layout.TARGET / task / layout.ADAPTER
        if not (folder / layout.ADAPTER_CONFIG).is_file():
            raise ConfigError(f"{folder}: does not exist; what method {self.config.method.name} trains is no soft prompt")
        return folder

    def weights(self, task: str) -> Path | None:
        """Return the folder of the trained tensors that serve a target task, None where its prompt is all there is."""
        stage = layout.JOINT if self.config.target.joint else task
        folder = self.folder / layout.TARGET / stage / layout.WEIGHTS
        return folder if (folder / layout.WEIGHTS_FACTS).is_file() else None

    def exported(self, task: str) -> Path:
        """Return what the run exported for one target task: a PEFT folder, or the trained tensors where PEFT knows no such thing.

        Raises ConfigError where there is neither.
        """
        weights = self.weights(task)
        if weights is None or (self.folder / layout.TARGET / task / layout.ADAPTER / layout.ADAPTER_CONFIG).is_file():
            return self.adapter(task)
        return weights

    @cached_property
    def posterior(self) -> Path | None:
        """Return the folder of the source posterior, the run's own or the one it started from."""
        given = self.config.source.posterior
        given = given if given is None else local_folder(given, "source.posterior: ")
        places = [self.folder / layout.SOURCE / layout.POSTERIOR]
        places += [] if given is None else [given, given / layout.SOURCE / layout.POSTERIOR, given.parent, given / layout.POSTERIOR]
        return next((place for place in places if (place / layout.POSTERIOR_FACTS).is_file()), None)

    def base(self) -> dict[str, Any]:
        """Return what an export says of the backbone; its shape is all that is read of it."""
        from bpt_dist.backbones.loading import facts_of
        from bpt_dist.tasks import mini

        settings = self.config.backbone
        path = mini.backbone_path(settings.path)
        return {"base_model": path, "revision": settings.revision, "config_facts": facts_of(path, revision=settings.revision)}

    def record(self, tasks: Sequence[str]) -> TaskRecord:
        """Return the `task.json` of one prompt for `tasks`, which were targets or sources of this run.

        A run of an earlier version wrote none: it is made again from its configuration, for which the tokenizer is loaded. Raises
        ConfigError where its task files or its backbone are gone or changed.
        """
        from bpt_dist.artifacts.task_record import BackboneEntry, FormEntry, TaskEntry, TaskRecord, read_record
        from bpt_dist.backbones.loading import load_tokenizer
        from bpt_dist.data.prepare import specs
        from bpt_dist.tasks import catalogue, mini

        places = [self.folder / layout.TARGET / task / layout.ADAPTER for task in tasks]
        if all((place / layout.TASK_RECORD).is_file() for place in places):
            records = [read_record(place) for place in places]
            return records[0].model_copy(update={"tasks": tuple(record.tasks[0] for record in records)})
        if self.posterior is not None and (self.posterior / layout.TASK_RECORD).is_file():
            of_posterior = read_record(self.posterior)
            if [task.name for task in of_posterior.tasks] == list(tasks):
                return of_posterior.with_prompts(["."])
        settings, data = self.config.backbone, self.config.data
        path, facts = mini.backbone_path(settings.path), self._hashes()
        tokenizer, own, form = load_tokenizer(path, settings.revision)
        if own != facts["tokenizer_hash"]:
            raise ConfigError(f"backbone.path: {path} has another tokenizer than the run was trained with; give the one it had")
        known, protocol, limit = specs(data), data.protocol, data.max_source_length
        specs_of, evaluation = [catalogue.get(task, known) for task in tasks], self.config.evaluation
        entries = [TaskEntry.of(spec, protocol, evaluation, limit, tokenizer, form) for spec in specs_of]
        backbone = BackboneEntry.of(form, path, settings.revision, facts["backbone_hash"], settings.dtype)
        return TaskRecord.of(backbone, own, FormEntry.of(form, tokenizer), entries, evaluation.predict)

    def _hashes(self) -> Mapping[str, Any]:
        """Return the result of a target stage, which names the hashes of backbone and tokenizer."""
        results = read_json(self.folder / layout.RESULTS)
        facts: Mapping[str, Any] = read_json(self.folder / results[0]["stage"] / layout.RESULT)
        return facts

    def card(self, title: str, tasks: Sequence[str], particles: Tensor | None) -> CardFacts:
        """Return the facts of a card about prompts of `tasks` that started from `particles`."""
        from bpt_dist.artifacts.model_card import CardFacts, PosteriorFacts

        results, facts = read_json(self.folder / layout.RESULTS), self._hashes()
        return CardFacts(
            title=title,
            method=self.config.method.name,
            backbone_hash=facts["backbone_hash"],
            tokenizer_hash=facts["tokenizer_hash"],
            protocol=self.config.data.protocol,
            target_tasks=tasks,
            source_tasks=self.source_tasks(),
            results=[entry for entry in results if entry["task"] in tasks and entry["predict"] == "map"],
            posterior=None if particles is None else PosteriorFacts.of(particles, self._source_steps()),
        )

    def source_tasks(self) -> Sequence[str]:
        """Return the tasks the posterior was learnt from: where it was given, those of the configuration need not be."""
        if self.posterior is None:
            return self.config.data.source_tasks
        return list(read_json(real_file(self.posterior / layout.POSTERIOR_FACTS))["source_tasks"])

    def _source_steps(self) -> int:
        assert self.posterior is not None
        return int(read_json(real_file(self.posterior / layout.POSTERIOR_FACTS))["steps"])

    def particles(self) -> Tensor | None:
        """Return the particles [M, P, D] of the source posterior, None for a method without."""
        from bpt_dist.storage.checkpoint import read_tensors

        return (
            None
            if self.posterior is None
            else read_tensors(real_file(self.posterior / layout.POSTERIOR_TENSORS))[0].get("particles")
        )


def stored_config(folder: Path) -> RunConfig:
    """Return the configuration of the run in `folder`, with the file of a method outside the package that the run has kept.

    The user's own file may have moved, or changed since. Raises ConfigError.
    """
    kept = next((folder / layout.METHOD).glob("*.py"), None)
    return configuration.load_values(folder / layout.CONFIG, {} if kept is None else {"method.path": kept})


def is_finished(run: RunConfig) -> bool:
    """Return whether the run of this configuration has finished."""
    status = read_status(run.directory)
    if status is None or status.state != "finished":
        return False
    return configuration.is_same_run(read_json(run.directory / layout.RUN), run.directory / layout.CONFIG, run)
