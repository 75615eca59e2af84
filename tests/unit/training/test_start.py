"""The start of a target stage: which particle it is, against the stock T5 text by text, and what stays where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bpt_dist.config import RunConfig
from bpt_dist.data.prepare import TaskData
from bpt_dist.storage import layout
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.training import start
from bpt_dist.training.start import spread


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"), layers=1)


def configured(world: Path, folder: Path, begin: str = "best", **sections: Any) -> RunConfig:
    method = {"name": "bpt", "num_particles": 4, "spread": 1.0, "sigma": 0.5, "start": begin}
    return tiny_run.load(folder, tiny_run.settings(world, method, output=str(folder), source={"steps": 1}, **sections))


def posterior(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "source" / "posterior" / "posterior.safetensors")[0]


@torch.no_grad()
def loss(path: str, task: TaskData, prompt: Tensor) -> float:
    """The mean loss of a prompt over all training rows, one at a time through the stock T5 in float64."""
    model, tokens, losses = T5ForConditionalGeneration.from_pretrained(path).double().eval(), task.train.tokens, []
    for source, target in zip(tokens.source_ids, tokens.target_ids, strict=True):
        inputs = torch.cat([prompt.double(), model.shared(torch.from_numpy(source).long())])[None]
        losses.append(float(model(inputs_embeds=inputs, labels=torch.from_numpy(target).long()[None]).loss))  # token_mean
    return sum(losses) / len(losses)


@pytest.mark.parametrize("sections", [{}, {"distribution": {"exact": True}}, {"target": {"pass_size": 3}},
                                      {"evaluation": {"predict": "ensemble", "batch_size": 5}}], ids=str)  # fmt: skip
def test_a_target_starts_from_the_particle_with_the_lowest_loss_on_its_rows(
    sections: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[TaskData] = []
    plain = start.choose_start
    monkeypatch.setattr("bpt_dist.train.choose_start", lambda run, tasks: [found.extend(tasks), plain(run, tasks)])
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, **sections), number=1) as stage:
        source, method = posterior(stage.directory.folder), stage.method
        losses = [loss(method.backbone.path, found[0], particle) for particle in source["particles"]]
        best = min(range(4), key=losses.__getitem__)
        assert sorted(losses)[1] - losses[best] > 1e-4  # else rounding would choose
        assert method.start_particle == best
        assert torch.equal(method.prompts()["mood"], source["particles"][best])
        # The prior is centred where it was, at the mean.
        distance = (source["particles"][best].double() - source["mean"].double()).square().sum()
        assert method.penalty().item() == pytest.approx(float(distance) / (2 * 0.5**2 * 32), rel=1e-5)
        if "predict" in str(sections):  # the particles of the ensemble start where they did
            assert torch.equal(method.particles[1:].detach(), source["particles"])


def test_results_say_which_particle_it_was(world: Path, tmp_path: Path) -> None:
    run = tiny_run.trained(configured(world, tmp_path))
    chosen = json.loads((run / layout.RUN).read_text())["choices"]
    entries = json.loads((run / layout.RESULTS).read_text())
    assert {entry["task"] for entry in entries} == {"mood", "count"}
    assert all(str(entry["start_particle"]) == chosen[f"start of target/{entry['task']}"] for entry in entries)


def test_results_say_which_adapted_particle_predicts(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run.trained(configured(world, tmp_path, "mean", evaluation={"predict": "best", "splits": ["validation", "test"]}))
    entries = [entry for entry in json.loads((run / layout.RESULTS).read_text()) if entry["headline"]]
    chosen = {(entry["task"], entry["predict"]): entry["chosen_particle"] for entry in entries}
    assert {name: value for name, value in chosen.items() if name[1] == "map"} == {("mood", "map"): None, ("count", "map"): None}
    for task in ("mood", "count"):
        assert f"{task}: particle {chosen[task, 'best']} of 0 to 3 has the best validation score" in caplog.text
        assert (run / "target" / task / "predictions-best.jsonl").is_file()
        assert (run / "target" / task / "predictions-validation-best.jsonl").is_file()


def test_by_default_it_starts_at_the_mean_and_nothing_is_chosen(world: Path, tmp_path: Path) -> None:
    run = tiny_run.trained(configured(world, tmp_path, "mean"))
    assert {entry["start_particle"] for entry in json.loads((run / layout.RESULTS).read_text())} == {None}
    assert not any(name.startswith("start") for name in json.loads((run / layout.RUN).read_text()).get("choices", {}))


def test_targets_trained_together_choose_by_their_mean_loss(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[TaskData] = []
    plain = start.choose_start
    monkeypatch.setattr("bpt_dist.train.choose_start", lambda run, tasks: [found.extend(tasks), plain(run, tasks)])
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, target={"joint": True}), number=1) as stage:
        source, method = posterior(stage.directory.folder), stage.method
        losses = [sum(loss(method.backbone.path, task, particle) for task in found) for particle in source["particles"]]
        assert method.start_particle == min(range(4), key=losses.__getitem__)


def test_a_resumed_run_keeps_the_choice(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(world, tmp_path)
    with tiny_run.stage_of(monkeypatch, config, number=1) as stage:
        first = stage.method.start_particle
    monkeypatch.setattr(start, "losses_of_prompts", lambda *_args, **_options: pytest.fail("measured again"))
    with tiny_run.stage_of(monkeypatch, config, number=0) as stage:  # the source stage is over
        assert stage.name == "target/mood"
        assert stage.method.start_particle == first


def test_many_rows_are_thinned_out_evenly() -> None:
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert len(set(spread(393_702, start.MOST_ROWS))) == start.MOST_ROWS
