"""One stage: whose texts a rank reads, when it validates, stops and keeps what, against small independent bookkeeping."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from bpt_dist import train
from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import Axis, Mesh
from bpt_dist.errors import NonFinite, Stopped
from bpt_dist.storage.checkpoint import latest, load
from bpt_dist.storage.metrics_log import iter_records
from bpt_dist.training.accumulation import AllReduceAccumulator
from bpt_dist.training.microbatches import MicroBatch
from bpt_dist.training.stage import Selection, TrainingStage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: str = "bpt", options: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return tiny_run.load(
        folder, tiny_run.settings(world, {"name": method, **(options or {})}, output=str(folder / "runs"), **sections)
    )


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    return [record for record in list(iter_records(run / "metrics.jsonl")) if record["stage"] == stage]


# --- who reads what ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_data_axis_reads_every_text_of_a_step_once(
    num_ranks: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path)) as stage:
        whole: Any = stage.batches.at(2)
        seen: dict[tuple[str, float], list[int]] = {}
        for rank in range(num_ranks):
            stage.mesh = replace(Mesh(), data=Axis(rank, num_ranks))
            for particles, share, *_ in stage.work(2):
                for row, weight in zip(share.row_ids, share.weight, strict=True):
                    of_row = seen.setdefault((row, float(weight)), [])
                    of_row += range(particles.start, particles.stop)
    expected = {(row, float(weight)) for row, weight in zip(whole.row_ids, whole.weight, strict=True)}
    assert set(seen) == expected
    assert all(sorted(particles) == [0, 1] for particles in seen.values())


def test_particles_with_their_own_texts_read_those_of_their_place_among_all(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, options={"num_particles": 4}, source={"shared_texts": False})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        alone = [unit.batch.row_ids for unit in stage.work(0)]
        stage.mesh = replace(Mesh(), particle=Axis(1, 2))  # this rank owns particles 2 and 3
        shared = list(stage.work(0))
    assert len(alone) == 4
    assert [unit.batch.row_ids for unit in shared] == alone[2:]
    assert [unit.particles for unit in shared] == [slice(0, 1), slice(1, 2)]
    assert len({row for rows in alone for row in rows}) == sum(map(len, alone))  # a row is read by one particle only


@pytest.mark.parametrize(("exact", "shared_texts", "enough"), [(False, True, 8), (True, True, 4), (False, False, 4)])
def test_more_ranks_than_a_step_has_work_for_are_warned_of(
    exact: bool, shared_texts: bool, enough: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, source={"shared_texts": shared_texts}, distribution={"exact": exact})
    with tiny_run.stage_of(monkeypatch, config) as stage:  # two source tasks of two texts each, two particles
        stage.mesh = Mesh(data=Axis(0, enough))
        assert stage.idle_warning is None
        stage.mesh = Mesh(data=Axis(enough, enough + 1))
        assert f"1 of {enough + 1} ranks have no texts" in (stage.idle_warning or "")
        units = list(stage.work(0))
        assert all(unit.is_filler for unit in units)
        assert bool(units) is exact, "ordered passes are made together"
        assert stage.seconds == 0.0


# --- losses and selection --------------------------------------------------------------------------------------------------------


def test_losses_are_summed_by_task_over_texts_and_particles(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path)) as stage:
        batch, total = stage.batches.at(0), stage.gradients()
    weightless = replace(batch, weight=batch.weight * 0)  # annealing may begin at 0: the texts are real all the same
    for texts, is_filler in ((batch, False), (weightless, False), (batch, True)):
        total.add(MicroBatch(slice(0, 2), texts, is_filler), -torch.arange(8.0).view(2, 4))
    losses = total.close()
    losses.read()
    assert batch.task_index.tolist() == [0, 0, 1, 1]
    assert losses.sums == [2 * (0 + 1 + 4 + 5), 2 * (2 + 3 + 6 + 7)]
    assert losses.counts == [8, 8]


@pytest.mark.parametrize("pass_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_passes_are_small_enough_equally_many_on_all_ranks_and_leave_the_same_gradient(
    pass_size: int, num_ranks: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(stage: TrainingStage) -> torch.Tensor:
        stage.method.zero_grad()
        train.accumulate_gradients(stage)
        return stage.optimizer.gradients()[0].clone()

    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, options={"num_particles": 3})) as stage:
        whole = gradients(stage)
        stage.settings = stage.settings.model_copy(update={"pass_size": pass_size})
        torch.testing.assert_close(gradients(stage), whole, rtol=1e-5, atol=1e-6)
        passes = []
        for rank in range(num_ranks):
            stage.mesh = replace(Mesh(), data=Axis(rank, num_ranks))
            units = list(stage.work(0))
            assert all((unit.particles.stop - unit.particles.start) * len(unit.batch) <= pass_size for unit in units)
            passes.append(len(units))
            stage.method.backbone.synced = True
            passes.append(len(list(stage.work(0))))
            stage.method.backbone.synced = False
    # Where the backbone is sharded, ranks make passes together.
    assert len(set(passes[1::2])) == 1
    assert all(alone <= together for alone, together in zip(passes[::2], passes[1::2], strict=True)), passes


def test_the_best_validation_is_kept_and_a_tie_keeps_the_earlier() -> None:
    best = Selection()
    for step, value in enumerate([1.0, 3.0, 2.0, 3.0], 1):
        best.offer(value, step, {"step": torch.tensor(step)})
    assert (best.value, best.step, best.since, best.tensors["step"].item()) == (3.0, 2, 2, 2)


def test_validations_fall_on_their_steps_and_the_best_prompt_is_what_is_exported(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([20.0, 60.0, 40.0])
    config = configured(world, tmp_path, "prompt_tuning", target={"steps": 5}, data={"target_tasks": ["mood"]})
    snapshots = {}
    with tiny_run.stage_of(monkeypatch, config) as stage:
        stage.validate = lambda: snapshots.update({stage.step: stage.method.snapshot()}) or {"accuracy": next(values)}
        train.run_stage(stage)
        assert not torch.equal(stage.method.snapshot()["particles"], snapshots[4]["particles"])
        stage.finish()
        tiny_run.assert_same(stage.method.snapshot(), snapshots[4])
    assert sorted(snapshots) == [2, 4, 5]  # every second step and the last
    validated = [record for record in records(config.directory, "target/mood") if "target/validation/accuracy" in record["metrics"]]
    assert [(record["step"], record["metrics"]["target/validation/accuracy"]) for record in validated] == [
        (2, 20.0),
        (4, 60.0),
        (5, 40.0),
    ]


def test_patience_ends_a_stage_that_does_not_improve(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([10.0, 30.0, 30.0, 20.0, 50.0])
    target = {"steps": 5, "eval_every": 1, "patience": 2}
    config = configured(world, tmp_path, "prompt_tuning", target=target, data={"target_tasks": ["mood"]})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        stage.validate = lambda: {"accuracy": next(values)}
        train.run_stage(stage)
        assert (stage.step, stage.best.step) == (4, 2)


def test_a_run_that_validation_ended_early_says_how_many_steps_it_took(world: Path, tmp_path: Path) -> None:
    target = {"steps": 9, "eval_every": 1, "patience": 1, "lr": 1e-9}
    run = tiny_run.trained(configured(world, tmp_path, "prompt_tuning", target=target))
    entries = json.loads((run / "results.json").read_text())
    assert {(entry["steps"], entry["selected_step"]) for entry in entries} == {(2, 1)}


# --- checkpoints -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bpt", "prompt_tuning"])
def test_a_stop_request_ends_after_the_step_with_a_checkpoint_and_resumes(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"steps": 6, "checkpoint_every": 6}
    sections = {"target": {**long, "eval_every": 2}} | ({"source": long} if method == "bpt" else {})
    straight, stopped = (configured(world, tmp_path, method, name=label, **sections) for label in ("straight", "stopped"))
    with tiny_run.stage_of(monkeypatch, straight) as stage:
        train.run_stage(stage)
        expected = stage.method.snapshot()
    with tiny_run.stage_of(monkeypatch, stopped) as stage:
        update = stage.optimizer.step

        def step_and_stop(step: int) -> None:
            update(step)
            if step == 2:
                stage.watchdog.request_stop("a test")

        stage.optimizer.step = step_and_stop
        with pytest.raises(Stopped, match=r"stopped on request after .* step 4; rerun the same command to resume"):
            train.run_stage(stage)
        found = latest(stage.folder, fingerprint=stage.fingerprint, warn=print)
        assert found is not None
        assert found.step == 4  # the request came after the ranks had agreed on step 3: it is served by the next
    with tiny_run.stage_of(monkeypatch, stopped) as stage:
        assert stage.step == 4
        train.run_stage(stage)
        tiny_run.assert_same(stage.method.snapshot(), expected)
    steps = [record["step"] for record in records(stopped.directory, stage.name) if f"{stage.stage}/loss" in record["metrics"]]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_keeps_the_best_beside_the_newest(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([70.0, 10.0, 30.0])
    config = configured(world, tmp_path, "prompt_tuning", target={"steps": 4, "eval_every": 1, "checkpoint_every": 3})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        stage.validate = lambda: {"accuracy": next(values)}
        with pytest.raises(StopIteration):  # the fourth validation is cut off
            train.run_stage(stage)
        best = stage.best
    with tiny_run.stage_of(monkeypatch, config) as stage:
        assert (stage.step, stage.best.value, stage.best.step, stage.best.since) == (3, 70.0, 1, 2)
        tiny_run.assert_same(stage.best.tensors, best.tensors)
        state, meta = load(latest(stage.folder, fingerprint=stage.fingerprint, warn=print))  # type: ignore[arg-type]
    assert meta["stage"] == stage.name
    assert {key.split("/")[0] for key in state} == {"best", "trained"}


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_number_that_is_not_finite_changes_no_particle_and_names_its_rows(
    where: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, source={"log_every": 4})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        before = stage.method.snapshot()
        losses = train.accumulate_gradients(stage)
        if where == "loss":
            losses.sums[1] = float("inf")
        else:
            next(iter(stage.method.parameters())).grad[1, 0, 0] = float("nan")
        with pytest.raises(
            NonFinite, match=r"source step 0: .* on rank\(s\) 0; no particle was changed\. .*bad_step\.json.*source\.clip"
        ):
            stage.agree(losses, False)
        tiny_run.assert_same(stage.method.snapshot(), before)
        bad = json.loads((config.directory / "bad_step.json").read_text())
    assert bad == {"stage": "source", "step": 0, "row_ids": {"0": list(stage.batches.at(0).row_ids)}}


# --- weights of zero -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["linear", "tanh", "cyclic"])
def test_annealing_runs_from_the_first_step_on(kind: str, exact: bool, world: Path, tmp_path: Path) -> None:
    """The weight of every text is 0 at step 0, and with `cyclic` again at every second step: losses are logged all the same."""
    source = {"annealing": kind, "annealing_steps": 8, "steps": 9, "log_every": 1, "checkpoint_every": 9}
    config = configured(world, tmp_path, source=source, target={"steps": 0}, distribution={"exact": exact})
    folder = tiny_run.trained(config)
    losses = [record["metrics"]["source/loss"] for record in records(folder, "source")]
    assert len(losses) == 9
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize("exact", [False, True])
def test_a_text_of_weight_zero_is_blamed_for_its_nan(
    exact: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, distribution={"exact": exact})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        unit = next(stage.work(0))
        total = stage.gradients()
        texts = replace(unit.batch, weight=unit.batch.weight * 0)
        num_particles = unit.particles.stop - unit.particles.start
        total.add(unit._replace(batch=texts), torch.full((num_particles, len(texts)), torch.nan))
    losses = total.close()
    losses.read()
    assert losses.bad_rows == set(texts.row_ids)


def test_a_parameter_without_a_gradient_on_any_replica_keeps_none() -> None:
    """Replicas with other texts have gradients of other parameters; all must send the same list."""
    both, one, nobody = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    other_replica = {id(both): torch.full((2,), 3.0), id(one): torch.full((2,), 5.0)}

    class TwoReplicas(Mesh):
        def sum_over_data_(self, tensors: Any) -> None:
            *gradients, present = tensors
            for parameter, gradient in zip((both, one, nobody), gradients, strict=True):
                gradient.add_(other_replica.get(id(parameter), torch.zeros(2)))
            present.add_(torch.tensor([1.0, 1.0, 0.0]))

    both.grad = torch.ones(2)
    AllReduceAccumulator([both, one, nobody], TwoReplicas(data=Axis(0, 2)), num_tasks=1).close()
    assert both.grad.tolist() == [4.0, 4.0]
    assert one.grad is not None
    assert one.grad.tolist() == [5.0, 5.0]
    assert nobody.grad is None
