"""The loss of prompts that are not trained: against the texts one by one in float64, and what measuring them may not change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor

from bpt_dist import train
from bpt_dist.storage import layout
from bpt_dist.storage.metrics_log import iter_records
from bpt_dist.training.comparison import mean_of_tasks
from bpt_dist.training.stage import TrainingStage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"), layers=1)


def bpt(world: Path, folder: Path, **sections: Any) -> Any:
    method = {"name": "bpt", "num_particles": 3, "spread": 0.5, **sections.pop("method", {})}
    return tiny_run.load(folder, tiny_run.settings(world, method, output=str(folder), **sections))


@torch.no_grad()
def loss_by_text(stage: TrainingStage, prompt: Tensor, particle: int | None = None) -> dict[str, list[float]]:
    """Minus the log-likelihood of each text of the first step under one prompt, by the stock model in float64, by task."""
    model, found = stage.method.backbone.model.double(), {}
    batch = stage.batches.at(0, particle=particle)
    for n in range(len(batch)):
        text = batch.select([n])
        inputs = torch.cat([prompt.double()[None], model.shared(text.source_ids)], dim=1)
        logits = model(inputs_embeds=inputs, decoder_input_ids=model._shift_right(text.target_ids)).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, text.target_ids[0])  # token_mean
        found.setdefault(stage.task_names[int(text.task_index)], []).append(float(loss))
    model.float()
    return found


@pytest.mark.parametrize("sections", [{}, {"source": {"shared_texts": False}}, {"distribution": {"exact": True}},
                                      {"source": {"pass_size": 1}}], ids=str)  # fmt: skip
def test_the_loss_at_the_mean_is_that_of_the_texts_of_the_step(
    sections: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny_run.stage_of(monkeypatch, bpt(world, tmp_path, **sections)) as stage, torch.no_grad():
        stage.compare()
        mean = stage.method.particles.mean(0)
        by_task: dict[str, list[float]] = {}
        for particle in range(3) if "shared_texts" in str(sections) else [None]:
            for task, losses in loss_by_text(stage, mean, particle).items():
                by_task.setdefault(task, []).extend(losses)
        expected = sum(sum(losses) / len(losses) for losses in by_task.values()) / len(by_task)
        assert stage.compared == {"svgd/loss_at_mean": pytest.approx(expected, rel=1e-5)}


def test_measuring_leaves_the_run_as_it_is_but_for_the_records(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient, no random number, nothing of the next step depends on it."""
    measured = tiny_run.trained(bpt(world, tmp_path, name="measured"))
    monkeypatch.setattr(TrainingStage, "compare", lambda stage: None)
    plain = tiny_run.trained(bpt(world, tmp_path, name="plain"))
    for file in ("source/posterior/posterior.safetensors", "target/mood/adapter/adapter_model.safetensors"):
        assert (measured / file).read_bytes() == (plain / file).read_bytes(), file
    found, expected = (
        [
            {name: value for name, value in record["metrics"].items() if "/cost/" not in name}
            for record in iter_records(run / layout.METRICS)
        ]
        for run in (measured, plain)
    )
    assert all(record.pop("svgd/loss_at_mean") > 0 for record in found if "source/loss" in record)
    assert found == expected


def test_nothing_is_computed_in_steps_without_a_record(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first step always has one: it shows the particles before anything has moved them."""
    asked: list[int] = []
    with tiny_run.stage_of(monkeypatch, bpt(world, tmp_path, source={"steps": 7, "log_every": 3})) as stage:
        start, plain = stage.method.particles.detach().clone(), stage.method.comparison
        monkeypatch.setattr(stage.method, "comparison", lambda mesh: [asked.append(stage.step), plain(mesh)][1])
        train.run_stage(stage)
        records = [record for record in iter_records(stage.directory.folder / layout.METRICS) if record["stage"] == "source"]
        axes = stage.method._projection_axes().flatten(0, 1)
    assert [record["step"] for record in records] == [1, 3, 6, 7]
    assert asked == [0, 2, 5, 6]
    torch.testing.assert_close(torch.tensor(records[0]["particles"]["projection"]), start.flatten(1) @ axes, rtol=1e-5, atol=1e-5)
    assert records[0]["metrics"]["svgd/norm_of_mean"] == pytest.approx(float(start.mean(0).norm()), rel=1e-5)


def test_one_particle_and_methods_without_particles_compare_nothing(world: Path, tmp_path: Path) -> None:
    for name, method in (("one", {"name": "bpt", "num_particles": 1}), ("vanilla", {"name": "vanilla_transfer"})):
        plain = tiny_run.settings(world, method, output=str(tmp_path))
        run = tiny_run.trained(tiny_run.load(tmp_path, {**plain, "name": name}))
        assert not any("svgd/loss_at_mean" in record["metrics"] for record in iter_records(run / layout.METRICS))


def test_a_task_without_texts_counts_nothing() -> None:
    assert mean_of_tasks([2.0, math.nan, 4.0]) == 3.0
    assert math.isnan(mean_of_tasks([math.nan]))


def test_the_last_loss_at_the_mean_belongs_to_the_particles_before_the_last_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bpt(world, tmp_path, source={"steps": 1})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        before = sum(map(sum, loss_by_text(stage, stage.method.particles.mean(0)).values()))
        train.run_stage(stage)
        (record,) = [record for record in iter_records(stage.directory.folder / layout.METRICS) if record["stage"] == "source"]
    assert record["metrics"]["svgd/loss_at_mean"] == pytest.approx(before / 4, rel=1e-5)  # two tasks of two texts
