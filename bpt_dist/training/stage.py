"""One stage of a run on this rank: what it trains, how far it has come, what it keeps and records."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bpt_dist.config import SourceStageConfig, StageConfig
from bpt_dist.data.batches import Batch, Batches
from bpt_dist.distributed.failure_detection import StragglerAlarm
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.distributed.patience import while_rank_0_works
from bpt_dist.distributed.watchdog import Watchdog
from bpt_dist.errors import ConfigError, NonFinite, StorageError, UserError
from bpt_dist.methods.base import Method
from bpt_dist.objective import annealing
from bpt_dist.storage import checkpoint, layout
from bpt_dist.storage.digest import digest_of
from bpt_dist.storage.files import write_json_atomic
from bpt_dist.storage.metrics_log import VALIDATION, MetricsLog
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.storage.snapshots import keep_snapshot
from bpt_dist.training.accumulation import AllReduceAccumulator, GradientAccumulator, Losses, OrderedAccumulator
from bpt_dist.training.comparison import losses_of_prompts, mean_of_tasks
from bpt_dist.training.cost import StepCost, known_peak
from bpt_dist.training.microbatches import (
    MicroBatch,
    MicroBatchLimits,
    idle_ranks_warning,
    ordered_microbatches,
    shared_microbatches,
    tokens_a_pass,
)
from bpt_dist.training.out_of_memory import explain_out_of_memory
from bpt_dist.training.progress import StepProgress
from bpt_dist.training.sharding.placement import make_optimizer

log = logging.getLogger(__name__)
BEST = "best"
MOST_SKIPPED = 3  # non-finite steps in a row that end a run in any case


class Agreed(NamedTuple):
    """What all ranks know of a step before anything changes."""

    losses: Losses
    stop: bool  # some rank was asked to stop
    usable: bool  # all losses and gradients are finite


@dataclass
class Selection:
    """The best validation so far; ties keep the earlier step."""

    value: float = -math.inf
    step: int = 0
    since: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, value: float, step: int, tensors: dict[str, Tensor]) -> None:
        """Take over `tensors` if `value` beats what is kept."""
        if value > self.value:
            self.value, self.step, self.since, self.tensors = value, step, 0, tensors
        else:
            self.since += 1


@dataclass
class TrainingStage:
    """Everything one stage needs; `train.run_stage` reads like the algorithm because the rest is here."""

    name: str
    settings: StageConfig
    method: Method
    mesh: Mesh
    batches: Batches
    directory: RunDirectory
    log: MetricsLog
    fingerprint: str
    watchdog: Watchdog
    validate: Callable[[], dict[str, float]] | None = None
    position: int = 0  # of the metrics log: when the stage began, then at its newest checkpoint
    phase: str | None = None  # the name of the auxiliary phase, where this is one
    exact: bool = False  # one particle and one text a pass, summed in order: the same bits on every world size
    on_validation: Callable[[], None] = lambda: None  # called on rank 0 after each validation is logged
    planned_seconds: Callable[[], float | None] = lambda: None  # of a step, where there is a plan (rank 0)
    fitting: int | None = None  # sequences of a pass, where the backbone is partitioned and not all of a step fit

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.method, self.settings)
        self.best = Selection()
        self.step = 0
        self.skipped = 0  # steps in a row whose numbers were not finite
        self.stragglers = StragglerAlarm(self.mesh.world.hosts)
        self.compared: dict[str, float] = {}  # losses of the last step that is recorded, by the metric's name
        self.seconds = 0.0  # this rank's own work in the last step; 0 where it had no texts
        self.task_names = [task.name for task in self.batches.datasets]
        device, peak = self.mesh.world.device, known_peak(self.mesh.world.device, self.method.backbone.dtype)
        self.cost = StepCost(device, None if peak is None else peak * self.mesh.world.size)

    # --- work ---------------------------------------------------------------------------------------------------------

    def work(self, step: int) -> Iterator[MicroBatch]:
        """Yield the passes of this rank and measure how long they take."""
        began, works = time.perf_counter(), False
        self.cost.begin_step()
        own = self.mesh.rows(self.num_particles)
        blocks: list[tuple[slice, int | None]] = [(own, None)]
        if not self._shared_texts:
            blocks = [(slice(m, m + 1), m) for m in range(own.start, own.stop)]
        for rows, particle in blocks:
            batch = self.batches.at(step, particle=particle)
            batch = replace(batch, weight=batch.weight * self._temperature(step))
            here = slice(rows.start - own.start, rows.stop - own.start)
            self._count(batch, rows.stop - rows.start)
            units = ordered_microbatches(batch, here, self.mesh)
            if not self.exact:
                units = shared_microbatches(batch, here, self.mesh, self.passes(batch))
            for unit in units:
                works = works or not unit.is_filler
                yield unit
        self.seconds = time.perf_counter() - began if works else 0.0

    def _count(self, batch: Batch, num_particles: int) -> None:
        """Count the tokens and FLOPs of a batch; ranks along the particle axis read as much, with other particles."""
        copies = num_particles * self.mesh.particle.size
        targets = batch.num_target_tokens()
        num_prompts = 1 if self._prompts_are_shared else len(batch)
        sources = int(batch.source_mask.sum()) + num_prompts * self._prompt_length
        weights = self.method.backbone.matmul_weights()
        # A pass forward, one back through the activations, and one more where the weights themselves get gradients.
        passes = 2 + self.method.config.TRAINS_BACKBONE + self.method.extra_forwards
        flops = 0 if weights is None else 2 * passes * (weights[0] * sources + weights[1] * targets)
        self.cost.count(copies * (sources + targets), copies * flops)

    @property
    def _prompts_are_shared(self) -> bool:
        """Whether a pass reads a prompt once, however many texts it has."""
        return self.method.backbone.reads_prompts_once and not self.method.prompt_of_each_text

    @property
    def _prompt_length(self) -> int:
        length: int = getattr(self.method.config, "length", 0)
        return length

    @property
    def idle_warning(self) -> str | None:
        """What to tell the user where ranks have no texts in any step; None where all have."""
        particles = self.num_particles // self.mesh.particle.size if self._shared_texts and not self.exact else 1
        texts = self.batches.batch_size * self.batches.tasks_per_step
        return idle_ranks_warning(self.stage, texts, particles, (self.mesh.particle.size, self.mesh.data.size))

    def passes(self, batch: Batch) -> MicroBatchLimits:
        """Return what limits the passes over the texts of a batch."""
        backbone = self.method.backbone
        num_added = 0 if self._prompts_are_shared else self._prompt_length
        return MicroBatchLimits(
            self.settings.pass_size or self.fitting,
            num_added,
            backbone.padding_overhead(batch.target_ids.shape[1]),
            backbone.synced,
            tokens_a_pass(backbone.device.type),
        )

    def memory_for(self, unit: MicroBatch) -> AbstractContextManager[None]:
        """Return what names this rank, step and batch when the pass of `unit` runs out of memory."""
        batch, particles = unit.batch, len(range(*unit.particles.indices(self.method.num_particles)))
        shape = (
            f"{particles} particle(s) x {len(batch)} text(s) of {batch.source_ids.shape[1]} source and "
            f"{batch.target_ids.shape[1]} target tokens"
        )
        remedy = f"lower {self.stage}.pass_size or {self.stage}.batch_size, or start more processes"
        return explain_out_of_memory(self.mesh.world, f"{self.name} step {self.step}", shape, remedy)

    def gradients(self) -> GradientAccumulator:
        """Return what sums one step's gradients over its texts."""
        num_tasks = len(self.task_names)
        if not self.exact:
            return AllReduceAccumulator(self.optimizer.replicated, self.mesh, num_tasks)
        parameters = list(self.optimizer.names)
        sharded = [parameter for parameter in parameters if self.optimizer.names[parameter] in self.method.particle_tensors]
        return OrderedAccumulator(parameters, sharded, self.mesh, num_tasks, self.num_particles)

    @property
    def num_particles(self) -> int:
        """How many hypotheses all ranks train side by side in this stage: M in a source stage, usually one on a target."""
        if self.stage == "source":
            return self.method.num_particles
        return next((len(tensor) for tensor, name in self.optimizer.names.items() if name in self.method.particle_tensors), 1)

    @property
    def stage(self) -> str:
        """`source` or `target`."""
        return self.name.split("/")[0]

    @property
    def metric_prefix(self) -> str:
        """What its metrics are called by; a prelude counts its own steps (on targets the stage's name tells them apart)."""
        return f"source/{self.phase}" if self.phase and self.stage == "source" else self.stage

    @property
    def most_sequences(self) -> int:
        """How many sequences a rank may have to read in one pass: its particles times all texts of a step that they share."""
        particles = self.num_particles // self.mesh.particle.size if self._shared_texts else 1
        return particles * self.batches.batch_size * self.batches.tasks_per_step

    @property
    def _shared_texts(self) -> bool:
        return not isinstance(self.settings, SourceStageConfig) or self.settings.shared_texts

    def _temperature(self, step: int) -> float:
        if not isinstance(self.settings, SourceStageConfig) or self.settings.annealing == "none":
            return 1.0
        return annealing(step, self.settings.annealing_steps or self.settings.steps, self.settings.annealing)

    def heartbeat(self) -> None:
        """Say that this rank begins a pass: to its own watchdog, and to the ranks that may wait for it."""
        place = f"{self.name} step {self.step}"
        self.watchdog.heartbeat(place)
        self.mesh.world.set_location(place)

    # --- agreement ----------------------------------------------------------------------------------------------------

    def agree(self, losses: Losses, stop_requested: bool) -> Agreed:
        """Return what all ranks know of the step before anything changes (collective: every rank).

        Non-finite numbers on any rank make the step useless for all: the kernel would carry one NaN to every particle. Raises
        NonFinite on all ranks then, or with `on_non_finite: skip` after three such steps in a row.
        """
        finite = losses.read(self.optimizer.gradients()) and all(math.isfinite(value) for value in losses.sums)
        if not finite and not losses.bad_rows and self.mesh.data.size == 1:
            losses.bad_rows.update(self._rows_of_step())  # no other rank has a part in these gradients
        sums = losses.sums if finite else [0.0] * len(losses.sums)
        world = self.mesh.world
        flags = [stop_requested, not finite, bool(losses.bad_rows)]
        own = [world.progress.calls, self.step, self.seconds, *flags, *sums, *losses.counts]
        calls, steps, seconds, stops, bad, blamed, *of_task = zip(*world.gather_numbers(own), strict=True)
        if len(set(calls)) > 1 or len(set(steps)) > 1:
            raise RuntimeError(f"{self.name}: ranks are out of step: collective calls {calls}, steps {steps}; is it the same code?")
        alarm = self.stragglers.observe(seconds) if world.rank == 0 else None  # the medians of all ranks: once is enough
        if alarm:
            log.warning("%s step %d: %s", self.name, self.step, alarm)
        self.skipped = self.skipped + 1 if any(bad) else 0
        if self.skipped:
            # Where texts were to blame, their sums over ranks are not finite either, on ranks that did nothing wrong.
            self._refuse_or_skip(sorted(losses.bad_rows) if any(blamed) else [] if finite else self._rows_of_step())
        totals = [sum(values) for values in of_task]
        agreed = Losses(totals[: len(sums)], totals[len(sums) :]).by_task(len(self.task_names))
        return Agreed(agreed, any(stops), not self.skipped)

    def _rows_of_step(self) -> list[str]:
        return sorted({row for unit in self.work(self.step) if not unit.is_filler for row in unit.batch.row_ids})

    def _refuse_or_skip(self, rows: list[str]) -> None:
        """Name the step and its `rows` of this rank in `bad_step.json`; collective: every rank comes here."""
        by_rank = {str(rank): names for rank, names in enumerate(self.mesh.world.gather_objects(rows)) if names}
        file = self.directory.folder / layout.BAD_STEP
        if self.directory.rank == 0:
            write_json_atomic(file, {"stage": self.name, "step": self.step, "row_ids": by_rank})
        problem = f"{self.name} step {self.step}: a loss or gradient is NaN or infinite on rank(s) {', '.join(by_rank)}"
        if self.settings.on_non_finite == "skip" and self.skipped < MOST_SKIPPED:
            log.warning("%s; no particle moves in this step. The rows are in %s", problem, file)
            return
        raise NonFinite(
            f"{problem}; no particle was changed. The rows are in {file}; lower the learning rate or set {self.stage}.clip"
        )

    def compare(self) -> None:
        """Measure, where the step ends with a record, what the method compares on the texts of the step (collective: every rank).

        Before the update: what is compared belongs to the losses of this step.
        """
        prompts = self.method.comparison(self.mesh) if self.optimizer.measures(self.step) else {}
        self.compared = {}
        if not prompts:
            return
        batches = [self.batches.at(self.step)]
        if not self._shared_texts:
            batches = [self.batches.at(self.step, particle=m) for m in range(self.num_particles)]
        stacked = torch.stack(list(prompts.values()))
        losses = losses_of_prompts(
            self.method, stacked, batches, self.passes, self.mesh.world, self._before_a_pass, exact=self.exact
        )
        self.compared = dict(zip(prompts, map(mean_of_tasks, losses), strict=True))

    def _before_a_pass(self, unit: MicroBatch) -> AbstractContextManager[None]:
        self.heartbeat()
        return self.memory_for(unit)

    # --- records ------------------------------------------------------------------------------------------------------

    def record(self, losses: Losses, progress: StepProgress) -> None:
        """Report the progress of the stage, and write a record when one is due (collective: every rank; rank 0 writes)."""
        prefix = self.metric_prefix
        self.cost.end_step()
        if self.skipped:
            progress.update(self.step, None, self.cost.last)
            self.write({f"{prefix}/skipped": 1.0})
            return
        mean = [total / count for total, count in zip(losses.sums, losses.counts, strict=True) if count]
        progress.update(self.step, sum(mean) / len(mean), self.cost.last)
        if self.optimizer.measures(self.step - 1):
            values = {f"{prefix}/loss": sum(mean) / len(mean)}
            if len(self.task_names) > 1:
                pairs = zip(self.task_names, losses.sums, losses.counts, strict=True)
                values |= {f"{prefix}/loss/{name}": total / count for name, total, count in pairs if count}
            values |= {f"{prefix}/{name}": rate for name, rate in self.optimizer.learning_rates().items()}
            values[f"{prefix}/gradient_norm"] = self._gradient_norm()
            values |= self.cost.metrics(prefix)
            extra = self.method.diagnostics()
            if "particles" in extra and self.directory.rank == 0:
                extra["particles"] = keep_snapshot(self.directory.folder, self.name, self.step, extra["particles"])
            self.write({**values, **self.compared, **extra.pop("metrics", {})}, **extra)

    def _gradient_norm(self) -> float:
        """Return the largest norm that `clip` compares with its limit, over all particles (collective: every rank)."""
        return max(norm for (norm,) in self.mesh.world.gather_numbers([self.optimizer.gradient_norm()]))

    def write(self, metrics: dict[str, float], **extra: Any) -> None:
        """Append one record of this step to metrics.jsonl (rank 0)."""
        if self.directory.rank == 0:
            self.log.append({"step": self.step, "stage": self.name, "metrics": metrics, **extra})

    @property
    def validation_due(self) -> bool:
        """Whether this step ends with a validation: every `eval_every` steps and after the last."""
        every = getattr(self.settings, "eval_every", None)
        last = self.step == self.settings.steps
        return self.validate is not None and (last or (every is not None and self.step % every == 0))

    def select(self) -> None:
        """Validate, and keep the trained tensors if they are the best so far (collective: every rank)."""
        assert self.validate is not None
        values = self.validate()
        score = sum(values.values()) / len(values)
        self.best.offer(score, self.step, self.optimizer.snapshot())
        self.write({f"{self.stage}/{VALIDATION}/{name}": value for name, value in values.items()})
        if self.directory.rank == 0:
            best = (
                "the best so far" if self.best.step == self.step else f"the best is {self.best.value:.2f} of step {self.best.step}"
            )
            scores = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            log.info("step %d/%d | validation: %s | %s", self.step, self.settings.steps, scores, best)
            self.on_validation()

    @property
    def converged(self) -> bool:
        """Whether `patience` validations in a row brought nothing better."""
        patience = getattr(self.settings, "patience", None)
        return patience is not None and self.best.since >= patience

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the stage keeps its checkpoints."""
        return self.directory.path(self.name, layout.CHECKPOINTS)

    def save(self) -> None:
        """Publish a checkpoint of this step (collective: every rank); if rank 0 cannot, every rank learns why."""
        state = {f"trained/{name}": tensor for name, tensor in self.optimizer.state_dict(self.mesh).items()}
        state |= {f"{BEST}/{name}": tensor for name, tensor in self.optimizer.gather_full(self.best.tensors).items()}
        with while_rank_0_works(self.mesh.world, self.watchdog, f"{self.name} step {self.step}: checkpoint"):
            problem = self.mesh.world.broadcast(self._write_checkpoint(state) if self.directory.rank == 0 else None)
        if problem:
            raise StorageError(problem)

    def _write_checkpoint(self, state: dict[str, Tensor]) -> str | None:
        """Write a checkpoint (rank 0) and return why it could not be written."""
        try:
            self.directory.check_lock()
            self.log.flush()
            best = {"value": self.best.value if self.best.tensors else None, "step": self.best.step, "since": self.best.since}
            meta = {"fingerprint": self.fingerprint, "position": self.log.position(), "best": best, "stage": self.name}
            meta["skipped"] = self.skipped
            self.position = self.log.position()
            checkpoint.save(self.folder, self.step, state, meta)
        except (StorageError, OSError) as error:
            return str(error)
        return None

    def restore(self) -> None:
        """Continue from the newest intact checkpoint, or start the stage (collective: every rank)."""
        stored = self._newest_checkpoint()
        if stored is not None:
            state, meta = checkpoint.load(stored)
            parts = {part: {key.removeprefix(f"{part}/"): tensor for key, tensor in state.items() if key.startswith(f"{part}/")}
                     for part in ("trained", BEST)}  # fmt: skip
            self.optimizer.load(parts["trained"], self.mesh)
            kept = meta["best"]
            value = -math.inf if kept["value"] is None else kept["value"]
            self.best = Selection(value, kept["step"], kept["since"], self.optimizer.take_shard(parts[BEST]))
            self.step, self.position, self.skipped = stored.step, meta["position"], meta["skipped"]
            log.info("resuming at step %d", self.step)
        starts = self.mesh.world.gather_objects((self.name, self.step, self.mesh.particle.index, self._digests()))
        places = [(name, step) for name, step, _, _ in starts]
        if len(set(places)) > 1:
            raise RuntimeError(f"{self.folder}: ranks begin at different places ({places}); is it the same code?")
        self._refuse_unequal_replicas([(particle, digests) for _, _, particle, digests in starts])
        # What follows a prelude that is over belongs to the next stage, which knows how much of it counts.
        if self.directory.rank == 0 and not (self.phase and self.step == self.settings.steps):
            self.log.cut(self.position)

    def _newest_checkpoint(self) -> checkpoint.Checkpoint | None:
        """Return the newest intact checkpoint that rank 0 sees, as every rank reads it (collective: every rank).

        A network file system may show ranks different directories for a while after a start.
        """
        world, found, problem = self.mesh.world, None, None
        if world.rank == 0:
            try:
                found = checkpoint.latest(self.folder, fingerprint=self.fingerprint, warn=log.warning)
            except UserError as error:
                problem = error
        problem, step = world.broadcast((problem, None if found is None else found.step))
        if problem is not None:
            raise problem
        if step is None:
            return None
        manifest = checkpoint.folder_of(self.folder, step) / checkpoint.MANIFEST
        world.wait_for_file(manifest, manifest.read_bytes() if world.rank == 0 else None)
        return found or checkpoint.at(self.folder, step)

    def _digests(self) -> dict[str, str]:
        """Return a hash of each tensor that replicas must share; nothing is compared, and nothing hashed, in one process."""
        if self.mesh.data.size == 1:
            return {}
        return {name: digest_of({name: tensor}) for name, tensor in self.method.replicated_tensors().items()}

    def _refuse_unequal_replicas(self, starts: Sequence[tuple[int, dict[str, str]]]) -> None:
        """Raise ConfigError where ranks that own the same particles begin with other tensors: one result of two prompts."""
        first: dict[int, int] = {}
        for rank, (particle, digests) in enumerate(starts):
            other = first.setdefault(particle, rank)
            theirs = starts[other][1]
            unequal = [name for name in sorted({*digests, *theirs}) if digests.get(name) != theirs.get(name)]
            if unequal:
                hosts = self.mesh.world.hosts
                raise ConfigError(
                    f"{self.name} step {self.step}: {', '.join(unequal)} differs between rank {other} on {hosts[other]} and rank "
                    f"{rank} on {hosts[rank]}, which train the same prompts; give all hosts the same files, packages and kind of "
                    "processor, then rerun the same command to resume"
                )

    def finish(self) -> None:
        """Put back the best validated tensors, where there were validations."""
        if self.best.tensors:
            self.optimizer.restore(self.best.tensors)
