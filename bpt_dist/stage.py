"""One stage of a run on this rank: what it trains, where it stands, what it keeps, what it says."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bpt_dist import checkpoint
from bpt_dist.config import SourceStage, Stage
from bpt_dist.data.batches import Batch, Batches
from bpt_dist.engine import updater
from bpt_dist.errors import ConfigError, NonFinite, StorageError
from bpt_dist.exhaustion import named
from bpt_dist.files import write_json_atomic
from bpt_dist.gradients import GradientSum, Losses, OrderedSum, ReducedSum
from bpt_dist.guard import Guard
from bpt_dist.journal import MetricsLog
from bpt_dist.mesh import Mesh
from bpt_dist.methods.base import Method
from bpt_dist.objective import annealing
from bpt_dist.passes import Passes
from bpt_dist.peers import StragglerAlarm
from bpt_dist.progress import StepProgress
from bpt_dist.run import Run
from bpt_dist.work import Unit, ordered_units, shared_units

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


def check_sequences(stage: str, batch_size: int, num_sequences: int, num_ranks: int) -> None:
    """Refuse a stage whose steps have fewer sequences to deal than the data axis has ranks."""
    if num_sequences < num_ranks:
        raise ConfigError(
            f"{stage}.batch_size is {batch_size}: a step has {num_sequences} sequence(s) for {num_ranks} ranks of the data "
            "axis; raise it, or start fewer processes"
        )


@dataclass
class StageRun:
    """Everything one stage needs; `train.run_stage` reads like the algorithm because the rest is here."""

    name: str
    settings: Stage
    method: Method
    mesh: Mesh
    batches: Batches
    run: Run
    log: MetricsLog
    fingerprint: str
    guard: Guard
    validate: Callable[[], dict[str, float]] | None = None
    position: int = 0  # of the metrics log: when the stage began, then at its newest checkpoint
    prelude: str | None = None  # the name of the prelude this is, if it is one
    shares: int = 1  # into how many parts the particles of a text may be dealt
    exact: bool = False  # one particle and one text a pass, summed in order: the same bits on every world size

    def __post_init__(self) -> None:
        self.updater = updater(self.method, self.settings)
        self.best = Selection()
        self.step = 0
        self.skipped = 0  # steps in a row whose numbers were not finite
        self.stragglers = StragglerAlarm(self.mesh.world.hosts)
        self.seconds = 0.0  # this rank's own work in the last step
        self.task_names = [task.name for task in self.batches.datasets]
        texts = self.batches.batch_size * self.batches.tasks_per_step
        check_sequences(self.stage, self.batches.batch_size, texts * self.shares, self.mesh.data.size)

    # --- work ---------------------------------------------------------------------------------------------------------

    def work(self, step: int) -> Iterator[Unit]:
        """Yield the passes of this rank and measure how long they take."""
        began = time.perf_counter()
        own = self.mesh.rows(self.num_particles)
        blocks: list[tuple[slice, int | None]] = [(own, None)]
        if not self._shared_texts:
            blocks = [(slice(m, m + 1), m) for m in range(own.start, own.stop)]
        for rows, particle in blocks:
            batch = self.batches.at(step, particle=particle)
            batch = replace(batch, weight=batch.weight * self._temperature(step))
            here = slice(rows.start - own.start, rows.stop - own.start)
            if self.exact:
                yield from ordered_units(batch, here, self.mesh)
            else:
                yield from shared_units(batch, here, self.mesh, self.passes(batch))
        self.seconds = time.perf_counter() - began

    def passes(self, batch: Batch) -> Passes:
        """Return what limits the passes over the texts of a batch."""
        backbone = self.method.backbone
        num_added = getattr(self.method.config, "length", 0)
        return Passes(self.settings.pass_size, num_added, backbone.padding_for(batch.target_ids.shape[1]), backbone.synced)

    def memory_for(self, unit: Unit) -> AbstractContextManager[None]:
        """Return what names this rank, step and batch when the pass of `unit` runs out of memory."""
        batch, particles = unit.batch, len(range(*unit.particles.indices(self.method.num_particles)))
        shape = (
            f"{particles} particle(s) x {len(batch)} text(s) of {batch.source_ids.shape[1]} source and "
            f"{batch.target_ids.shape[1]} target tokens"
        )
        remedy = f"lower {self.stage}.pass_size or {self.stage}.batch_size, or start more processes"
        return named(self.mesh.world, f"{self.name} step {self.step}", shape, remedy)

    def gradients(self) -> GradientSum:
        """Return what sums one step's gradients over its texts."""
        num_tasks = len(self.task_names)
        if not self.exact:
            return ReducedSum(self.updater.replicated, self.mesh, num_tasks)
        parameters = list(self.updater.names)
        sharded = [parameter for parameter in parameters if self.updater.names[parameter] in self.method.particle_tensors]
        return OrderedSum(parameters, sharded, self.mesh, num_tasks, self.num_particles)

    @property
    def num_particles(self) -> int:
        """How many hypotheses all ranks train side by side in this stage: M in a source stage, usually one on a target."""
        if self.stage == "source":
            return self.method.num_particles
        return next((len(tensor) for tensor, name in self.updater.names.items() if name in self.method.particle_tensors), 1)

    @property
    def stage(self) -> str:
        """`source` or `target`."""
        return self.name.split("/")[0]

    @property
    def metric_prefix(self) -> str:
        """What its metrics are called by; a prelude counts its own steps (on targets the stage's name tells them apart)."""
        return f"source/{self.prelude}" if self.prelude and self.stage == "source" else self.stage

    @property
    def _shared_texts(self) -> bool:
        return not isinstance(self.settings, SourceStage) or self.settings.shared_texts

    def _temperature(self, step: int) -> float:
        if not isinstance(self.settings, SourceStage) or self.settings.annealing == "none":
            return 1.0
        return annealing(step, self.settings.annealing_steps or self.settings.steps, self.settings.annealing)

    def beat(self) -> None:
        """Say that this rank begins a pass: to its own guard, and to the ranks that may wait for it."""
        place = f"{self.name} step {self.step}"
        self.guard.beat(place)
        self.mesh.world.at(place)

    # --- agreement ----------------------------------------------------------------------------------------------------

    def agree(self, losses: Losses, stop_requested: bool) -> Agreed:
        """Return what all ranks know of the step before anything changes (collective: every rank).

        Non-finite numbers on any rank make the step useless for all: the kernel would carry one NaN to every particle. Raises
        NonFinite on all ranks then, or with `on_non_finite: skip` after three such steps in a row.
        """
        finite = all(math.isfinite(value) for value in losses.sums) and all(
            bool(gradient.isfinite().all()) for gradient in self.updater.gradients()
        )
        sums = losses.sums if finite else [0.0] * len(losses.sums)
        world = self.mesh.world
        flags = [stop_requested, not finite, bool(losses.bad_rows)]
        own = [world.progress.calls, self.step, self.seconds, *flags, *sums, *losses.counts]
        calls, steps, seconds, stops, bad, blamed, *of_task = zip(*world.gather_numbers(own), strict=True)
        if len(set(calls)) > 1 or len(set(steps)) > 1:
            raise RuntimeError(f"{self.name}: ranks are out of step: collective calls {calls}, steps {steps}; is it the same code?")
        alarm = self.stragglers.observe(seconds)
        if alarm and world.rank == 0:
            log.warning("%s step %d: %s", self.name, self.step, alarm)
        self.skipped = self.skipped + 1 if any(bad) else 0
        if self.skipped:
            # Where texts were to blame, their sums over ranks are not finite either, on ranks that did nothing wrong.
            self._refuse_or_skip(sorted(losses.bad_rows) if any(blamed) else [] if finite else self._rows_of_step())
        totals = [sum(values) for values in of_task]
        agreed = Losses(totals[: len(sums)], totals[len(sums) :]).by_task(len(self.task_names))
        return Agreed(agreed, any(stops), not self.skipped)

    def _rows_of_step(self) -> list[str]:
        return sorted({row for unit in self.work(self.step) for row in unit.batch.row_ids})

    def _refuse_or_skip(self, rows: list[str]) -> None:
        """Name the step and its `rows` of this rank in `bad_step.json`; collective: every rank comes here."""
        by_rank = {str(rank): found for rank, found in enumerate(self.mesh.world.gather_objects(rows)) if found}
        file = self.run.folder / "bad_step.json"
        if self.run.rank == 0:
            write_json_atomic(file, {"stage": self.name, "step": self.step, "row_ids": by_rank})
        problem = f"{self.name} step {self.step}: a loss or gradient is NaN or infinite on rank(s) {', '.join(by_rank)}"
        if self.settings.on_non_finite == "skip" and self.skipped < MOST_SKIPPED:
            log.warning("%s; no particle moves in this step. The rows are in %s", problem, file)
            return
        raise NonFinite(
            f"{problem}; no particle was changed. The rows are in {file}; lower the learning rate or set {self.stage}.clip"
        )

    # --- records ------------------------------------------------------------------------------------------------------

    def record(self, losses: Losses, progress: StepProgress) -> None:
        """Say where the stage is, and write it down when it is due (collective: every rank; rank 0 writes)."""
        if self.skipped:
            progress.update(self.step, "skipped")
            self.write({f"{self.metric_prefix}/skipped": 1.0})
            return
        mean = [total / count for total, count in zip(losses.sums, losses.counts, strict=True) if count]
        progress.update(self.step, f"loss {sum(mean) / len(mean):.4f}")
        if self.step % self.settings.log_every == 0 or self.step == self.settings.steps:
            prefix = self.metric_prefix
            values = {f"{prefix}/loss": sum(mean) / len(mean)}
            if len(self.task_names) > 1:
                pairs = zip(self.task_names, losses.sums, losses.counts, strict=True)
                values |= {f"{prefix}/loss/{name}": total / count for name, total, count in pairs if count}
            extra = self.method.diagnostics()
            self.write({**values, **extra.pop("metrics", {})}, **extra)

    def write(self, metrics: dict[str, float], **extra: Any) -> None:
        """Append one record of this step to metrics.jsonl (rank 0)."""
        if self.run.rank == 0:
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
        self.best.offer(sum(values.values()) / len(values), self.step, self.updater.snapshot())
        self.write({f"{self.stage}/validation/{name}": value for name, value in values.items()})

    @property
    def converged(self) -> bool:
        """Whether `patience` validations in a row brought nothing better."""
        patience = getattr(self.settings, "patience", None)
        return patience is not None and self.best.since >= patience

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where the stage keeps its checkpoints."""
        return self.run.path(self.name, "checkpoints")

    def save(self) -> None:
        """Publish a checkpoint of this step (collective: every rank); if rank 0 cannot, every rank learns why."""
        state = {f"trained/{name}": tensor for name, tensor in self.updater.tensors(self.mesh).items()}
        state |= {f"{BEST}/{name}": tensor for name, tensor in self.updater.whole(self.best.tensors).items()}
        problem = None
        if self.run.rank == 0:
            try:
                self.run.check_lock()
                self.log.flush()
                best = {"value": self.best.value if self.best.tensors else None, "step": self.best.step, "since": self.best.since}
                meta = {"fingerprint": self.fingerprint, "position": self.log.position(), "best": best, "stage": self.name}
                meta["skipped"] = self.skipped
                self.position = self.log.position()
                checkpoint.save(self.folder, self.step, state, meta)
            except (StorageError, OSError) as error:
                problem = str(error)
        problem = self.mesh.world.broadcast(problem)
        if problem:
            raise StorageError(problem)

    def restore(self) -> None:
        """Continue from the newest intact checkpoint, or start the stage (collective: every rank)."""
        found = checkpoint.newest(self.folder, fingerprint=self.fingerprint, warn=log.warning)
        if found is not None:
            state, meta = checkpoint.load(found)
            parts = {part: {key.removeprefix(f"{part}/"): tensor for key, tensor in state.items() if key.startswith(f"{part}/")}
                     for part in ("trained", BEST)}  # fmt: skip
            self.updater.load(parts["trained"], self.mesh)
            kept = meta["best"]
            value = -math.inf if kept["value"] is None else kept["value"]
            self.best = Selection(value, kept["step"], kept["since"], self.updater.own(parts[BEST]))
            self.step, self.position, self.skipped = found.step, meta["position"], meta["skipped"]
            log.info("%s: resuming at step %d", self.name, self.step)
        places = self.mesh.world.gather_objects((self.name, self.step))
        if len(set(places)) > 1:
            raise StorageError(f"{self.folder}: ranks see different newest checkpoints ({places}); is the run directory shared?")
        # What follows a prelude that is over belongs to the next stage, which knows how much of it counts.
        if self.run.rank == 0 and not (self.prelude and self.step == self.settings.steps):
            self.log.cut(self.position)

    def finish(self) -> None:
        """Put back the best validated tensors, where there were validations."""
        if self.best.tensors:
            self.updater.restore(self.best.tensors)
