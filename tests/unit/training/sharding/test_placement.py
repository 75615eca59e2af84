"""The update of a stage: schedule, clipping particle by particle, state that resumes to the same bits; refused ZeRO settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import tiny_run
import tiny_t5
import torch
from torch import Tensor, nn

from bpt_dist.backbones import loading
from bpt_dist.backbones.prompts import prepend
from bpt_dist.config import DistributionConfig, MethodConfig, StageConfig
from bpt_dist.distributed.mesh import Axis, Mesh, World
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import Method
from bpt_dist.training.optimizer import StageOptimizer, schedule
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.zero import ZERO_INFERENCE

REPOSITORY = Path(__file__).parents[4]


class Toy(Method):
    """Three particles with a factor each, and one tensor that all share."""

    paper, summary = "none", "none"
    particle_tensors = frozenset({"particles", "u"})

    def __init__(self, rows: slice = slice(None)) -> None:
        super().__init__(MethodConfig(name="toy"), None, seed=0, reduction="token_mean")  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        self.particles = nn.Parameter(torch.randn(3, 4, 5, generator=generator)[rows])
        self.u = nn.Parameter(torch.randn(3, 4, generator=generator)[rows])
        self.shared = nn.Parameter(torch.randn(7, generator=generator))


def gradients(step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    drawn = {"particles": torch.randn(3, 4, 5, generator=generator), "u": torch.randn(3, 4, generator=generator)}
    return {name: 10.0 ** torch.arange(3.0).view(-1, *[1] * (value.dim() - 1)) * value for name, value in drawn.items()} | {
        "shared": torch.randn(7, generator=generator)
    }


def advance(method: Toy, optimizer: StageOptimizer, steps: range, rows: slice = slice(None)) -> None:
    for step in steps:
        for name, gradient in gradients(step).items():
            method.get_parameter(name).grad = (gradient[rows] if name in method.particle_tensors else gradient).clone()
        optimizer.step(step)


def stage(**changes: Any) -> StageConfig:
    return StageConfig(**{"steps": 10, "lr": 0.1, **changes})


def test_the_rate_rises_linearly_then_falls_to_zero_or_stays() -> None:
    assert [schedule(step, 10, 0.0, "linear") for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    rising = [schedule(step, 20, 0.2, "linear") for step in range(20)]
    assert rising[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rising[4] == 1.0
    assert rising[4:] == sorted(rising[4:], reverse=True)
    assert rising[19] == pytest.approx(1 / 16)
    assert {schedule(step, 20, 0.2, "constant") for step in range(4, 20)} == {1.0}


def test_a_plain_gradient_step_is_the_rate_times_the_gradient() -> None:
    method = Toy()
    before = method.snapshot()
    advance(method, StageOptimizer(method, stage(optimizer="sgd", warmup=0.2)), range(1))
    for name, gradient in gradients(0).items():
        torch.testing.assert_close(method.get_parameter(name).detach(), before[name] - 0.1 / 3 * gradient)
        assert method.get_parameter(name).grad is None


def test_adamw_is_the_published_rule() -> None:
    """Loshchilov & Hutter (2019), written out in float64 for five steps."""
    method = Toy()
    theta = method.shared.detach().double()
    advance(method, StageOptimizer(method, stage(weight_decay=0.01, schedule="constant")), range(5))
    first = second = torch.zeros(7, dtype=torch.float64)
    for step in range(5):
        gradient = gradients(step)["shared"].double()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        theta = theta - 0.1 * 0.01 * theta - 0.1 * corrected
    torch.testing.assert_close(method.shared.detach().double(), theta, rtol=1e-5, atol=1e-6)


def test_each_particle_is_clipped_by_its_own_norm_over_its_own_tensors() -> None:
    method = Toy()
    before, limit = method.snapshot(), 2.0
    advance(method, StageOptimizer(method, stage(optimizer="sgd", lr=1.0, clip=limit)), range(1))
    moved = {name: before[name] - method.get_parameter(name).detach() for name in before}
    for m in range(3):
        given = torch.cat([gradients(0)[name][m].flatten() for name in ("particles", "u")])
        found = torch.cat([moved[name][m].flatten() for name in ("particles", "u")])
        torch.testing.assert_close(found, given * min(1.0, limit / float(given.norm())), rtol=1e-4, atol=1e-5)
    assert float(moved["shared"].norm()) <= limit + 1e-4


def test_clipping_does_not_depend_on_which_particles_a_rank_owns() -> None:
    whole, part = Toy(), Toy(slice(1, 2))
    advance(whole, StageOptimizer(whole, stage(clip=0.5)), range(3))
    advance(part, StageOptimizer(part, stage(clip=0.5)), range(3), rows=slice(1, 2))
    assert torch.equal(part.particles[0], whole.particles[1])
    assert torch.equal(part.u[0], whole.u[1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_loaded_state_takes_the_next_step_to_the_same_bits(optimizer: str) -> None:
    settings = stage(optimizer=optimizer, weight_decay=0.1, warmup=0.3, clip=1.0)
    first = Toy()
    updated = StageOptimizer(first, settings)
    advance(first, updated, range(4))
    state = {name: tensor.clone() for name, tensor in updated.state_dict(Mesh()).items()}
    second = Toy()
    resumed = StageOptimizer(second, settings)
    resumed.load(state, Mesh())
    for method, each in ((first, updated), (second, resumed)):
        advance(method, each, range(4, 7))
    assert all(torch.equal(first.get_parameter(name), second.get_parameter(name)) for name in ("particles", "u", "shared"))


def test_state_of_all_particles_resumes_on_a_rank_that_owns_one_of_them() -> None:
    """F17: another number of ranks; Adam's own step counters have no particle axis and stay whole."""
    whole = Toy()
    optimizer = StageOptimizer(whole, stage())
    advance(whole, optimizer, range(3))
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict(Mesh()).items()}
    rows = slice(2, 3)
    part = Toy(rows)
    resumed = StageOptimizer(part, stage())
    resumed.load(state, Mesh(particle=Axis(2, 3)))
    advance(whole, optimizer, range(3, 5))
    advance(part, resumed, range(3, 5), rows=rows)
    assert torch.equal(part.particles, whole.particles[rows])
    assert torch.equal(part.shared, whole.shared)


