"""THE STORY: Bayesian Prompt Tuning, Algorithm 1 of the thesis slides, and every baseline through the same loop.

A run is a source stage (where the method has one), which ends in a posterior, and a target stage for each target task, which starts
from it. Both are `run_stage`: the only loop over steps in the project.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from bpt_dist import config as configuration
from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.config import RunConfig, StageConfig
from bpt_dist.data.batches import Batches
from bpt_dist.data.prepare import TaskData
from bpt_dist.data.sampling import Sampling
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.distributed.watchdog import Watchdog
from bpt_dist.errors import Stopped
from bpt_dist.methods.base import Method, Tensors
from bpt_dist.objective import task_weights
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.log_lines import lines_of_run
from bpt_dist.tracking.mirror import shutdown
from bpt_dist.training.accumulation import Losses
from bpt_dist.training.evaluation import evaluate
from bpt_dist.training.progress import StepProgress, log_name
from bpt_dist.training.run import TrainingRun
from bpt_dist.training.shutdown import exit_job
from bpt_dist.training.stage import TrainingStage
from bpt_dist.training.start import choose_start
from bpt_dist.training.startup import open_run, start_world

log = logging.getLogger(__name__)


def run_all(
    config: RunConfig,
    *,
    rows: Sequence[str] = (),
    fresh: bool = False,
    around: Callable[[TrainingRun], AbstractContextManager[object]] = nullcontext,
) -> int:
    """Train every run of a configuration in this job, with `rows` those of the rows that it names (collective: every rank).

    `around(run)` is entered before each of them is trained. Returns the exit code.
    """
    world = World()
    try:
        world = start_world(config, rows)
        runs = configuration.expand(config, rows)
        for number, one in enumerate(runs, 1):
            stop_requested = train_run(one, world, fresh=fresh, number=f"{number}/{len(runs)} ", around=around)
            # A stop that came too late for a step of this run is meant for the next.
            if one is not runs[-1] and world.any(stop_requested):
                raise Stopped(f"stopped on request after {one.name}; rerun the same command to continue with the next run")
        if world.rank == 0 and len(runs) > 1:
            log.info("all %d runs are finished; their table: bpt-dist table %s", len(runs), config.directory)
        world.stop()
    except Exception as error:
        return exit_job(error, world)
    shutdown()
    return 0


def train_run(
    config: RunConfig,
    world: World,
    *,
    fresh: bool = False,
    number: str = "",
    guard: type[Watchdog] = Watchdog,
    around: Callable[[TrainingRun], AbstractContextManager[object]] = nullcontext,
) -> bool:
    """Open one run, train it unless it is finished, and close it (collective: every rank).

    `around(run)` is entered before training; `number` is the place of the run among those of the job, for the log; `guard` decides
    what signals and hangs do to this process. Returns whether a stop was requested that no step has seen.
    """
    with lines_of_run(number + log_name(config)), open_run(config, world, fresh=fresh, guard=guard) as run:
        if run is None:
            return False
        with around(run):
            train(run)
    return run.watchdog.stop_requested


def train(run: TrainingRun) -> None:
    """Train and evaluate one run from its latest checkpoint (collective: every rank)."""
    method, source = run.method, None
    if run.config.method.HAS_SOURCE_STAGE:
        source = source_stage(run, method)
    for targets in run.target_groups():
        target_stage(run, method, source, targets)
    run.finish()


def source_stage(run: TrainingRun, method: Method) -> Tensors:
    """Learn from the source tasks and return what the targets start from: for BPT, particles of the posterior and their mean."""
    stored = run.stored_posterior()
    if stored is not None:
        return stored.tensors
    config, tasks = run.config.source, run.source_tasks()
    mesh = run.source_mesh()
    method.begin_source([task.spec for task in tasks], mesh)
    weights = [(config.task_weights or {}).get(task.spec.name, 1.0) for task in tasks]
    batches = Batches(
        [task.train.tokens for task in tasks],
        config.batch_size,
        run.config.seed,
        tasks_per_step=config.tasks_per_step,
        task_weight=task_weights([len(task.train.tokens) for task in tasks], weights, config.likelihood_scale),
        num_particles=method.num_particles,
        sampling=Sampling.of(config),
    )
    batches = run_auxiliary_phases(run, "source", config, mesh, batches)
    stage = run.stage("source", config, mesh, batches)
    run_stage(stage)
    return run.store_posterior(Posterior(dict(method.end_source(mesh))), stage).tensors


def target_stage(run: TrainingRun, method: Method, source: Tensors | None, tasks: Sequence[TaskData]) -> None:
    """Adapt to one target task, or to several together, select on validation and evaluate on the reported splits."""
    if run.has_results(tasks):
        return
    config = run.config.target
    mesh = run.target_mesh()
    sizes, sampling = [len(task.train.tokens) for task in tasks], Sampling.of(config)
    method.target_shares = sampling.shares(sizes)
    method.begin_target(source, [task.spec for task in tasks], sizes, mesh)
    choose_start(run, tasks)
    batches = Batches(
        [task.train.tokens for task in tasks],
        config.batch_size,
        run.config.seed,
        task_weight=[1 / len(tasks)] * len(tasks),
        sampling=sampling,
    )

    def headlines() -> dict[str, float]:
        settings, values = run.evaluation, {}
        for index, task in enumerate(tasks):
            scored = evaluate(method, tasks, index, "validation", "map", settings, run.world, run.heartbeat)
            name = f"{task.spec.name}/{task.spec.headline}" if len(tasks) > 1 else task.spec.headline
            values[name] = scored.metrics[task.spec.headline]
        return values

    name = run.stage_name(tasks)
    batches = run_auxiliary_phases(run, name, config, mesh, batches)
    stage = run.stage(name, config, mesh, batches, headlines)
    run_stage(stage)
    stage.finish()
    run.store_results(tasks, stage)


def run_auxiliary_phases(run: TrainingRun, name: str, settings: StageConfig, mesh: Mesh, batches: Batches) -> Batches:
    """Train the auxiliary phases of a method before its main stage: MPT's teachers, SPoT's short prompt on the target.

    Returns the batches of the main stage, which begin after the texts the auxiliary phases have read.
    """
    for phase in run.method.auxiliary_phases():
        stage = run.auxiliary_stage(name, phase, settings, mesh, batches.of_all_tasks())
        run_stage(stage)
        run.close_auxiliary_stage(stage)
        run.method.end_auxiliary_phase(mesh)
        batches = batches.after(phase.steps)
    return batches


def run_stage(stage: TrainingStage) -> None:
    """Take the steps of one stage, resuming from its newest checkpoint (collective: every rank)."""
    stage.restore()
    settings, method, mesh, watchdog = stage.settings, stage.method, stage.mesh, stage.watchdog
    is_first, every, planned = stage.directory.rank == 0, settings.log_every, stage.planned_seconds
    with StepProgress(settings.steps, start=stage.step, every=every, enabled=is_first, planned=planned) as progress:
        while stage.step < settings.steps and not stage.converged:
            method.begin_step(mesh)
            losses, stop, usable = stage.agree(accumulate_gradients(stage), watchdog.stop_requested)  # before anything changes
            fault_point("step.before_update", step=stage.step, stage=stage.name)
            if usable:
                stage.compare()  # where the step is recorded: for BPT, the loss at the mean of the particles
                method.precondition_(mesh)  # for BPT: gradients become minus the Stein direction
                stage.optimizer.step(stage.step)
            stage.optimizer.zero_grad()
            stage.step += 1
            fault_point("step.after_update", step=stage.step, stage=stage.name)
            stage.record(losses, progress)
            if stage.validation_due:
                stage.select()
            due = stage.step % settings.checkpoint_every == 0 or stage.step == settings.steps
            if stop or due or stage.converged:
                stage.save()
            if stop:
                raise Stopped(f"stopped on request after {stage.name} step {stage.step}; rerun the same command to resume")
            watchdog.start_step_timeout()
            mesh.world.shorten_timeout(watchdog.step_timeout)


def accumulate_gradients(stage: TrainingStage) -> Losses:
    """Leave in `.grad` the gradient of the step's objective for this rank's particles, whole on every replica."""
    total = stage.gradients()
    for unit in stage.work(stage.step):
        stage.heartbeat()
        fault_point("step.before_forward", step=stage.step, stage=stage.name)
        with stage.memory_for(unit):
            forward = stage.method(unit.batch, unit.particles)  # log-likelihood [m, N] through the frozen backbone
            stage.optimizer.backward(stage.method.loss(forward, unit.batch))
        total.add(unit, forward.log_likelihood)
    losses = total.close()
    if fault_point("step.after_backward", step=stage.step, stage=stage.name):
        stage.optimizer.gradients()[0].view(-1)[0] = math.nan
    # The prior counts once: it is added after the sum over texts, alike on all replicas.
    penalty = stage.method.penalty()
    if penalty is not None:
        penalty.backward()
    return losses
