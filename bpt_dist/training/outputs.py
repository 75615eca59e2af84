"""What a finished target stage writes: result entries, predictions, PEFT folders, trained tensors (rank 0)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bpt_dist.artifacts.model_card import CardFacts, PosteriorFacts
from bpt_dist.artifacts.peft_export import export_ensemble, export_low_rank, export_prompt
from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.artifacts.results import Result
from bpt_dist.artifacts.task_record import BackboneEntry, FormEntry, TaskEntry, TaskRecord
from bpt_dist.artifacts.weights import write_weights
from bpt_dist.backbones.base import Backbone
from bpt_dist.config import RunConfig
from bpt_dist.data.prepare import TaskData
from bpt_dist.methods.base import Method
from bpt_dist.storage import layout
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.files import encode_json, write_atomic, write_json_atomic
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tasks import metrics
from bpt_dist.training.evaluation import Evaluated
from bpt_dist.training.stage import TrainingStage


@dataclass(frozen=True)
class TargetOutputs:
    """Writes what target stages leave below the run directory."""

    config: RunConfig
    directory: RunDirectory
    backbone: Backbone
    method: Method
    posterior: Posterior | None
    inputs: Mapping[str, str]
    chosen: dict[str, int] = field(default_factory=dict)  # target -> the adapted particle that predicts it under `best`

    def entries(
        self, task: TaskData, split: str, predict: str, evaluated: Evaluated, stage: TrainingStage, num_tasks: int
    ) -> list[Result]:
        """Return one entry of results.json for each metric: percent, but for `nll` (nats)."""
        spec, examples = task.spec, tuple(task.splits[split].examples)
        majority = metrics.majority(spec, examples, task.protocol)
        return [
            Result(
                method=self.config.method.name,
                backbone=self.backbone.name,
                task=spec.name,
                split=split,
                n=len(examples),
                metric=name,
                value=value,
                seed=self.config.seed,
                steps=stage.step,
                selected_step=stage.best.step,
                trainable_parameters=self.method.num_predicting(predict) // num_tasks,
                joint=self.config.target.joint,
                stage=stage.name,
                run=self.config.name,
                predict=predict,
                decode=evaluated.decode,
                protocol=task.protocol,
                headline=name == spec.headline,
                majority=majority.get(name),
                folder=self.directory.folder,
                inputs=dict(self.inputs),
                start_particle=self.method.start_particle,
                chosen_particle=self.chosen.get(spec.name) if predict == "best" else None,
            )
            for name, value in evaluated.metrics.items()
        ]

    def write_predictions(self, task: TaskData, split: str, predict: str, predictions: Iterable[Mapping[str, Any]]) -> None:
        """Write what was predicted for each row of a split."""
        folder = self.directory.path(layout.TARGET, task.spec.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / layout.predictions(split, predict), b"".join(map(encode_json, predictions)))

    def export(self, tasks: Sequence[TaskData], entries: Sequence[Result]) -> None:
        """Write each finished prompt, its ensemble and its best particle, or the low-rank changes, as PEFT folders."""
        prompts, pairs = self.method.prompts() or {}, self.method.low_rank_pairs()
        ensembles, chosen = self.method.ensemble_prompts() or {}, self.method.best_prompts() or {}
        path, revision, facts = self.backbone.path, self.backbone.revision, self.backbone.facts
        base: dict[str, Any] = {"base_model": path, "revision": revision, "config_facts": facts}
        for task in tasks:
            name = task.spec.name
            if pairs is None and name not in prompts:
                continue
            fault_point("export.before_write", task=name)
            card = self._card(f"Soft prompt for {name}" if pairs is None else f"Low-rank adapter for {name}", name, entries, "map")
            folder, record = self.directory.path(layout.TARGET, name), self._record([task])
            if pairs is not None:
                export_low_rank(pairs.pairs, pairs.alpha, folder / layout.ADAPTER, **base, card=card, record=record)
                continue
            export_prompt(prompts[name], folder / layout.ADAPTER, **base, card=card, record=record)
            if name in ensembles:
                card = self._card(f"Soft prompts of an ensemble for {name}", name, entries, "ensemble")
                export_ensemble(ensembles[name], folder / layout.ENSEMBLE, **base, card=card, record=record)
            if name in chosen:
                card = self._card(f"Soft prompt for {name}, the best of the adapted particles", name, entries, "best")
                record = record.with_prompts(["."], "best")
                export_prompt(chosen[name], folder / layout.BEST, **base, card=card, record=record)

    def _card(self, title: str, name: str, entries: Sequence[Result], predict: str) -> CardFacts:
        return CardFacts(
            title=title,
            method=self.config.method.name,
            backbone_hash=self.backbone.identity,
            tokenizer_hash=self.backbone.tokenizer_hash,
            protocol=self.config.data.protocol,
            target_tasks=[name],
            source_tasks=self.method.source_tasks,
            results=[entry.as_json() for entry in entries if (entry.task, entry.predict) == (name, predict)],
            posterior=self._posterior_facts(),
        )

    def _record(self, tasks: Sequence[TaskData]) -> TaskRecord:
        return record_of(tasks, self.config, self.backbone)

    def export_weights(self, tasks: Sequence[TaskData], trained: Mapping[str, Tensor], stage: str) -> None:
        """Write the trained tensors of a method that is no soft prompt, and the language of their tasks."""
        source = self.posterior.tensors if self.posterior is not None else None
        names, sizes = [task.spec.name for task in tasks], [len(task.train.tokens) for task in tasks]
        folder = write_weights(self.method, trained, source, names, sizes, self.directory.path(stage, layout.WEIGHTS))
        write_json_atomic(folder / layout.TASK_RECORD, self._record(tasks).with_prompts([]).as_json())

    def _posterior_facts(self) -> PosteriorFacts | None:
        if self.posterior is None or "particles" not in self.posterior.tensors:
            return None
        return PosteriorFacts.of(self.posterior.tensors["particles"], self.posterior.facts["steps"])


def record_of(tasks: Sequence[TaskData], config: RunConfig, backbone: Backbone) -> TaskRecord:
    """Return the `task.json` of one prompt for `tasks` as this run words and evaluates them."""
    limit, form, tokenizer = config.data.max_source_length, backbone.text_form, backbone.tokenizer
    entries = [TaskEntry.of(task.spec, task.protocol, config.evaluation, limit, tokenizer, form) for task in tasks]
    entry = BackboneEntry.of(form, backbone.path, backbone.revision, backbone.identity, config.backbone.dtype)
    return TaskRecord.of(entry, backbone.tokenizer_hash, FormEntry.of(form, tokenizer), entries, config.evaluation.predict)