def test_a_tensor_without_a_learning_rate_is_our_mistake() -> None:
    class Forgetful(Toy):
        def param_groups(self, stage: StageConfig) -> list[dict[str, Any]]:
            return [{"params": [self.particles, self.u], "lr": 1.0}]

    with pytest.raises(AssertionError, match="every trainable tensor once"):
        StageOptimizer(Forgetful(), stage())


# --- partitioning (the real thing is in tests/distributed/test_partition.py) --------------------------------------------------


def test_the_shipped_zero_settings_are_those_the_engine_takes_by_itself() -> None:
    shipped = json.loads((REPOSITORY / "configs" / "deepspeed" / "zero3_inference.json").read_text())
    # What the run says anyway; the file is one that DeepSpeed reads as it is.
    assert shipped.pop("bf16") == {"enabled": True}
    assert shipped.pop("train_micro_batch_size_per_gpu") == 1
    assert shipped == ZERO_INFERENCE


@pytest.mark.parametrize("layers_need_gradients", [True, False])
def test_blocks_that_are_computed_again_give_the_same_bits_and_keep_names_and_hooks(
    layers_need_gradients: bool, tmp_path: Path
) -> None:
    """Twice through each block with gradients, once without; what was inserted inside acts in both passes."""
    folder = str(tiny_t5.make(tmp_path))
    found, names, passes = [], [], []
    for recomputed in (False, True):
        backbone = loading.load(folder)
        placement.place(backbone, DistributionConfig(activation_checkpointing=recomputed), World())
        count: list[int] = []
        backbone.blocks[0].layer[0].register_forward_hook(lambda *_, count=count: count.append(1))  # type: ignore[union-attr,index]
        scale = torch.ones(32, requires_grad=layers_need_gradients)
        backbone.wrap_sublayer(lambda _place, scale=scale: lambda _x, y: y * scale, ["feed_forward"])
        prompt = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        ids = torch.tensor([[5, 6, 7]])
        texts = SimpleNamespace(source_ids=ids, source_mask=torch.ones_like(ids), target_ids=ids)
        inputs = partial(prepend, prompt)
        backbone.log_likelihood(texts, inputs, "token_mean").log_likelihood.sum().backward()
        with torch.no_grad():
            backbone.log_likelihood(texts, inputs, "token_mean")
        found.append([tensor.grad for tensor in (prompt, scale) if tensor.requires_grad])
        names.append([name for name, _ in backbone.model.named_modules()])
        passes.append(len(count))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert names[0] == names[1]
    assert passes == [2, 3]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_partitioning_without_a_process_group_says_how_to_start(shard: Literal["deepspeed", "fsdp2"], tmp_path: Path) -> None:
    backbone = loading.load(str(tiny_t5.make(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"distribution\.shard: .* needs a process group; start with `deepspeed launcher/train\.py"
    ):
        placement.place(backbone, DistributionConfig(shard=shard), World())


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("{", r"is no DeepSpeed JSON with zero_optimization\.stage .*; start from"),
        ('{"zero_optimization": {}}', r"is no DeepSpeed JSON with zero_optimization\.stage .*; start from"),
        (json.dumps({"zero_optimization": {"stage": 2}}), r"has zero_optimization\.stage 2; only 3 partitions weights"),
        (
            json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {}}),
            r"sets optimizer; remove it, that is the stage's optimizer",
        ),
        (json.dumps({"zero_optimization": {"stage": 3}, "fp16": {}}), r"sets fp16; remove it, that is backbone\.dtype"),
        (
            json.dumps({"zero_optimization": {"stage": 3, "leaf_module": {"names": ["model.encoder"]}}}),
            r"sets leaf_module; leaf modules that are recomputed stay gathered .*distribution\.activation_checkpointing=false",
        ),
        (None, r"is no DeepSpeed JSON"),
    ],
)
@pytest.mark.usefixtures("group_of_one")
def test_zero_settings_that_cannot_hold_a_frozen_t5_are_refused(tmp_path: Path, content: str | None, remedy: str) -> None:
    backbone = loading.load(str(tiny_t5.make(tmp_path / "t5")))
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=remedy) as refused:
        placement.place(backbone, DistributionConfig(shard="deepspeed", zero_config=file, activation_checkpointing=True), World())
    assert str(refused.value).startswith(f"distribution.zero_config: {file} ")


