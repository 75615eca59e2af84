"""MPT: its prompts against PEFT's, its distillation against the stock T5 in float64, one unpadded text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from peft import MultitaskPromptTuningConfig, TaskType
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding
from torch import Tensor
from torch.nn import functional
from transformers import T5ForConditionalGeneration

from bpt_dist.backbones.t5.shapes import shape_of
from bpt_dist.commands.plan.estimate import estimate
from bpt_dist.commands.plan.stages import lengths
from bpt_dist.config import RunConfig
from bpt_dist.data.prepare import specs
from bpt_dist.data.tokens import PAD_ID
from bpt_dist.storage.checkpoint import latest, load, read_tensors
from bpt_dist.tasks import catalogue


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, options: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    plain = tiny_run.settings(world, {"name": "mpt", **(options or {})}, output=str(folder / "runs"), **sections)
    return tiny_run.load(folder, plain)


def scattered(method: Any) -> Any:
    """The method with student and teachers away from their starts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return method


def test_the_prompts_are_those_of_peft(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, target={"joint": True}), 2) as stage:
        method, batch = scattered(stage.method), stage.batches.at(0)
        options = MultitaskPromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=3,
            token_dim=32,
            num_tasks=2,
            num_ranks=1,
            num_transformer_submodules=1,
        )
        theirs = MultitaskPromptEmbedding(options, method.backbone.model.shared)
        theirs.load_state_dict({
            "embedding.weight": method.full, "prefix_task_cols": method.u.mT, "prefix_task_rows": method.v,
        })  # fmt: skip
        indices = torch.arange(3).expand(len(batch), -1)
        with torch.no_grad():
            expected = theirs(indices, batch.task_index)
            found = method.input_embeds(method.backbone.model.shared(batch.source_ids), batch)[0, :, :3]
            exported = method.prompts()
        assert set(batch.task_index.tolist()) == {0, 1}
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(exported["count"], theirs(torch.arange(3)[None], torch.tensor([1]))[0])


class Reference:
    """The stock T5 in float64 under one prompt and one unpadded text."""

    def __init__(self, path: str) -> None:
        self.model = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float64).eval()

    def __call__(self, prompt: Tensor, source: Tensor, target: Tensor) -> Any:
        embeds = torch.cat([prompt.detach().double(), self.model.shared(source)])[None]
        return self.model(inputs_embeds=embeds, labels=target[None], output_hidden_states=True)


