"""One run while it is open: its directory, its data and backbone, what is stored when a stage ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bpt_dist.backbone import Backbone
from bpt_dist.config import Config, Data, Evaluation, Stage
from bpt_dist.data import metrics
from bpt_dist.data.batches import Batches
from bpt_dist.data.prepared import TaskData, prepare
from bpt_dist.errors import UserError
from bpt_dist.evaluate import Evaluated, evaluate
from bpt_dist.export import export_low_rank, export_prompt
from bpt_dist.export_weights import write_weights
from bpt_dist.faults import fault_point
from bpt_dist.figures import draw_run
from bpt_dist.figures_steps import draw_steps
from bpt_dist.files import encode_json, read_json, write_atomic, write_json_atomic
from bpt_dist.guard import Guard
from bpt_dist.journal import MetricsLog, read_records
from bpt_dist.mesh import Mesh, World
from bpt_dist.methods import base as methods
from bpt_dist.model_card import CardFacts, PosteriorFacts
from bpt_dist.posterior import FACTS, Posterior
from bpt_dist.run import Run
from bpt_dist.stage import StageRun, check_sequences

log = logging.getLogger(__name__)
RESULT = "result.json"


@dataclass
class Session:
    """Everything `train.train` passes down; every method is called by every rank."""

    config: Config
    world: World
    guard: Guard
    run: Run
    log: MetricsLog
    backbone: Backbone
    fingerprint: str
    position: int = 0
    posterior: Posterior | None = None
    _data: dict[str, list[TaskData]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.method = methods.load(config, self.backbone)
        # What can be known of the last stage is said before the first one is trained.
        if config.target.steps:
            num_tasks = len(config.data.target_tasks) if config.target.joint else 1
            check_sequences("target", config.target.batch_size, num_tasks * config.target.batch_size, self.world.size)
        # All rows are read and checked now: a bad one must be named before the first forward pass.
        options = config.data
        if config.method.HAS_SOURCE_STAGE and self.config.source.posterior is None:
            few_shot_off = options.model_copy(update={"shots": None})
            self._data["source"] = self._prepare(options.source_tasks, few_shot_off, ("train",))
        wanted = ("train", *dict.fromkeys(("validation", *config.evaluation.splits)))
        self._data["target"] = self._prepare(options.target_tasks, options, wanted)

    def _prepare(self, names: Sequence[str], options: Data, splits: Sequence[str]) -> list[TaskData]:
        """Prepare on rank 0 first, then on one rank of every other host: they fill the cache that all the others read.

        What rank 0 refuses, every rank refuses.
        """

        def prepared() -> list[TaskData]:
            return prepare(names, options, self.backbone.tokenizer, splits=splits, seed=self.config.seed, beat=self.beat)

        found, problem = None, None
        if self.world.rank == 0:
            try:
                found = prepared()
            except UserError as error:
                problem = error
        problem = self.world.broadcast(problem)
        if problem is not None:
            raise problem
        hosts = self.world.hosts
        if len(set(hosts)) > 1:
            if found is None and hosts.index(hosts[self.world.rank]) == self.world.rank:
                found = prepared()
            self.world.barrier()
        return prepared() if found is None else found

    @property
    def evaluation(self) -> Evaluation:
        """How to evaluate; with `exact` text by text, for what shares a pass with a text changes its last bits."""
        settings = self.config.evaluation
        return settings.model_copy(update={"batch_size": 1}) if self.config.distribution.exact else settings

    def beat(self, place: str) -> None:
        """Say that this rank is alive at `place`: to its own guard, and to the ranks that may wait for it."""
        self.guard.beat(place)
        self.world.at(place)

    def data_hashes(self) -> dict[str, str]:
        """Return the content hash of every split of every task of this run."""
        found = ((part, task, split) for part, tasks in self._data.items() for task in tasks for split in task.splits)
        return {f"{part}/{task.spec.name}/{split}": task.splits[split].content_hash for part, task, split in found}

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
        return "target/joint" if self.config.target.joint else f"target/{tasks[0].spec.name}"

    def source_mesh(self) -> Mesh:
        """Arrange the ranks for the source stage, as the configuration says."""
        shape = self.config.distribution.mesh
        explicit = None if isinstance(shape, str) else (shape.particle, shape.data)
        return self.world.mesh(self.method.num_particles, explicit, self.config.distribution.exchange)

    def target_mesh(self) -> Mesh:
        """Arrange the ranks for a target stage: all of them share the texts, since every rank predicts with every prompt."""
        return self.world.mesh(1, (1, self.world.size))

    def stage(
        self, name: str, settings: Stage, mesh: Mesh, batches: Batches, validate: Callable[[], dict[str, float]] | None = None
    ) -> StageRun:
        """Return a stage that starts where the last one ended."""
        if self.run.rank == 0:
            self.run.status("running", stage=name)
        return StageRun(
            name, settings, self.method, mesh, batches, self.run, self.log, self.fingerprint, self.guard, validate, self.position,
            shares=self.method.num_particles // mesh.particle.size if self.config.deals_cells(settings) else 1,
            exact=self.config.distribution.exact,
        )  # fmt: skip

    def prelude(self, name: str, prelude: methods.Prelude, settings: Stage, mesh: Mesh, batches: Batches) -> StageRun:
        """Return the prelude of the stage `name`."""
        stage = self.stage(f"{name}/{prelude.name}", prelude.settings(settings), mesh, batches)
        stage.prelude = prelude.name
        return stage

    def close_prelude(self, stage: StageRun) -> None:
        """Let the next stage begin where this one ended."""
        self.position = stage.position

    # --- what a stage leaves ------------------------------------------------------------------------------------------

    def stored_posterior(self) -> Posterior | None:
        """Return the posterior of the configuration or of an earlier start of this run."""
        own = self.run.path("source", "posterior")
        given = self.config.source.posterior
        if given is None and not self.world.sees(own / FACTS):
            return None
        self.posterior = Posterior.load(given or own, self.backbone)
        self.posterior.require(self.config.method.name, self.method.source_tensors, self.backbone.width)
        self.posterior.agree(self.config, self.method.source_tensors)
        self.method.source_tasks = tuple(self.posterior.facts["source_tasks"])
        if given is None:
            self.position = self.posterior.facts["position"]
        return self.posterior

    def store_posterior(self, posterior: Posterior, stage: StageRun) -> Posterior:
        """Write the posterior (rank 0) and return it as every later start will read it."""
        fault_point("stage.finished", stage=stage.name)
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
            "position": self.log.position() if self.run.rank == 0 else 0,
        }
        if self.run.rank == 0:
            self.log.flush()
            Posterior(posterior.tensors, facts).save(self.run.path("source", "posterior"))
        self.world.barrier()
        stored = self.stored_posterior()
        assert stored is not None
        return stored

    def has_results(self, tasks: Sequence[TaskData]) -> bool:
        """Return whether an earlier start finished this target stage."""
        file = self.run.path(self.stage_name(tasks), RESULT)
        if not self.world.sees(file):
            return False
        self.position = read_json(file)["position"]
        return True

    def store_results(self, tasks: Sequence[TaskData], stage: StageRun) -> None:
        """Evaluate the reported splits; write predictions, exports and, last, the result that ends the stage (rank 0)."""
        fault_point("stage.finished", stage=stage.name)
        entries: list[dict[str, Any]] = []
        for index, task in enumerate(tasks):
            for split in self.config.evaluation.splits:
                for predict in dict.fromkeys(("map", self.config.evaluation.predict)):
                    found = evaluate(self.method, tasks, index, split, predict, self.evaluation, self.world, self.beat)
                    entries += self._entries(task, split, predict, found, stage, len(tasks))
                    self._write_predictions(task, split, predict, found)
        # A soft prompt is exported as one; of all else the tensors (collective where they lie in parts).
        trained = None if self.method.prompts() is not None else stage.updater.whole(stage.updater.snapshot())
        if self.run.rank == 0:
            best = {f"best/{entry['task']}": entry["value"] for entry in entries if entry["headline"] and entry["predict"] == "map"}
            stage.write(best)
            self.log.flush()
            self._export(tasks, entries)
            self._export_weights(tasks, trained, stage.name)
            fault_point("results.before_write", stage=stage.name)
            result = {
                "position": self.log.position(),
                "selected_step": stage.best.step,
                "backbone_hash": self.backbone.identity,
                "tokenizer_hash": self.backbone.tokenizer_hash,
                "results": entries,
            }
            write_json_atomic(self.run.path(stage.name, RESULT), result)
        self.world.barrier()
        self.has_results(tasks)

    def finish(self) -> None:
        """Check that the T5 is what it was, gather the results, draw the figures (rank 0 writes)."""
        self.method.end()
        self.backbone.verify_unchanged()
        if self.run.rank == 0:
            files = [self.run.path(self.stage_name(tasks), RESULT) for tasks in self.target_groups()]
            results = [entry for file in files for entry in read_json(file)["results"]]
            write_json_atomic(self.run.folder / "results.json", results)
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
            self.log.append({"step": 0, "stage": "results", "metrics": {"best/score": score}})
            self.log.flush()

    def _entries(
        self, task: TaskData, split: str, predict: str, found: Evaluated, stage: StageRun, num_tasks: int
    ) -> list[dict[str, Any]]:
        """Return one entry of results.json for each metric: percent, but for `nll` (nats)."""
        spec = task.spec
        examples = task.splits[split].examples
        majority = metrics.majority(spec, task.train.examples, examples, task.protocol)
        common = {
            "method": self.config.method.name,
            "backbone": self.backbone.name,
            "task": spec.name,
            "split": split,
            "n": len(examples),
            "seed": self.config.seed,
            "steps": stage.step,
            "selected_step": stage.best.step,
            "trainable_parameters": self.method.num_trainable() // num_tasks,
            "joint": self.config.target.joint,
            "stage": stage.name,
            "run": self.config.name,
            "predict": predict,
            "decode": found.decode,
            "protocol": task.protocol,
        }
        return [
            {
                **common,
                "metric": name,
                "value": value,
                "headline": name == spec.headline,
                "majority": majority.get(name),
            }
            for name, value in found.metrics.items()
        ]

    def _write_predictions(self, task: TaskData, split: str, predict: str, found: Evaluated) -> None:
        if self.run.rank == 0:
            parts = [part for part in (split, predict) if part not in ("test", "map")]
            name = "-".join(["predictions", *parts]) + ".jsonl"
            folder = self.run.path("target", task.spec.name)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / name, b"".join(encode_json(entry) for entry in found.predictions))

    def _export(self, tasks: Sequence[TaskData], entries: Sequence[dict[str, Any]]) -> None:
        """Write each finished prompt, or the low-rank changes of the T5, as a PEFT folder."""
        prompts, pairs = self.method.prompts() or {}, self.method.low_rank_pairs()
        for name in prompts if pairs is None else [task.spec.name for task in tasks]:
            fault_point("export.before_write", task=name)
            card = CardFacts(
                title=f"Soft prompt for {name}" if pairs is None else f"Low-rank adapter for {name}",
                method=self.config.method.name,
                backbone_hash=self.backbone.identity,
                tokenizer_hash=self.backbone.tokenizer_hash,
                protocol=self.config.data.protocol,
                target_tasks=[name],
                source_tasks=self.method.source_tasks,
                results=[entry for entry in entries if entry["task"] == name],
                posterior=self._posterior_facts(),
            )
            folder, base = self.run.path("target", name) / "adapter", (self.backbone.path, self.backbone.revision)
            if pairs is None:
                facts = self.backbone.model.config.to_dict()
                export_prompt(prompts[name], folder, base_model=base[0], revision=base[1], config_facts=facts, card=card)
            else:
                export_low_rank(pairs.pairs, pairs.alpha, folder, base_model=base[0], revision=base[1], card=card)

    def _export_weights(self, tasks: Sequence[TaskData], trained: Mapping[str, Tensor] | None, stage: str) -> None:
        """Write the trained tensors of a method that is no soft prompt."""
        if trained is None:
            return
        source = self.posterior.tensors if self.posterior is not None else None
        names, sizes = [task.spec.name for task in tasks], [len(task.train.tokens) for task in tasks]
        write_weights(self.method, trained, source, names, sizes, self.run.path(stage, "weights"))

    def _posterior_facts(self) -> PosteriorFacts | None:
        if self.posterior is None or "particles" not in self.posterior.tensors:
            return None
        return PosteriorFacts.of(self.posterior.tensors["particles"], self.posterior.facts["steps"])

    def _draw(self) -> None:
        if self.config.figures:
            records, _ = read_records(self.run.folder / "metrics.jsonl", limit=1 << 30)
            draw_run(records, self.run.path("figures"))
            draw_steps(records, self.run.path("figures"))