@pytest.mark.usefixtures("group_of_one")
def test_what_deepspeed_does_not_understand_is_named_with_its_file(tmp_path: Path) -> None:
    backbone = loading.load(str(tiny_t5.make(tmp_path / "t5")))
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "many"}}))
    with pytest.raises(
        ConfigError, match=r"DeepSpeed refuses .*zero\.json: .*stage3_max_live_parameters.*; compare it with configs/"
    ):
        placement.place(backbone, DistributionConfig(shard="deepspeed", zero_config=file), World())


@pytest.mark.parametrize(
    ("method", "distribution", "problem"),
    [
        ("prompt_tuning", {"scope": "node"}, "distribution.scope: has no effect with shard none"),
        ("prompt_tuning", {"offload": "cpu"}, "distribution.offload: has no effect with shard none"),
        ("fine_tuning", {"shard": "fsdp2", "scope": "node"}, "distribution.scope: node keeps a copy of the backbone on each host"),
        ("fine_tuning", {"shard": "fsdp2", "offload": "cpu"}, "distribution.offload: cpu is for frozen partitions"),
        ("fine_tuning", {"shard": "deepspeed", "exact": True}, "distribution.exact: orders the sums of whole gradients"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(
    method: str, distribution: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    plain = tiny_run.settings(tmp_path, {"name": method}, distribution=distribution)
    with pytest.raises(ConfigError) as refused:
        tiny_run.load(tmp_path, plain)
    assert problem in str(refused.value)
