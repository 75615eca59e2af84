"""What every method keeps, whatever it trains. A new file in `bpt_dist/methods/` is held to this without a change here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_t5
import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from bpt_dist import config as configuration
from bpt_dist import train
from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.artifacts.weights import read_weights
from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.t5.shapes import shape_of
from bpt_dist.config import RunConfig
from bpt_dist.config.method_source import METHODS, method_names, method_options
from bpt_dist.data.batches import Batch, Batches
from bpt_dist.data.prepare import TaskData, prepare
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods import base as methods
from bpt_dist.methods._counts import num_trainable
from bpt_dist.training.optimizer import StageOptimizer

NAMES = method_names(METHODS)
# Trainable numbers a target of T5-base with default options, where a paper or the thesis slides state them.
PUBLISHED = {
    "prompt_tuning": 76_800, "vanilla_transfer": 76_800, "bpt": 77_668, "mpt": 77_668, "lora": 884_736, "adapters": 1_855_104,
    "spot": 76_800, "attempt": 231_936, "dept": 76_800, "bitfit": 280_960,
    "hyperformer": 5_162_928 + 47_616 + 64, "hyperdecoder": 14_078_008,
}  # fmt: skip
PUBLISHED_OF_EIGHT = {"prompt_tuning": 9_600, "adapters": 1_813_440, "bpt": 10_468, "mpt": 10_468, "attempt": 96_192}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Bench:
    """A method on the tiny T5, driven as `train.run_stage` drives it."""

    def __init__(self, config: RunConfig, joint: bool = False) -> None:
        self.config = config
        self.backbone = loading.load(config.backbone.path)
        self.method = methods.load(config, self.backbone)
        self.sources, self.targets = (self.tasks(names) for names in (config.data.source_tasks, config.data.target_tasks))
        self.targets = self.targets if joint else self.targets[:1]
        self.batches: Batches
        self.optimizer: StageOptimizer
        self.stage = ""

    def tasks(self, names: tuple[str, ...]) -> list[TaskData]:
        splits = ("train", "validation")
        return prepare(names, self.config.data, self.backbone.tokenizer, splits=splits, seed=0)

    def begin_source(self) -> None:
        self.stage = "source"
        self.method.begin_source([task.spec for task in self.sources], Mesh())
        self._begin(self.sources, self.config.source)

    def begin_target(self, source: dict[str, Tensor] | None) -> None:
        self.stage = "target"
        sizes = [len(task.train.tokens) for task in self.targets]
        self.method.begin_target(source, [task.spec for task in self.targets], sizes, Mesh())
        self._begin(self.targets, self.config.target)

    def end_auxiliary_phase(self) -> None:
        self.method.end_auxiliary_phase(Mesh())
        self.optimizer = StageOptimizer(self.method, self.config.source if self.stage == "source" else self.config.target)

    def _begin(self, tasks: list[TaskData], stage: Any) -> None:
        weights = [1 / len(tasks)] * len(tasks)
        self.batches = Batches([task.train.tokens for task in tasks], stage.batch_size, self.config.seed, task_weight=weights)
        auxiliary_phases = self.method.auxiliary_phases()
        first = {"lr": auxiliary_phases[0].lr or stage.lr, "steps": auxiliary_phases[0].steps} if auxiliary_phases else {}
        self.optimizer = StageOptimizer(self.method, stage.model_copy(update=first))

    def beginnings(self) -> Iterator[Callable[[], None]]:
        """The beginnings of the stages with their preludes, each to be called after the steps of the one before."""
        if self.config.method.HAS_SOURCE_STAGE:
            yield from self._with_preludes(self.begin_source)
            yield from self._with_preludes(lambda: self.begin_target(self.method.end_source(Mesh())))
        else:
            yield from self._with_preludes(lambda: self.begin_target(None))

    def _with_preludes(self, begin: Callable[[], None]) -> Iterator[Callable[[], None]]:
        yield begin
        for _ in self.method.auxiliary_phases():
            yield self.end_auxiliary_phase

    def to_main(self, stage: str) -> Bench:
        """Begin the main stage of `stage`, after three steps of everything before it."""
        beginnings = self.beginnings()
        next(beginnings)()
        for begin in beginnings:
            if self.stage == stage and begin != self.end_auxiliary_phase:
                break
            self.take(range(3))
            begin()
        return self

    def whole_way(self) -> Bench:
        """Begin the target stage, after three steps of everything before it."""
        return self.to_main("target")

    def batch(self, step: int) -> Batch:
        return self.batches.at(step)

    def gradients(self, step: int) -> float:
        batch = self.batch(step)
        forward = self.method(batch)
        loss = self.method.loss(forward, batch)
        loss.backward()
        penalty = self.method.penalty()
        if penalty is not None:
            penalty.backward()
        return float(-(forward.log_likelihood.detach() @ batch.weight).mean())

    def take(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(self.gradients(step))
            self.method.precondition_(Mesh())
            self.optimizer.step(step)
        return losses


def bench(
    world: Path, tmp_path: Path, name: str, joint: bool = False, options: dict[str, Any] | None = None, **sections: Any
) -> Bench:
    plain = tiny_run.settings(world, {"name": name, **(options or {})}, output=str(tmp_path / "runs"), **sections)
    if "length" not in method_options(name).model_fields and "lr" in plain["target"]:
        plain["target"]["lr"] = 0.01  # weights move in smaller steps than prompts
    return Bench(tiny_run.load(tmp_path, plain), joint)


def stock_logits(backbone: Backbone) -> Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return backbone.model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits


# --- (1) (5) the backbone ---------------------------------------------------------------------------------------------------------


def test_the_t5_is_the_stock_one_again_bit_for_bit(world: Path, tmp_path: Path, name: str) -> None:
    stock = stock_logits(loading.load(str(world / "t5")))
    trained = bench(world, tmp_path, name).whole_way()
    trained.take(range(3))
    if trained.config.method.TRAINS_BACKBONE:
        assert not torch.equal(stock_logits(trained.backbone), stock)
    else:
        trained.backbone.verify_unchanged()
    trained.method.end()
    trained.backbone.verify_unchanged()
    assert torch.equal(stock_logits(trained.backbone), stock)
    assert not any(parameter.requires_grad for parameter in trained.backbone.model.parameters())


# --- (2) gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_every_trainable_tensor_learns_within_three_steps(world: Path, tmp_path: Path, name: str, joint: bool) -> None:
    stages = bench(world, tmp_path, name, joint)
    for begin in stages.beginnings():
        begin()
        moved: set[str] = set()
        for step in range(3):
            stages.gradients(step)
            for key, parameter in stages.method.named_parameters():
                if parameter.grad is not None and bool(parameter.grad.any()):
                    moved.add(key)
            stages.method.precondition_(Mesh())
            stages.optimizer.step(step)
        assert moved == {key for key, parameter in stages.method.named_parameters() if parameter.requires_grad}


def test_the_packed_pass_gives_what_the_stock_modules_give(world: Path, tmp_path: Path, name: str) -> None:
    found = []
    for forward in ("stock", "packed"):
        (tmp_path / forward).mkdir()
        stages = bench(world, tmp_path / forward, name, True).whole_way()
        stages.take(range(2))
        if forward == "packed":
            stages.backbone.use_packed_pass("sdpa")
            trains = stages.config.method.TRAINS_BACKBONE
            assert (stages.backbone.packed_pass_for(3) is None) == trains  # nothing but a trained T5 is left to the stock modules
        loss = stages.gradients(2)
        gradients = {key: tensor.grad for key, tensor in stages.method.named_parameters() if tensor.grad is not None}
        ranked = stages.method.rank(stages.batch(0), torch.tensor([[10, 1, -100], [11, 12, 1]]), "map")
        found.append((loss, ranked, gradients))
    (loss, ranked, gradients), (stock_loss, stock_ranked, expected) = found[1], found[0]
    assert loss == pytest.approx(stock_loss, rel=1e-5)
    torch.testing.assert_close(ranked, stock_ranked, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5 * largest)


# --- (3) how many numbers -------------------------------------------------------------------------------------------------------


def test_the_documented_number_is_what_is_trained_on_t5_base(name: str) -> None:
    found = num_trainable(name, shape_of("t5-base"), 1)
    documented = re.findall(r"\d{1,3}(?:,\d{3})+", methods.method_class(name).__doc__ or "")
    assert f"{found:,}" in documented
    assert found == PUBLISHED.get(name, found)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED_OF_EIGHT) & set(NAMES)))
def test_eight_targets_together_share_what_the_papers_share(name: str) -> None:
    assert num_trainable(name, shape_of("t5-base"), 8) == 8 * PUBLISHED_OF_EIGHT[name]


# --- (4) (6) bits ---------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_the_next_step_has_the_same_bits(world: Path, tmp_path: Path, name: str) -> None:
    straight = bench(world, tmp_path, name)
    kept: list[dict[str, Tensor]] = []  # the newest checkpoint of every stage and prelude so far
    for begin in straight.beginnings():
        begin()
        straight.take(range(2))
        kept.append({key: tensor.clone() for key, tensor in straight.optimizer.state_dict(Mesh()).items()})
        resumed = bench(world, tmp_path, name)
        for state, begin_again in zip(kept, resumed.beginnings(), strict=False):
            begin_again()
            resumed.optimizer.load(state, Mesh())
        assert straight.take(range(2, 4)) == resumed.take(range(2, 4))
        tiny_run.assert_same(resumed.method.snapshot(), straight.method.snapshot())
        kept[-1] = {key: tensor.clone() for key, tensor in straight.optimizer.state_dict(Mesh()).items()}


def test_the_same_seed_has_the_same_bits_and_another_seed_others(world: Path, tmp_path: Path, name: str) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(17 + len(found))  # nothing may draw from the global generator
        each = bench(world, tmp_path, name, seed=seed).whole_way()
        each.take(range(3))
        found.append(each.method.snapshot())
    tiny_run.assert_same(found[1], found[0])
    differs = any(not torch.equal(found[2][key], tensor) for key, tensor in found[0].items())
    assert differs  # by its start, or by the texts it saw


def found_config(world: Path, tmp_path: Path, name: str) -> RunConfig:
    return tiny_run.load(tmp_path, tiny_run.settings(world, {"name": name}))


# --- (7) it learns --------------------------------------------------------------------------------------------------------------


def test_the_loss_falls_by_half_on_a_task_of_32_rows(world: Path, tmp_path: Path, name: str) -> None:
    # A random T5 can be steered only so far: a prompt needs some length to do it, and a prior that lets it.
    options = {key: value for key, value in (("length", 50), ("sigma_relative", 100.0)) if key in method_options(name).model_fields}
    target = {"steps": 100, "batch_size": 16, "schedule": "constant", "eval_every": None}
    learner = bench(world, tmp_path, name, options=options, target=target).whole_way()
    losses = learner.take(range(100))
    assert sum(losses[-4:]) / 4 < losses[0] / 2


# --- (8) the hand-over ----------------------------------------------------------------------------------------------------------


def test_what_the_source_stage_hands_over_is_read_back_and_a_foreign_one_refused(world: Path, tmp_path: Path, name: str) -> None:
    if not method_options(name).HAS_SOURCE_STAGE:
        pytest.skip("no source stage")
    giver, taker = bench(world, tmp_path, name), bench(world, tmp_path, name)
    giver.to_main("source").take(range(2))
    backbone = giver.backbone
    facts = {"method": name, "backbone": "t5", "backbone_hash": backbone.identity, "tokenizer_hash": backbone.tokenizer_hash}
    handed_over = dict(giver.method.end_source(Mesh()))
    Posterior(handed_over, facts).save(tmp_path / "posterior")
    found = Posterior.load(tmp_path / "posterior", backbone)
    tiny_run.assert_same(found.tensors, handed_over)
    taker.begin_target(dict(found.tensors))
    giver.begin_target(handed_over)
    tiny_run.assert_same(taker.method.snapshot(), giver.method.snapshot())
    other = loading.load(str(tiny_t5.make(tmp_path / "other", seed=5)))
    with pytest.raises(ConfigError, match="made with another backbone"):
        Posterior.load(tmp_path / "posterior", other)


# --- (9) configuration ----------------------------------------------------------------------------------------------------------


def test_an_unknown_option_is_refused_with_its_place(world: Path, tmp_path: Path, name: str) -> None:
    plain = tiny_run.settings(world, {"name": name})
    plain["method"]["lenght"] = 3
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: method\.lenght: unknown key"):
        tiny_run.load(tmp_path, plain)
    assert configuration.changed_keys(found_config(world, tmp_path, name), found_config(world, tmp_path, name)) == []


# --- (10) shapes ----------------------------------------------------------------------------------------------------------------


def test_log_likelihood_has_a_row_a_particle_and_a_column_a_text(world: Path, tmp_path: Path, name: str) -> None:
    each = bench(world, tmp_path, name)
    for begin in each.beginnings():
        begin()
        batch = each.batch(0)
        forward = each.method(batch)
        num_particles = each.method.num_particles if each.stage == "source" else 1
        assert forward.log_likelihood.shape == (num_particles, len(batch))
        assert forward.logits.shape == (num_particles, *batch.target_ids.shape, 128)
        assert bool((forward.log_likelihood < 0).all())
        first = each.method(batch, slice(0, 1)).log_likelihood
        torch.testing.assert_close(first, forward.log_likelihood[:1], rtol=1e-5, atol=1e-5)
        each.take(range(1))


# --- (11) export ----------------------------------------------------------------------------------------------------------------


def test_an_export_gives_peft_our_logits_bit_for_bit_or_is_read_back_without_the_training_loop(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    kept: dict[str, Any] = {}
    finish = train.TrainingRun.finish

    def keep(run: train.TrainingRun) -> None:
        kept.update(method=run.method, trained=run.method.snapshot())
        finish(run)

    monkeypatch.setattr(train.TrainingRun, "finish", keep)
    config = bench(world, tmp_path, name, data={"target_tasks": ["mood"]}).config
    run, loaded = tiny_run.trained(config), Bench(config)
    method = kept["method"]
    if method.prompts() is None:
        stored = run / "target" / "mood" / "weights"
        again = read_weights(stored, loaded.backbone, loaded.targets[0].spec, config.evaluation)
        tiny_run.assert_same(again.snapshot(), kept["trained"])
        return
    stock = T5ForConditionalGeneration.from_pretrained(world / "t5").eval()
    theirs = PeftModel.from_pretrained(stock, run / "target" / "mood" / "adapter").eval()
    batch = Batches([task.train.tokens for task in loaded.targets], 4, 0).at(0)
    with torch.no_grad():
        inputs = {"input_ids": batch.source_ids, "attention_mask": batch.source_mask}
        expected, packed = theirs(**inputs, labels=batch.target_ids).logits, method(batch).logits[0]
        real = batch.target_ids >= 0
        torch.testing.assert_close(packed[real], expected[real], rtol=1e-4, atol=1e-5)
        method.backbone.packed = None  # through the same modules as PEFT
        assert torch.equal(method(batch).logits[0], expected)
    (entry,) = {json.dumps(row["trainable_parameters"]) for row in json.loads((run / "results.json").read_text())}
    assert int(entry) == method.num_trainable()


# --- (12) words -----------------------------------------------------------------------------------------------------------------


def test_a_method_names_its_paper_and_says_what_it_is(name: str) -> None:
    found = methods.method_class(name)
    assert re.search(r"\b(19|20)\d\d\b", found.paper)
    assert found.summary
    assert not found.summary.endswith(".")
    sentences = [part for part in re.split(r"(?<=\.)\s", " ".join((found.__doc__ or "").split())) if part]
    assert 1 <= len(sentences) <= 3
    module = __import__(found.__module__, fromlist=["Config"])
    assert module.__doc__
    assert module.Config.__doc__
    assert issubclass(found, nn.Module)
    described = module.Config.model_fields.items()
    assert all(field.description for key, field in described if key != "name")
