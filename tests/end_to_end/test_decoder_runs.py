"""Whole runs on a tiny decoder-only model: transfer through a posterior, every method, what they leave, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_decoder
import tiny_run
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.backbones import loading
from bpt_dist.commands.eval import evaluate_stored
from bpt_dist.commands.main import main
from bpt_dist.config.method_source import method_names
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import method_class
from bpt_dist.training.startup import open_run

WITHOUT_ENCODER = [name for name in method_names() if method_class(name).needs_encoder is None]
WITH_ENCODER = sorted(set(method_names()) - set(WITHOUT_ENCODER))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_decoder.make(folder / "decoder", "gemma3_text")
    tiny_run.write_tasks(folder / "tasks")
    return folder


def settings(world: Path, method: dict[str, Any], **sections: Any) -> dict[str, Any]:
    backbone = {"path": str(world / "decoder"), **sections.pop("backbone", {})}
    return tiny_run.settings(world, method, backbone=backbone, **sections)


def results(folder: Path) -> dict[tuple[str, str, str], float]:
    return {(e["task"], e["split"], e["metric"]): e["value"] for e in json.loads((folder / "results.json").read_text())}


@pytest.mark.parametrize("name", WITHOUT_ENCODER)
def test_a_method_trains_evaluates_and_is_evaluated_again(world: Path, name: str) -> None:
    """A second evaluation from what was stored gives the scores of the run."""
    config = tiny_run.load(world, settings(world, {"name": name}, name=f"run-{name}"))
    before = loading.load(str(world / "decoder"))
    folder = tiny_run.trained(config)
    found = results(folder)
    assert {task for task, _, _ in found} == {"mood", "count"}
    exported = folder / "target" / "mood" / "adapter"
    stored = exported if (exported / "adapter_config.json").is_file() else folder / "target" / "mood" / "weights"
    evaluated, _ = evaluate_stored(stored, config, "mood", "validation")
    for metric, value in evaluated.metrics.items():
        if ("mood", "validation", metric) in found:
            assert value == pytest.approx(found["mood", "validation", metric], rel=1e-4), metric
    before.verify_unchanged()


def test_particles_move_apart_from_their_start_and_targets_start_from_them(world: Path) -> None:
    """The whole way of the method, with an export that PEFT reads."""
    config = tiny_run.load(world, settings(world, {"name": "bpt"}, name="posterior"))
    folder = tiny_run.trained(config)
    backbone = loading.load(str(world / "decoder"))
    particles = Posterior.load(folder, backbone).tensors["particles"]
    assert particles.shape == (2, 3, tiny_decoder.WIDTH)
    assert float((particles[0] - particles[1]).norm()) > 0
    adapter = folder / "target" / "mood" / "adapter"
    prompt = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    model = PeftModel.from_pretrained(tiny_decoder.stock(world / "decoder"), adapter).eval()
    source, target = torch.tensor([[3, 9, 30, 55]]), torch.tensor([[17, 40, 1]])
    logits = model(input_ids=torch.cat([source, target], dim=1)).logits[0, -4:-1]
    texts = SimpleNamespace(source_ids=source, source_mask=torch.ones_like(source), target_ids=target)
    ours = backbone.log_likelihood(texts, lambda embeds: torch.cat([prompt[None], embeds], dim=1)[None], "token_sum")
    torch.testing.assert_close(ours.logits[0, 0], logits, rtol=1e-5, atol=1e-5)


def test_both_passes_learn_the_same(world: Path) -> None:
    """Prompts after a few steps differ by rounding only, whichever pass has read the texts, and where layers are computed again."""
    learnt = {}
    for name, forward, again in (("auto", "auto", False), ("stock", "stock", False), ("again", "auto", True)):
        config = tiny_run.load(
            world,
            settings(world, {"name": "bpt"}, name=f"pass-{name}", backbone={"forward": forward},
                     source={"optimizer": "sgd", "lr": 0.05}, target={"optimizer": "sgd"},
                     distribution={"activation_checkpointing": again}),
        )  # fmt: skip
        learnt[name] = load_file(tiny_run.trained(config) / "source" / "posterior" / "posterior.safetensors")["particles"]
    for found in learnt.values():
        torch.testing.assert_close(found, learnt["stock"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_a_method_that_needs_an_encoder_is_refused_before_training(world: Path, name: str) -> None:
    config = tiny_run.load(world, settings(world, {"name": name}, name=f"refused-{name}"))
    with (
        pytest.raises(ConfigError, match=f"^method.name: {name} writes .* has no encoder; choose another method, or a backbone of"),
        open_run(config, tiny_run.World()),
    ):
        pytest.fail("the run was opened")


def test_a_text_longer_than_the_positions_is_refused_before_training(tmp_path: Path) -> None:
    tiny_decoder.make(tmp_path / "decoder", max_position_embeddings=9)
    tiny_run.write_tasks(tmp_path / "tasks")
    config = tiny_run.load(tmp_path, settings(tmp_path, {"name": "prompt_tuning"}))
    message = r"^data.max_source_length: a text of task 'mood' \(train\) has .* tokens, which with 3 prompt positions .* has 9; set"
    with pytest.raises(ConfigError, match=message), open_run(config, tiny_run.World()):
        pytest.fail("the run was opened")


def test_layers_of_another_family_are_refused_by_name(world: Path) -> None:
    config = tiny_run.load(world, settings(world, {"name": "lora", "targets": ["encdecattention_q"]}, name="layers"))
    with pytest.raises(ConfigError, match=r"no layer of this backbone matches encdecattention_q; its layers are called .*q_proj"):
        tiny_run.trained(config)


def test_an_export_says_how_a_decoder_only_model_is_loaded(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run.load(world, settings(world, {"name": "vanilla_transfer"}, name="exported"))
    folder = tiny_run.trained(config)
    capsys.readouterr()
    assert main(["export", str(folder), "--task", "mood", "--out", str(folder / "out")]) == 0
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
