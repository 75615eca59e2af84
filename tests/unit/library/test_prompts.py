"""Posteriors, prompts and the bridge to PEFT, against our own pass, `torch.distributions`, autograd and transformers' Trainer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import tiny_run
import torch
from torch import Tensor
from torch.distributions import Normal
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

import bpt_dist
from bpt_dist.artifacts.posterior import Posterior as StoredPosterior
from bpt_dist.backbones import loading
from bpt_dist.errors import ConfigError
from bpt_dist.library.bridge import add_prompt, prompt_of
from bpt_dist.library.prompts import gaussian_penalty, load_posterior, load_prompt

SIGMA, ROWS = 0.3, 50
LEARNT, NEAR = 0.2, 0.5  # nats by which a random T5 must be better; how far a narrow prior lets the prompt go, in norms of the mean
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*label names.*")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> bpt_dist.Run:
    """A finished BPT run on the tiny T5."""
    folder = tiny_run.world(tmp_path_factory.mktemp("world"))
    return bpt_dist.train(tiny_run.settings(folder, {"name": "bpt"}))


@pytest.fixture
def model(run: bpt_dist.Run) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(run.config.backbone.path).eval()


@pytest.fixture
def texts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, 60, (4, 3), generator=generator)}


def of_our_pass(run: bpt_dist.Run, prompt: Tensor, texts: dict[str, Tensor]) -> Tensor:
    """Return the log-likelihood of each text under a prompt, by the backbone that training uses."""
    from bpt_dist.backbones.prompts import prepend
    from bpt_dist.data.batches import Batch

    backbone = loading.load(run.config.backbone.path)
    number = len(texts["labels"])
    batch = Batch(
        0, texts["input_ids"], texts["attention_mask"], texts["labels"], torch.zeros(number, dtype=torch.long), ("x",),
        torch.ones(number),
    )  # fmt: skip
    with torch.no_grad():
        return backbone.log_likelihood(batch, functools.partial(prepend, prompt[None]), "token_sum").log_likelihood[0]


def of_peft(model: Any, texts: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits = model(**texts).logits.log_softmax(-1)
    return logits.gather(-1, texts["labels"][..., None]).squeeze(-1).sum(1)


@pytest.mark.parametrize("particle", [None, 0, 1])
def test_peft_computes_what_our_own_pass_computes(
    particle: int | None, run: bpt_dist.Run, model: Any, texts: dict[str, Tensor]
) -> None:
    posterior = run.posterior
    prompt = posterior.mean if particle is None else posterior.particles[particle]
    wrapped = posterior.init_peft(model, particle=particle)
    assert torch.equal(prompt_of(wrapped), prompt)
    torch.testing.assert_close(of_peft(wrapped, texts), of_our_pass(run, prompt, texts), rtol=1e-5, atol=1e-5)
    trainable = {name for name, tensor in wrapped.named_parameters() if tensor.requires_grad}
    assert len(trainable) == 1
    assert "prompt_encoder" in trainable.pop()


def test_a_model_with_a_prompt_gets_another_one(run: bpt_dist.Run, model: Any, texts: dict[str, Tensor]) -> None:
    wrapped = run.posterior.init_peft(model, particle=0)
    assert run.posterior.init_peft(wrapped) is wrapped
    assert torch.equal(prompt_of(wrapped), run.posterior.mean)
    assert run.prompt("mood").init_peft(wrapped) is wrapped
    exported = load_prompt(run.folder / "target/mood/adapter")
    assert torch.equal(prompt_of(wrapped), exported.tensor)
    torch.testing.assert_close(of_peft(wrapped, texts), of_our_pass(run, exported.tensor, texts), rtol=1e-5, atol=1e-5)


def test_the_random_state_of_the_program_is_kept(run: bpt_dist.Run, model: Any) -> None:
    before = torch.get_rng_state()
    run.posterior.init_peft(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_decoder_gets_a_prompt_too(tmp_path: Path) -> None:
    folder = tiny_decoder.make(tmp_path / "decoder")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    width = model.get_input_embeddings().weight.shape[1]
    prompt, ids = torch.randn(3, width, generator=torch.Generator().manual_seed(0)), torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        embeds = torch.cat([prompt, model.get_input_embeddings()(ids)[0]])[None]
        by_hand = model(inputs_embeds=embeds).logits[0, 3:]
        assert torch.allclose(add_prompt(model, prompt)(input_ids=ids).logits[0, -4:], by_hand, atol=1e-5)


@pytest.mark.parametrize("way", ["sigma", "sigma_relative"])
def test_the_penalty_is_minus_the_log_density_of_a_gaussian(way: str, run: bpt_dist.Run) -> None:
    mean = run.posterior.mean
    width = SIGMA if way == "sigma" else SIGMA * float(mean.double().square().mean().sqrt())
    generator = torch.Generator().manual_seed(1)
    theta, other = (mean + 0.1 * torch.randn(mean.shape, generator=generator) for _ in range(2))
    theta.requires_grad_()

    def density(value: Tensor) -> Tensor:
        return Normal(mean.double(), width).log_prob(value.double()).sum()

    penalties = [gaussian_penalty(value, run.posterior, num_examples=ROWS, **{way: SIGMA}) for value in (theta, other)]
    # The constant of the density is left out: it drops out of differences and gradients.
    expected = (density(other) - density(theta)) / ROWS
    torch.testing.assert_close((penalties[0] - penalties[1]).double(), expected, rtol=1e-4, atol=1e-7)
    (gradient,) = torch.autograd.grad(penalties[0], theta)
    (of_density,) = torch.autograd.grad(-density(theta) / ROWS, theta)
    torch.testing.assert_close(gradient, of_density, rtol=1e-5, atol=1e-8)
    assert gaussian_penalty(mean, mean, num_examples=1, sigma=1.0) == 0


def test_trainer_pulls_the_prompt_towards_the_mean(run: bpt_dist.Run, model: Any, texts: dict[str, Tensor], tmp_path: Path) -> None:
    """Without a loss of data the penalty alone moves the prompt, and the steps of Trainer are those of SGD by hand."""
    posterior, rate, steps = run.posterior, 0.5, 3
    wrapped = posterior.init_peft(model, particle=0)

    class PenaltyOnly(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs=return_outputs)
            own = loss[0] if return_outputs else loss
            total = 0 * own + gaussian_penalty(self.model, posterior, num_examples=ROWS, sigma=SIGMA)
            return (total, loss[1]) if return_outputs else total

    rows = [{name: tensor[number] for name, tensor in texts.items()} for number in range(4)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=steps, learning_rate=rate, per_device_train_batch_size=4, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    PenaltyOnly(wrapped, settings, train_dataset=rows).train()
    factor = (1 - rate / (SIGMA**2 * ROWS)) ** steps
    expected = posterior.mean + factor * (posterior.particles[0] - posterior.mean)
    torch.testing.assert_close(prompt_of(wrapped).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma_relative", [0.03, 30.0])
def test_trainer_learns_with_the_penalty(sigma_relative: float, run: bpt_dist.Run, model: Any, tmp_path: Path) -> None:
    """A wide prior lets the prompt learn its rows, a narrow one keeps it at the mean."""
    tokenizer = AutoTokenizer.from_pretrained(run.config.backbone.path)
    posterior, words = run.posterior, [tiny_run.row("mood", 2 * number)["sentence"] for number in range(8)]
    rows = [{"input_ids": tokenizer(text).input_ids, "labels": tokenizer("good").input_ids} for text in words]

    class MapTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **keywords)
            loss = loss + gaussian_penalty(self.model, posterior, num_examples=len(rows), sigma_relative=sigma_relative)
            return (loss, outputs) if return_outputs else loss

    def loss_of_rows(trained: Any) -> float:
        with torch.no_grad():
            losses = [trained(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss for row in rows]
        return float(torch.stack(losses).mean())

    settings = TrainingArguments(
        str(tmp_path), max_steps=24, learning_rate=0.3, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = MapTrainer(posterior.init_peft(model), settings, train_dataset=rows)
    before = loss_of_rows(trainer.model)
    trainer.train()
    moved = float((prompt_of(trainer.model).detach() - posterior.mean).norm() / posterior.mean.norm())
    if sigma_relative > 1:
        assert loss_of_rows(trainer.model.eval()) < before - LEARNT
        assert moved > NEAR
    else:
        assert moved < NEAR
    # What was trained is a prompt like any other: our readers take it.
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(load_prompt(tmp_path / "adapter").tensor, prompt_of(trainer.model).detach())


def test_a_predictor_of_one_prompt_and_of_a_run(run: bpt_dist.Run) -> None:
    rows = [tiny_run.row("mood", number) for number in range(3)]
    answers = [one.prediction for one in run.predictor("mood").predict(rows)]
    assert [one.prediction for one in run.prompt("mood").predictor().predict(rows)] == answers
    assert set(run.predictor().tasks) == {"mood", "count"}
    with pytest.raises(ConfigError, match=r"has no prompt of task 'moood'; it has (mood, count|count, mood)"):
        run.predictor("moood")


def test_what_is_not_there_is_refused(run: bpt_dist.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has prompts of mood, count; name a task"):
        load_prompt(run.folder)
    with pytest.raises(ConfigError, match="has no target task 'moood'; it has mood, count"):
        load_prompt(run.folder, "moood")
    with pytest.raises(ConfigError, match="is no run, so it has one prompt"):
        load_prompt(run.folder / "target/mood/adapter", "mood")
    with pytest.raises(ConfigError, match=r"no posterior\.safetensors"):
        load_posterior(tmp_path)
    with pytest.raises(ConfigError, match="is not a run"):
        bpt_dist.Run.open(tmp_path)


def test_what_does_not_fit_is_refused(run: bpt_dist.Run, model: Any, tmp_path: Path) -> None:
    posterior = run.posterior
    with pytest.raises(ConfigError, match="there is no number 2; the posterior has 0 to 1"):
        posterior.init_peft(model, particle=2)
    with pytest.raises(ConfigError, match=r"needs a language model of transformers \(got Linear\)"):
        add_prompt(torch.nn.Linear(2, 2), posterior.mean)
    with pytest.raises(ConfigError, match="the prompt is 16 wide, the model 32"):
        add_prompt(model, torch.zeros(3, 16))
    wrapped = posterior.init_peft(model)
    with pytest.raises(ConfigError, match=r"the prompt of the PEFT model is \[3, 32\], this one \[5, 32\]"):
        add_prompt(wrapped, torch.zeros(5, 32))
    import tiny_t5

    other = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5.make(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="belongs to another backbone"):
        posterior.init_peft(other)
    with pytest.raises(ConfigError, match=r"has no soft prompt of PEFT \(got T5ForConditionalGeneration\)"):
        gaussian_penalty(other, posterior, num_examples=3, sigma=1.0)
    named = StoredPosterior({"prompts": torch.zeros(1)}, {"method": "spot"})
    with pytest.raises(ConfigError, match="was made by method spot and holds no mean but prompts"):
        _ = bpt_dist.Posterior(named, tmp_path).mean


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_examples": 3}, "give either sigma or sigma_relative"),
        ({"num_examples": 3, "sigma": 1.0, "sigma_relative": 1.0}, "give either sigma or sigma_relative"),
        ({"num_examples": 0, "sigma": 1.0}, r"num_examples should be positive \(got 0\)"),
        ({"num_examples": 3, "sigma": -1.0}, r"sigma should be positive \(got -1.0\)"),
        ({"num_examples": 3, "sigma_relative": float("nan")}, "sigma_relative should be positive"),
    ],
)
def test_numbers_of_the_penalty(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        gaussian_penalty(torch.zeros(2, 3), torch.zeros(2, 3), **given)
    with pytest.raises(ConfigError, match=r"the prompt is \[2, 3\], the mean \[3, 3\]"):
        gaussian_penalty(torch.zeros(2, 3), torch.zeros(3, 3), num_examples=1, sigma=1.0)
