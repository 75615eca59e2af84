"""Plans on decoder-only models against the real thing: a counted pass that reads each prompt once, a trained run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import tiny_run
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bpt_dist import config as configuration
from bpt_dist.backbones import loading
from bpt_dist.backbones.loading import shape_of
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.commands.main import main
from bpt_dist.commands.plan.estimate import Plan, estimate
from bpt_dist.commands.plan.stages import StagePlan
from bpt_dist.config import DistributionConfig
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import method_class
from bpt_dist.training.sharding import placement

NUM_PROMPT, NUM_SOURCE, NUM_TARGET = 5, 11, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.world(tmp_path_factory.mktemp("world"), "llama")


def stage(found: Plan, name: str) -> StagePlan:
    (chosen,) = [each for each in found.stages if each.name == name]
    return chosen


def texts(number: int) -> Batch:
    ids = torch.randint(3, 100, (number, NUM_SOURCE), generator=torch.Generator().manual_seed(0))
    tasks = torch.zeros(number, dtype=torch.long)
    return Batch(0, ids, torch.ones_like(ids), ids[:, :NUM_TARGET], tasks, ("row",) * number, torch.ones(number))


def counted(folder: Path, prompts: Tensor, number: int, *, packed: bool, recomputed: bool = False) -> tuple[int, int, int]:
    """Return the FLOPs of a real pass, forward and in all, and the bytes it keeps for the backward pass."""
    backbone = loading.load(str(folder), attention="eager")
    placement.place(backbone, DistributionConfig(activation_checkpointing=recomputed), World())
    if packed:
        backbone.use_packed_pass("eager")
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    prompts = prompts.requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward = backbone.log_likelihood(texts(number), lambda embeds: prepend(prompts, embeds), "token_mean")
        flops = counter.get_total_flops()
        forward.log_likelihood.sum().backward()
    return flops, counter.get_total_flops(), sum(kept[pointer] for pointer in kept.keys() - weights)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3"])
def test_parameters_and_passes_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    """Two particles and three texts: each prompt is paid for once where our own pass reads it, with every text elsewhere."""
    folder = tiny_decoder.make(tmp_path, family)
    shape, prompts = shape_of(str(folder)), torch.randn(2, NUM_PROMPT, tiny_decoder.WIDTH)
    assert shape.num_parameters == sum(weight.numel() for weight in loading.load(str(folder)).model.parameters())
    forward, both, kept = counted(folder, prompts, 3, packed=False)
    row = shape.row_cost(NUM_PROMPT, NUM_SOURCE, NUM_TARGET)
    assert (6 * row.forward_flops, 6 * row.flops) == (forward, both)
    assert 6 * row.activation_bytes == pytest.approx(kept, rel=0.2)
    forward, both, kept = counted(folder, prompts, 3, packed=True)
    prompt, text = shape.shared_costs(NUM_PROMPT, NUM_SOURCE, NUM_TARGET)
    assert (2 * prompt.forward_flops + 6 * text.forward_flops, 2 * prompt.flops + 6 * text.flops) == (forward, both)
    assert 2 * prompt.activation_bytes + 6 * text.activation_bytes == pytest.approx(kept, rel=0.2)
    again, both_again, _ = counted(folder, prompts, 3, packed=True, recomputed=True)
    prompt, text = shape.shared_costs(NUM_PROMPT, NUM_SOURCE, NUM_TARGET, recomputed=True)
    assert 2 * prompt.forward_flops + 6 * text.forward_flops == again == forward
    # A block is run again up to the last product whose result the backward pass needs.
    assert 2 * prompt.flops + 6 * text.flops == pytest.approx(both_again, rel=0.1)
    assert both_again > 1.2 * both


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("./smollm2-135m", 134_515_008), ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120), ("google/gemma-3-270m", 268_098_176),
     ("meta-llama/Llama-3.2-1B", 1_235_814_400)],
)  # fmt: skip
def test_models_that_our_files_name_are_known_before_they_are_here(name: str, parameters: int) -> None:
    assert shape_of(name, ask_hub=False).num_parameters == parameters


def configured(world: Path, tmp_path: Path, method: dict[str, Any], **sections: Any) -> Any:
    return tiny_run.load(tmp_path, tiny_decoder.settings(world, method, **sections))


def test_a_trained_run_has_the_planned_sizes(world: Path, tmp_path: Path) -> None:
    config = configured(world, tmp_path, {"name": "bpt"}, output=str(tmp_path / "runs"))
    found = estimate(config, 1)
    folder = tiny_run.trained(config)
    for entry in json.loads((folder / "results.json").read_text()):
        assert stage(found, entry["stage"]).trainable_parameters == entry["trainable_parameters"]


@pytest.mark.parametrize("name", configuration.method_names())
def test_every_method_is_planned_or_refused_as_in_training(world: Path, tmp_path: Path, name: str) -> None:
    config = configured(world, tmp_path, {"name": name})
    if method_class(name).needs_encoder is not None:
        with pytest.raises(ConfigError, match=f"method.name: {name} .* has no encoder; choose another method"):
            estimate(config, 1)
        return
    found = estimate(config, 1)
    assert all(each.trainable_parameters > 0 and each.flops > 0 for each in found.stages)
    if config.method.TRAINS_BACKBONE:
        assert found.stages[0].trainable_parameters == found.num_parameters


def test_a_run_that_recomputes_blocks_still_reads_a_prompt_once(world: Path, tmp_path: Path) -> None:
    def source(**sections: Any) -> StagePlan:
        return stage(estimate(configured(world, tmp_path, {"name": "bpt"}, **sections), 1), "source")

    again = {"distribution": {"activation_checkpointing": True}}
    kept, recomputed, stock = source(), source(**again), source(**again, backbone={"forward": "stock"})
    assert kept.flops < recomputed.flops < stock.flops
    assert recomputed.activation_bytes < kept.activation_bytes


def shape_in(world: Path) -> ModelShape:
    return shape_of(str(world / "decoder"))


def test_a_prompt_is_counted_once_a_pass(world: Path, tmp_path: Path) -> None:
    """Two particles read four texts in one pass; by transformers' modules each text reads its prompt again."""
    shared = configured(world, tmp_path, {"name": "bpt"}, source={"batch_size": 2})
    stock = configured(world, tmp_path, {"name": "bpt"}, source={"batch_size": 2}, backbone={"forward": "stock"})
    once, again = (stage(estimate(config, 1), "source") for config in (shared, stock))
    assert once.passes_per_step == again.passes_per_step == 1
    assert once.flops < again.flops
    assert once.activation_bytes < again.activation_bytes
    halves = configured(world, tmp_path, {"name": "bpt"}, source={"batch_size": 2, "pass_size": 4})
    apart = stage(estimate(halves, 1), "source")
    assert apart.passes_per_step == 2
    prompt, _ = shape_in(world).shared_costs(3, 1, 1)
    assert apart.flops - once.flops == 2 * prompt.flops, "two more readings of three positions"


