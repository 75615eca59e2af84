"""One run while it is open: its directory, its data and backbone, what is stored when a stage ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bpt_dist.artifacts.figures import draw_run, draw_steps
from bpt_dist.artifacts.hub import with_local_prompt
from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.artifacts.results import Result
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.loading import shape_of
from bpt_dist.backbones.prompts import embedding_rms
from bpt_dist.config import DataConfig, EvaluationConfig, RunConfig, StageConfig
from bpt_dist.config.keys import relative_rates
from bpt_dist.data.batches import Batches
from bpt_dist.data.columns import lengths_of
from bpt_dist.data.prepare import TaskData, data_of_run, prepare
from bpt_dist.data.token_cache import StoredFile
from bpt_dist.distributed.device import process_memory
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.distributed.patience import while_rank_0_works
from bpt_dist.distributed.watchdog import Watchdog
from bpt_dist.errors import BackboneChanged, UserError
from bpt_dist.methods import base as methods
from bpt_dist.storage import layout
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.storage.metrics_log import BEST_SCORE, MetricsLog, iter_records
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.storage.snapshots import with_snapshots
from bpt_dist.tasks import mini
from bpt_dist.training.evaluation import Evaluated, choose_particle, evaluate
from bpt_dist.training.outputs import TargetOutputs, record_of
from bpt_dist.training.positions import check_positions
from bpt_dist.training.sharding.passes import num_sharers, sequences_that_fit
from bpt_dist.training.stage import TrainingStage

log = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """Everything `train.train` passes down; every method is called by every rank."""

    config: RunConfig
    world: World
    watchdog: Watchdog
    directory: RunDirectory
    log: MetricsLog
    backbone: Backbone
    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)  # SHA-256 of what is read beside backbone and rows
    position: int = 0
    posterior: Posterior | None = None
    absolute_rates: dict[str, float] = field(default_factory=dict)  # of the learning rates that are given relative, by their key
    on_validation: Callable[[], None] = lambda: None  # called on rank 0 after each validation is logged
    planned_seconds: Callable[[str], float | None] = lambda _stage: None  # of a step of a stage, where somebody has a plan (rank 0)
    _data: dict[str, list[TaskData]] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    _memory: int | None = None  # of the rank that has least, in bytes

    def __post_init__(self) -> None:
        config = self.config
        self.method = methods.load(with_local_prompt(config), self.backbone)
        self._resolve_rates()
        # All rows are read and checked now: a bad one must be named before the first forward pass.
        for needed in data_of_run(config):
            self._data[needed.stage] = self._prepare(needed.names, needed.options, needed.splits)
        check_positions([task for tasks in self._data.values() for task in tasks], config, self.backbone)

    def _resolve_rates(self) -> None:
        """Make learning rates in units of the word embeddings absolute, for the log and for tracking (collective)."""
        relative = relative_rates(self.config.model_dump(mode="json"))
        unit = embedding_rms(self.backbone) if relative else 0.0
        self.absolute_rates = {key: value * unit for key, value in relative.items()}
        for key, rate in self.absolute_rates.items():
            text = "%s: %.4g, %s_relative %g times %.4g, the root mean square of the word embeddings"
            log.info(text, key, rate, key.rpartition(".")[2], relative[key], unit)

    def _prepare(self, names: Sequence[str], options: DataConfig, splits: Sequence[str]) -> list[TaskData]:
        """Prepare on rank 0 first, then on one rank of every other host: they fill the cache and verify what all the others map.

        What rank 0 refuses, every rank refuses. Task by task: the others wait for one task, never for the sum.
        """
        return [self._prepare_task(name, options, splits) for name in names]

    def _prepare_task(self, name: str, options: DataConfig, splits: Sequence[str]) -> TaskData:
        def prepared(files: Mapping[str, StoredFile] | None = None) -> TaskData:
            (task,) = prepare(
                [name], options, self.backbone.tokenizer, splits=splits, seed=self.config.seed, heartbeat=self.heartbeat,
                handed={name: files or {}}, form=self.backbone.text_form,
            )  # fmt: skip
            return task

        task, problem = None, None
        if self.world.rank == 0:
            try:
                task = prepared()
            except UserError as error:
                problem = error
        problem, files = self.world.broadcast((problem, task.files if task else None))
        if problem is not None:
            raise problem
        hosts = self.world.hosts
        first = hosts.index(hosts[self.world.rank])
        if len(set(hosts)) > 1:
            if task is None and first == self.world.rank:
                task = prepared()
            files = self.world.gather_objects(task.files if task else None)[first]
        return task or prepared(files)

    @property
    def evaluation(self) -> EvaluationConfig:
        """How to evaluate; with `exact` text by text, for what shares a pass with a text changes its last bits."""
        settings = self.config.evaluation
        return settings.model_copy(update={"batch_size": 1}) if self.config.distribution.exact else settings

    def heartbeat(self, place: str) -> None:
        """Report that this rank is alive at `place`, to its own watchdog and to the ranks that may wait for it."""
        self.watchdog.heartbeat(place)
        self.world.set_location(place)

    def while_rank_0_works(self, place: str) -> AbstractContextManager[None]:
        """Let ranks wait as long as `distribution.storage_timeout` for what rank 0 does inside alone (every rank)."""
        return while_rank_0_works(self.world, self.watchdog, place)

    def data_hashes(self) -> dict[str, str]:
        """Return the content hash of every split of every task of this run."""
        splits = ((stage, task, split) for stage, tasks in self._data.items() for task in tasks for split in task.splits)
        return {f"{stage}/{task.spec.name}/{split}": task.splits[split].content_hash for stage, task, split in splits}

    # --- what a stage starts from -------------------------------------------------------------------------------------

    def source_tasks(self) -> list[TaskData]:
        """Return the source tasks in the order of the configuration."""
        return self._data["source"]

    def target_groups(self) -> list[list[TaskData]]:
        """Return the target tasks that are trained together: all of them (`target.joint`), or one at a time."""
        targets = self._data["target"]
        return [targets] if self.config.target.joint else [[task] for task in targets]

    def stage_name(self, tasks: Sequence[TaskData]) -> str:
        """Return the name of a target stage, which is also its folder."""
        return layout.target_stage(tasks[0].spec.name, joint=self.config.target.joint)

    def source_mesh(self) -> Mesh:
        """Arrange the ranks for the source stage, as the configuration says."""
        shape = self.config.distribution.mesh
        explicit = None if isinstance(shape, str) else (shape.particle, shape.data)
        return self.world.mesh(self.method.num_particles, explicit, self.config.distribution.exchange)

    def target_mesh(self) -> Mesh:
        """Arrange the ranks for a target stage: all of them share the texts, since every rank predicts with every prompt."""
        return self.world.mesh(1, (1, self.world.size))

    def stage(
        self,
        name: str,
        settings: StageConfig,
        mesh: Mesh,
        batches: Batches,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> TrainingStage:
        """Return a stage that starts where the last one ended."""
        self.directory.status("running", stage=name)  # on all ranks: each has a log, whose lines name the stage
        stage = TrainingStage(
            name, settings, self.method, mesh, batches, self.directory, self.log, self.fingerprint, self.watchdog, validate,
            self.position,
            exact=self.config.distribution.exact,
            on_validation=self.on_validation,
            planned_seconds=partial(self.planned_seconds, name),
        )  # fmt: skip
        stage.fitting = self._fitting(stage)
        warning = stage.idle_warning
        if warning is not None and warning not in self._warned and self.world.rank == 0:
            log.warning("%s", warning)
            self._warned.add(warning)
        return stage

    def _fitting(self, stage: TrainingStage) -> int | None:
        """Return how many sequences of a stage fit into a pass where the backbone is partitioned; None where all do."""
        config, world = self.config, self.world
        if config.distribution.shard == "none" or config.distribution.exact or stage.settings.pass_size is not None:
            return None
        if self._memory is None:
            self._memory = self._agreed_memory()
        settings, tasks = config.backbone, stage.batches.datasets
        shape = shape_of(mini.backbone_path(settings.path), revision=settings.revision, dtype=settings.dtype)
        source, target = (max(int(lengths_of(rows).max()) for rows in column)
                          for column in ([task.source_ids for task in tasks], [task.target_ids for task in tasks]))  # fmt: skip
        sharers = num_sharers(config, world.hosts, world.size)
        prompt = getattr(config.method, "length", 0)
        fits = sequences_that_fit(config, shape, self._memory, sharers, (prompt, source, target), stage.most_sequences)
        if fits is not None and world.rank == 0:
            log.info(
                "%s: %d of %d sequences fit into a pass; every pass gathers the backbone", stage.name, fits, stage.most_sequences
            )
        return fits

    def _agreed_memory(self) -> int:
        """Return the bytes of the rank that has least; on resume no more than at the first start: the same passes and bits."""
        world, key = self.world, "memory"
        here = process_memory(world.device, world.hosts.count(world.hosts[world.rank]))
        memory = int(min(bytes_there for (bytes_there,) in world.gather_numbers([here])))
        first = world.broadcast(self.directory.choice(key) if world.rank == 0 else None)
        if first is not None:
            return min(memory, int(first))
        if world.rank == 0:
            self.directory.record_choice(key, str(memory))
        return memory

    def auxiliary_stage(
        self, name: str, phase: methods.AuxiliaryPhase, settings: StageConfig, mesh: Mesh, batches: Batches
    ) -> TrainingStage:
        """Return the auxiliary stage `phase` that comes before the stage `name`."""
        stage = self.stage(f"{name}/{phase.name}", phase.settings(settings), mesh, batches)
        stage.phase = phase.name
        return stage

    def close_auxiliary_stage(self, stage: TrainingStage) -> None:
        """Let the next stage begin where this one ended."""
        self.position = stage.position

    # --- what a stage leaves ------------------------------------------------------------------------------------------

    def stored_posterior(self) -> Posterior | None:
        """Return the posterior of the configuration or of an earlier start of this run."""
        stored = self.directory.path(layout.SOURCE, layout.POSTERIOR)
        given = self.config.source.posterior
        if given is None:
            self._warn_of_seen_rows(self.config.data.source_tasks)
        if given is None and not self.world.wait_for_file(stored / layout.POSTERIOR_FACTS):
            return None
        self.posterior = Posterior.load(given or stored, self.backbone)
        self.posterior.require(self.config.method.name, self.method.source_tensors, self.backbone.width)
        self.posterior.agree(self.config, self.method.source_tensors)
        self.method.source_tasks = tuple(self.posterior.facts["source_tasks"])
        self._warn_of_seen_rows(self.method.source_tasks)
        if given is None:
            self.position = self.posterior.facts["position"]
        return self.posterior

    def _warn_of_seen_rows(self, source_tasks: Sequence[str]) -> None:
        """Say once which few-shot targets are no such thing: the posterior has learnt from all their training rows."""
        shots = self.config.data.shots
        seen = [name for name in self.config.data.target_tasks if name in source_tasks]
        warning = (
            f"data.shots: {shots} rows a class of {', '.join(seen)} are drawn, but the source stage learns from all of its "
            "training rows; that score is not a few-shot result. Remove it from data.target_tasks or from data.source_tasks"
        )
        if shots is not None and seen and self.world.rank == 0 and warning not in self._warned:
            log.warning("%s", warning)
            self._warned.add(warning)

    def store_posterior(self, posterior: Posterior, stage: TrainingStage) -> Posterior:
        """Write the posterior (rank 0) and return it as every later start will read it."""
        fault_point("stage.finished", stage=stage.name)
        self._check_frozen()
        facts = {
            "method": self.config.method.name,
            "backbone": self.backbone.name,
            "backbone_hash": self.backbone.identity,
            "tokenizer_hash": self.backbone.tokenizer_hash,
            "protocol": self.config.data.protocol,
            "source_tasks": list(self.config.data.source_tasks),
            "steps": stage.step,
            "seed": self.config.seed,
            "fingerprint": self.fingerprint,
            "position": self.log.position() if self.directory.rank == 0 else 0,
        }
        with self.while_rank_0_works(f"{stage.name}: posterior"):
            if self.directory.rank == 0:
                self.log.flush()
                folder = self.directory.path(layout.SOURCE, layout.POSTERIOR)
                folder.mkdir(parents=True, exist_ok=True)
                # Before the facts, which make the posterior exist.
                record = record_of(self.source_tasks(), self.config, self.backbone).with_prompts([])
                write_json_atomic(folder / layout.TASK_RECORD, record.as_json())
                Posterior(posterior.tensors, facts).save(folder)
            self.world.barrier()
        stored = self.stored_posterior()
        assert stored is not None
        return stored

    def has_results(self, tasks: Sequence[TaskData]) -> bool:
        """Return whether an earlier start finished this target stage."""
        file = self.directory.path(self.stage_name(tasks), layout.RESULT)
        if not self.world.wait_for_file(file):
            return False
        self.position = read_json(file)["position"]
        return True

    def store_results(self, tasks: Sequence[TaskData], stage: TrainingStage) -> None:
        """Evaluate the reported splits; write predictions, exports and, last, the result that ends the stage (rank 0)."""
        fault_point("stage.finished", stage=stage.name)
        self._check_frozen()
        outputs = TargetOutputs(self.config, self.directory, self.backbone, self.method, self.posterior, self.inputs)
        scored = []
        for index, task in enumerate(tasks):
            if self.config.evaluation.predict == "best":
                outputs.chosen[task.spec.name] = self._choose_particle(tasks, index)
            for split in self.config.evaluation.splits:
                for predict in dict.fromkeys(("map", self.config.evaluation.predict)):
                    one = evaluate(self.method, tasks, index, split, predict, self.evaluation, self.world, self.heartbeat)
                    self._log_scores(task, split, predict, one, stage)
                    scored.append((task, split, predict, one))
        # A soft prompt is exported as one; of all else the tensors (collective where they are sharded).
        trained = None if self.method.prompts() is not None else stage.optimizer.gather_full(stage.optimizer.snapshot())
        with self.while_rank_0_works(f"{stage.name}: results"):
            if self.directory.rank == 0:
                entries = [entry for one in scored for entry in outputs.entries(*one, stage, len(tasks))]
                for task, split, predict, evaluated in scored:
                    outputs.write_predictions(task, split, predict, evaluated.predictions)
                stage.write({f"best/{entry.task}": entry.value for entry in entries if entry.headline and entry.predict == "map"})
                self.log.flush()
                outputs.export(tasks, entries)
                if trained is not None:
                    outputs.export_weights(tasks, trained, stage.name)
                self._write_result(stage, entries)
            self.world.barrier()
        self.has_results(tasks)

    def _choose_particle(self, tasks: Sequence[TaskData], index: int) -> int:
        """Return the adapted particle that predicts a target, chosen by validation (collective)."""
        chosen = choose_particle(self.method, tasks, index, self.evaluation, self.world, self.heartbeat)
        if self.directory.rank == 0:
            name, adapted = tasks[index].spec.name, self.method.num_adapted
            log.info("%s: particle %d of 0 to %d has the best validation score", name, chosen, adapted - 1)
        return chosen

    def _write_result(self, stage: TrainingStage, entries: Sequence[Result]) -> None:
        """Write what says that a target stage is over; all else of it is on disk."""
        fault_point("results.before_write", stage=stage.name)
        result = {
            "position": self.log.position(),
            "selected_step": stage.best.step,
            "backbone_hash": self.backbone.identity,
            "tokenizer_hash": self.backbone.tokenizer_hash,
            "inputs": self.inputs,
            "results": [entry.as_json() for entry in entries],
        }
        write_json_atomic(self.directory.path(stage.name, layout.RESULT), result)

    def _check_frozen(self) -> None:
        """Raise BackboneChanged on every rank if a method wrote to the frozen backbone of one: before anything is stored of it."""
        if self.config.method.TRAINS_BACKBONE:  # it puts the pretrained weights back in `end`, and `finish` looks
            return
        problem = None
        try:
            self.backbone.verify_unchanged()
        except BackboneChanged as error:
            problem = error
        problems = [found for found in self.world.gather_objects(problem) if found is not None]
        if problems:
            raise problem or problems[0]

    def _log_scores(self, task: TaskData, split: str, predict: str, scored: Evaluated, stage: TrainingStage) -> None:
        if self.directory.rank == 0:
            values = ", ".join(f"{name} {value:.2f}" for name, value in scored.metrics.items())
            averaged = "" if predict == "map" else f", {predict}"
            at = stage.best.step or stage.step
            log.info("%s of %s%s: %s | selected step %d", split, task.spec.name, averaged, values, at)

    def finish(self) -> None:
        """Check that the backbone is what it was, gather the results, draw the figures (rank 0 writes)."""
        self.method.end()
        self.backbone.verify_unchanged()
        with self.while_rank_0_works("results and figures"):
            if self.directory.rank == 0:
                files = [self.directory.path(self.stage_name(tasks), layout.RESULT) for tasks in self.target_groups()]
                results = [entry for file in files for entry in read_json(file)["results"]]
                write_json_atomic(self.directory.folder / layout.RESULTS, results)
                self._log_score(results)
                self._draw()
            self.world.barrier()

    def _log_score(self, results: Sequence[dict[str, Any]]) -> None:
        """Record the one number runs are compared by: the mean headline metric over the targets, on the last reported split."""
        split = self.config.evaluation.splits[-1]
        headlines = [e["value"] for e in results if e["headline"] and e["predict"] == "map" and e["split"] == split]
        self.log.cut(self.position)
        if headlines:
            score = sum(headlines) / len(headlines)
            self.log.append({"step": 0, "stage": "results", "metrics": {BEST_SCORE: score}})
            self.log.flush()

    def _draw(self) -> None:
        if self.config.figures:
            records = list(with_snapshots(iter_records(self.directory.folder / layout.METRICS), self.directory.folder))
            draw_run(records, self.directory.path(layout.FIGURES))
            draw_steps(records, self.directory.path(layout.FIGURES))