@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
def test_the_source_loss_is_that_of_the_paper(reduction: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L = CE + lambda (KL(teacher || student) + MSE of the encoder's + MSE of the decoder's last states)."""
    data = {"source_tasks": ["mood", "colour"]}
    config = configured(world, tmp_path, {"distillation": 0.7}, reduction=reduction, data=data)
    with tiny_run.stage_of(monkeypatch, config, 1) as stage, torch.no_grad():
        assert stage.name == "source"
        method, batch = scattered(stage.method), stage.batches.at(0)
        found = float(method.loss(method(batch), batch))
        reference, expected = Reference(method.backbone.path), 0.0
        for n in range(len(batch)):
            source, target = batch.source_ids[n, batch.source_mask[n] == 1], batch.target_ids[n, batch.target_ids[n] >= 0]
            k = int(batch.task_index[n])
            student = reference(method.full * torch.outer(method.u[k, 0], method.v[k, 0]), source, target)
            teacher = reference(method.teachers[k], source, target)
            divergence = functional.kl_div(
                student.logits[0].log_softmax(-1), teacher.logits[0].log_softmax(-1), log_target=True, reduction="batchmean"
            )
            tokens = len(target) if reduction == "token_sum" else 1
            encoder = functional.mse_loss(student.encoder_last_hidden_state, teacher.encoder_last_hidden_state)
            decoder = functional.mse_loss(student.decoder_hidden_states[-1], teacher.decoder_hidden_states[-1])
            one = tokens * student.loss + 0.7 * (tokens * divergence + encoder + decoder)
            expected += float(batch.weight[n] * one)
        assert min(float(divergence), float(encoder), float(decoder)) > 1e-3
    assert bool((batch.source_ids == PAD_ID).any())
    assert bool((batch.target_ids < 0).any())
    assert found == pytest.approx(expected, rel=1e-4)


def test_teachers_are_trained_first_and_then_left_alone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(world, tmp_path)
    with tiny_run.stage_of(monkeypatch, config, 1) as stage:
        last = latest(config.directory / "source" / "teachers" / "checkpoints", fingerprint=None, warn=pytest.fail)
        assert last is not None
        taught = load(last)[0]["trained/task_prompts/value"]
        assert not torch.equal(taught[0], taught[1])
        batch = stage.batches.at(0)
        stage.method.loss(stage.method(batch), batch).backward()
        stage.optimizer.step(0)
        assert torch.equal(stage.method.teachers, taught)
        assert set(stage.method.snapshot()) == {"full", "u", "v"}


def test_teachers_see_their_own_task_at_every_step_whatever_the_student_draws(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that got no gradient in a step would still be moved by AdamW's moments: no longer a prompt tuning of its task."""
    for number, source in enumerate(({"sampling": "temperature"}, {"tasks_per_step": 1})):
        config = configured(world, tmp_path, source=source, name=f"run{number}")
        with tiny_run.stage_of(monkeypatch, config) as stage:
            assert stage.name == "source/teachers"
            assert [stage.batches.at(step).task_index.bincount().tolist() for step in range(3)] == [[2, 2]] * 3
            teachers = {row for step in range(3) for row in stage.batches.at(step).row_ids}
        with tiny_run.stage_of(monkeypatch, config, 1) as stage:
            assert stage.name == "source"
            drawn = [stage.batches.at(step) for step in range(4)]
            assert {len(set(batch.task_index.tolist())) for batch in drawn} == {1}
            assert not teachers & {row for batch in drawn for row in batch.row_ids}


def test_the_teachers_pass_is_in_the_plan(world: Path, tmp_path: Path) -> None:
    """Beside the forward and backward pass of the student, a forward pass of each text."""
    found = {}
    for weight in (0.9, 0.0):
        plain = tiny_run.settings(world, {"name": "mpt", "distillation": weight})
        plain["method"] = {key: value for key, value in plain["method"].items() if weight or key != "teacher_steps"}
        config = tiny_run.load(tmp_path, plain)
        found[weight] = {stage.name: stage for stage in estimate(config, 1).stages}
    shape = shape_of(str(world / "t5"))
    costs = [shape.row_cost(3, *lengths(catalogue.get(name, specs(config.data)), config)) for name in ("colour", "truth")]
    more = found[0.9]["source"].flops - found[0.0]["source"].flops
    assert more == 2 * sum(cost.forward_flops for cost in costs) > 0
    assert found[0.9]["target/mood"].flops == found[0.0]["target/mood"].flops
    assert found[0.9]["source/teachers"].flops == found[0.0]["source"].flops


def test_without_distillation_there_are_no_teachers(world: Path, tmp_path: Path) -> None:
    plain = tiny_run.settings(world, {"name": "mpt", "distillation": 0}, output=str(tmp_path / "runs"))
    del plain["method"]["teacher_steps"]
    run = tiny_run.trained(tiny_run.load(tmp_path, plain))
    assert not (run / "source" / "teachers").exists()
    assert (run / "results.json").is_file()


def test_targets_start_at_the_shared_prompt_and_the_mean_factors(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, target={"joint": True})
    with tiny_run.stage_of(monkeypatch, config, 2) as stage:
        found = stage.method.snapshot()
    source, _ = read_tensors(config.directory / "source" / "posterior" / "posterior.safetensors")
    assert source["u"].shape == (2, 1, 3)
    assert not torch.equal(source["u"][0], source["u"][1])
    assert torch.equal(found["full"], source["full"])
    for name in ("u", "v"):
        torch.testing.assert_close(found[name], ((source[name][0] + source[name][1]) / 2).expand_as(found[name]))


def test_shared_prompt_and_factors_have_their_own_learning_rates(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first step is the learning rate in the direction of the gradient's sign."""
    config = configured(world, tmp_path, {"lr_full": 0.2, "lr_low_rank": 0.05}, target={"schedule": "constant"})
    with tiny_run.stage_of(monkeypatch, config, 2) as stage:
        method, batch = stage.method, stage.batches.at(0)
        before = method.snapshot()
        method.loss(method(batch), batch).backward()
        stage.optimizer.step(0)
        moved = {name: float((tensor - before[name]).abs().median()) for name, tensor in method.snapshot().items()}
    assert moved == pytest.approx({"full": 0.2, "u": 0.05, "v": 0.05}, rel=1e-3)