def test_what_is_inserted_is_read_by_the_stock_pass(world: Path, tmp_path: Path) -> None:
    """Layers with something inserted are not those of our own pass, whatever the configuration says."""
    auto = configured(world, tmp_path, {"name": "lora"})
    stock = configured(world, tmp_path, {"name": "lora"}, backbone={"forward": "stock"})
    assert estimate(auto, 1).stages[0].flops == estimate(stock, 1).stages[0].flops


def most_at_once(work: Any) -> int:
    """The most bytes that `work` has allocated at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("vocabulary", "inner"), [(128, 48), (128, 384), (8192, 48)])
def test_the_memory_of_an_evaluation_is_what_it_takes(tmp_path: Path, vocabulary: int, inner: int, attention: str) -> None:
    """Attention decides, or a wide feed-forward, or the logits of a large vocabulary."""
    folder = tiny_decoder.make(tmp_path, "llama", hidden_size=64, intermediate_size=inner, vocab_size=vocabulary)
    backbone = loading.load(str(folder))
    backbone.use_packed_pass(attention)
    prompts, words = torch.randn(4, 30, 64), torch.tensor([[5, 1], [6, 1], [7, 1]])
    batch = texts(32)

    def rank() -> None:
        backbone.rank(batch, words, lambda embeds: prepend(prompts, embeds))

    rank()
    planned = 32 * 4 * shape_of(str(folder)).prediction_bytes(30, NUM_SOURCE, 4, attention)
    assert planned == pytest.approx(most_at_once(rank), rel=0.2)


def test_the_commands_print_plan_and_counts(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configured(world, tmp_path, {"name": "bpt"})
    assert main(["plan", "-c", str(tmp_path / "config.yaml"), "--world", "2"]) == 0
    assert f"backbone     {shape_in(world).num_parameters:,} parameters" in capsys.readouterr().out
    assert main(["methods", "--json", "--shape", "smollm2-135m"]) == 0
    found = {entry["name"]: entry["trainable_parameters"] for entry in json.loads(capsys.readouterr().out)}
    assert found["prompt_tuning"] == 100 * 576
    assert found["bpt"] == 100 * 576 + 100 + 576
    # Rank 8 at 30 layers: queries 576 -> 576, values 576 -> 3 heads of 64.
    assert found["lora"] == 30 * 8 * (576 + 576 + 576 + 192)
    assert {name for name, number in found.items() if number is None} == {"hyperformer", "hyperdecoder"}
    assert main(["methods", "--shape", "smollm2-135m"]) == 0
    assert "hyperformer" in capsys.readouterr().out
