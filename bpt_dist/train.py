"""THE STORY: Bayesian Prompt Tuning, Algorithm 1 of the thesis slides, and every baseline through the same loop.

A run is a source stage (where the method has one), which ends in a posterior, and a target stage for each target task, which starts
from it. Both are `run_stage`: the only loop over steps in the project.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from bpt_dist import config as configuration
from bpt_dist.config import Config, Stage
from bpt_dist.data.batches import Batches, Sampling
from bpt_dist.data.prepared import TaskData
from bpt_dist.errors import Stopped
from bpt_dist.evaluate import evaluate
from bpt_dist.faults import fault_point
from bpt_dist.gradients import Losses
from bpt_dist.mesh import Mesh, World
from bpt_dist.methods.base import Method, Tensors
from bpt_dist.mirror import shutdown
from bpt_dist.objective import task_weights
from bpt_dist.opening import leave, opened
from bpt_dist.posterior import Posterior
from bpt_dist.progress import StepProgress
from bpt_dist.session import Session
from bpt_dist.stage import StageRun

log = logging.getLogger(__name__)


def run_all(config: Config, *, fresh: bool = False) -> int:
    """Train every run of a configuration in this job and return the exit code (collective: every rank)."""
    world = World()
    try:
        limits, job = config.distribution, f"{configuration.fingerprint(config)} {config.directory}"
        world = World.start(limits.startup_timeout, limits.expect_world_size, job)
        runs = configuration.expand(config)
        for one in runs:
            with opened(one, world, fresh=fresh) as session:
                if session is not None:
                    train(session)
            # What came too late for a step of this run is meant for the next.
            if session is not None and one is not runs[-1] and world.any(session.guard.stop_requested):
                raise Stopped(f"stopped on request after {one.name}; the same command goes on with the next run")
        world.stop()
    except Exception as error:
        return leave(error, world)
    shutdown()
    return 0


def train(session: Session) -> None:
    """Train and evaluate one run from wherever it stands (collective: every rank)."""
    method, source = session.method, None
    if session.config.method.HAS_SOURCE_STAGE:
        source = source_stage(session, method)
    for targets in session.target_groups():
        target_stage(session, method, source, targets)
    session.finish()


def source_stage(session: Session, method: Method) -> Tensors:
    """Learn from the source tasks and return what the targets start from: for BPT, particles of the posterior and their mean."""
    stored = session.stored_posterior()
    if stored is not None:
        return stored.tensors
    config, tasks = session.config.source, session.source_tasks()
    mesh = session.source_mesh()
    method.begin_source([task.spec for task in tasks], mesh)
    weights = [(config.task_weights or {}).get(task.spec.name, 1.0) for task in tasks]
    batches = Batches(
        [task.train.tokens for task in tasks],
        config.batch_size,
        session.config.seed,
        tasks_per_step=config.tasks_per_step,
        task_weight=task_weights([len(task.train.tokens) for task in tasks], weights, config.likelihood_scale),
        num_particles=method.num_particles,
        sampling=Sampling.of(config),
    )
    batches = run_preludes(session, "source", config, mesh, batches)
    stage = session.stage("source", config, mesh, batches)
    run_stage(stage)
    return session.store_posterior(Posterior(dict(method.end_source(mesh))), stage).tensors


def target_stage(session: Session, method: Method, source: Tensors | None, tasks: Sequence[TaskData]) -> None:
    """Adapt to one target task, or to several together, select on validation and evaluate on the reported splits."""
    if session.has_results(tasks):
        return
    config = session.config.target
    mesh = session.target_mesh()
    sizes, sampling = [len(task.train.tokens) for task in tasks], Sampling.of(config)
    method.target_shares = sampling.shares(sizes)
    method.begin_target(source, [task.spec for task in tasks], sizes, mesh)
    batches = Batches(
        [task.train.tokens for task in tasks],
        config.batch_size,
        session.config.seed,
        task_weight=[1 / len(tasks)] * len(tasks),
        sampling=sampling,
    )

    def headlines() -> dict[str, float]:
        settings, values = session.evaluation, {}
        for index, task in enumerate(tasks):
            found = evaluate(method, tasks, index, "validation", "map", settings, session.world, session.beat)
            name = f"{task.spec.name}/{task.spec.headline}" if len(tasks) > 1 else task.spec.headline
            values[name] = found.metrics[task.spec.headline]
        return values

    name = session.stage_name(tasks)
    batches = run_preludes(session, name, config, mesh, batches)
    stage = session.stage(name, config, mesh, batches, headlines)
    run_stage(stage)
    stage.finish()
    session.store_results(tasks, stage)


def run_preludes(session: Session, name: str, settings: Stage, mesh: Mesh, batches: Batches) -> Batches:
    """Train what the method wants to know before its main stage: MPT's teachers, SPoT's short prompt on the target.

    Returns the batches of the main stage, which go on behind the texts the preludes have read.
    """
    for prelude in session.method.preludes():
        stage = session.prelude(name, prelude, settings, mesh, batches.of_all_tasks())
        run_stage(stage)
        session.close_prelude(stage)
        session.method.end_prelude(mesh)
        batches = batches.after(prelude.steps)
    return batches


def run_stage(stage: StageRun) -> None:
    """Take the steps of one stage, resuming from its newest checkpoint (collective: every rank)."""
    stage.restore()
    settings, method, mesh, guard = stage.settings, stage.method, stage.mesh, stage.guard
    with StepProgress(
        stage.name, settings.steps, start=stage.step, every=settings.log_every, enabled=stage.run.rank == 0
    ) as progress:
        while stage.step < settings.steps and not stage.converged:
            method.begin_step(mesh)
            losses, stop, usable = stage.agree(accumulate_gradients(stage), guard.stop_requested)  # before anything changes
            fault_point("step.before_update", step=stage.step, stage=stage.name)
            if usable:
                method.precondition_(mesh)  # for BPT: gradients become minus the Stein direction
                stage.updater.step(stage.step)
            stage.updater.zero_grad()
            stage.step += 1
            fault_point("step.after_update", step=stage.step, stage=stage.name)
            stage.record(losses, progress)
            if stage.validation_due:
                stage.select()
            due = stage.step % settings.checkpoint_every == 0 or stage.step == settings.steps
            if stop or due or stage.converged:
                stage.save()
            if stop:
                raise Stopped(f"stopped on request after {stage.name} step {stage.step}; the same command resumes")
            guard.steady()
            mesh.world.settle(guard.step_timeout)


def accumulate_gradients(stage: StageRun) -> Losses:
    """Leave in `.grad` the gradient of the step's objective for this rank's particles, whole on every replica."""
    total = stage.gradients()
    for unit in stage.work(stage.step):
        stage.beat()
        fault_point("step.before_forward", step=stage.step, stage=stage.name)
        with stage.memory_for(unit):
            forward = stage.method(unit.batch, unit.particles)  # log-likelihood [m, N] through the frozen T5
            stage.updater.backward(stage.method.loss(forward, unit.batch))
        total.add(unit, forward.log_likelihood)
    losses = total.close()
    if fault_point("step.after_backward", step=stage.step, stage=stage.name):
        stage.updater.gradients()[0].view(-1)[0] = math.nan
    # The prior counts once: it is added after the sum over texts, alike on all replicas.
    penalty = stage.method.penalty()
    if penalty is not None:
        penalty.backward()
    return losses
