"""One stage of a run on this rank: what it trains, where it stands, what it keeps, what it says."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpt_dist import checkpoint
from bpt_dist.config import SourceStage, Stage
from bpt_dist.data.batches import Batch, Batches
from bpt_dist.engine import Updater
from bpt_dist.errors import ConfigError, NonFinite, StorageError
from bpt_dist.files import write_json_atomic
from bpt_dist.guard import Guard
from bpt_dist.journal import MetricsLog
from bpt_dist.mesh import Mesh, deal
from bpt_dist.methods.base import Method
from bpt_dist.objective import annealing
from bpt_dist.progress import StepProgress
from bpt_dist.run import Run

log = logging.getLogger(__name__)
BEST = "best"


@dataclass
class Losses:
    """Minus log-likelihoods of one step, summed by task over this rank's texts and particles."""

    sums: list[float]
    counts: list[float]

    @classmethod
    def of(cls, num_tasks: int) -> Losses:
        """Return zeros for `num_tasks` tasks."""
        return cls([0.0] * num_tasks, [0.0] * num_tasks)

    def add(self, log_likelihood: Tensor, batch: Batch) -> None:
        """Count the log-likelihoods [m, N] of a batch."""
        of_text = -log_likelihood.detach().double().sum(dim=0).cpu()
        for task, value in zip(batch.task_index.tolist(), of_text.tolist(), strict=True):
            self.sums[task] += value
            self.counts[task] += len(log_likelihood)


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


def check_texts(stage: str, batch_size: int, num_tasks: int, num_ranks: int) -> None:
    """Refuse a stage whose steps have fewer texts than the data axis has ranks."""
    if num_tasks * batch_size < num_ranks:
        raise ConfigError(
            f"{stage}.batch_size is {batch_size}: a step has {num_tasks * batch_size} text(s) for {num_ranks} ranks of the data "
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

    def __post_init__(self) -> None:
        self.updater = Updater(self.method, self.settings)
        self.best = Selection()
        self.step = 0
        self.task_names = [task.name for task in self.batches.datasets]
        check_texts(self.stage, self.batches.batch_size, self.batches.tasks_per_step, self.mesh.data.size)

    # --- work ---------------------------------------------------------------------------------------------------------

    def work(self, step: int) -> Iterator[tuple[slice, Batch]]:
        """Yield (particles of this rank, its share of their texts); every rank yields equally often."""
        share = self.mesh.data.index
        own = range(self.method.num_particles)[self.mesh.rows(self.method.num_particles)]
        for particles, key in [(slice(None), None)] if self._shared_texts else [(slice(i, i + 1), m) for i, m in enumerate(own)]:
            batch = self.batches.at(step, particle=key)
            shares = deal(batch.costs().tolist(), self.mesh.data.size)
            own_texts = batch.select(shares[share])
            yield particles, replace(own_texts, weight=own_texts.weight * self._temperature(step))

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

    # --- agreement ----------------------------------------------------------------------------------------------------

    def agree(self, losses: Losses, stop_requested: bool) -> tuple[Losses, bool]:
        """Return the losses of all ranks and whether any rank was asked to stop (collective: every rank).

        Raises NonFinite on all ranks, before any particle has changed: the kernel would carry one NaN to every particle.
        """
        gradients = [parameter.grad for parameter in self.updater.names if parameter.grad is not None]
        finite = all(math.isfinite(value) for value in losses.sums) and all(bool(g.isfinite().all()) for g in gradients)
        num_tasks = len(losses.sums)
        agreed = self.mesh.world.sum([float(stop_requested), float(not finite), *losses.sums, *losses.counts])
        if agreed[1]:
            self._refuse_non_finite(finite)
        return Losses(agreed[2 : 2 + num_tasks], agreed[2 + num_tasks :]), agreed[0] > 0

    def _refuse_non_finite(self, finite: bool) -> None:
        """Name the step and its rows in `bad_step.json`; collective: every rank comes here."""
        rows = [] if finite else [row for _, batch in self.work(self.step) for row in batch.row_ids]
        by_rank = {str(rank): found for rank, found in enumerate(self.mesh.world.gather_objects(rows)) if found}
        if self.run.rank == 0:
            write_json_atomic(self.run.folder / "bad_step.json", {"stage": self.name, "step": self.step, "row_ids": by_rank})
        raise NonFinite(
            f"{self.name} step {self.step}: a loss or gradient is NaN or infinite on rank(s) {', '.join(by_rank)}; no particle was "
            f"changed. The rows are in {self.run.folder / 'bad_step.json'}; lower the learning rate or set {self.stage}.clip"
        )

    # --- records ------------------------------------------------------------------------------------------------------

    def record(self, losses: Losses, progress: StepProgress) -> None:
        """Say where the stage is, and write it down when it is due (rank 0)."""
        mean = [total / count for total, count in zip(losses.sums, losses.counts, strict=True) if count]
        progress.update(self.step, f"loss {sum(mean) / len(mean):.4f}")
        if self.run.rank == 0 and (self.step % self.settings.log_every == 0 or self.step == self.settings.steps):
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
        self.best.offer(sum(values.values()) / len(values), self.step, self.method.snapshot())
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
        state |= {f"{BEST}/{name}": tensor for name, tensor in self.best.tensors.items()}
        problem = None
        if self.run.rank == 0:
            try:
                self.run.check_lock()
                self.log.flush()
                best = {"value": self.best.value if self.best.tensors else None, "step": self.best.step, "since": self.best.since}
                meta = {"fingerprint": self.fingerprint, "position": self.log.position(), "best": best, "stage": self.name}
                self.position = self.log.position()
                checkpoint.save(self.folder, self.step, state, meta)
            except StorageError as error:
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
            self.best = Selection(value, kept["step"], kept["since"], parts[BEST])
            self.step, self.position = found.step, meta["position"]
            log.info("%s: resuming at step %d", self.name, self.step)
        steps = self.mesh.world.gather_objects(self.step)
        if len(set(steps)) > 1:
            raise StorageError(f"{self.folder}: ranks see different newest checkpoints ({steps}); is the run directory shared?")
        # What follows a prelude that is over belongs to the next stage, which knows how much of it counts.
        if self.run.rank == 0 and not (self.prelude and self.step == self.settings.steps):
            self.log.cut(self.position)

    def finish(self) -> None:
        """Put back the best validated tensors, where there were validations."""
        if self.best.tensors:
            with torch.no_grad():
                self.method.restore(self.best.tensors)
