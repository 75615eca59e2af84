"""The prompted T5 against transformers' own loss, a float64 loop over tokens, and the stock model on the same embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_t5
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bpt_dist.backbones import loading
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.errors import BackboneChanged

LENGTHS, ANSWERS = (5, 9, 3), (4, 2, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("t5")
    return {"tied": tiny_t5.make(base / "tied"), "untied": tiny_t5.make(base / "untied", tied=False)}


@pytest.fixture(params=["tied", "untied"])
def backbone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> T5Backbone:
    return loading.load(str(folders[request.param]))


@pytest.fixture
def tied(folders: dict[str, Path]) -> T5Backbone:
    return loading.load(str(folders["tied"]))


def texts(pad: int = 0) -> SimpleNamespace:
    """Three texts of different lengths; `pad` is the id that fills the source up."""
    generator = torch.Generator().manual_seed(3)
    source, mask = torch.full((3, max(LENGTHS)), pad), torch.zeros(3, max(LENGTHS), dtype=torch.long)
    target = torch.full((3, max(ANSWERS)), -100)
    for n, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        source[n, :length], mask[n, :length] = torch.randint(3, 128, (length,), generator=generator), 1
        target[n, :answer] = torch.cat([torch.randint(3, 128, (answer - 1,), generator=generator), torch.tensor([1])])
    return SimpleNamespace(source_ids=source, source_mask=mask, target_ids=target)


def prompts(num_particles: int = 2, length: int = 4) -> Tensor:
    return torch.randn(num_particles, length, 32, generator=torch.Generator().manual_seed(5))


def with_prompts(particles: Tensor) -> Any:
    return lambda embeds: prepend(particles, embeds)


def stock(folder: Path, dtype: torch.dtype = torch.float64) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def logits_of_row(model: Any, particle: Tensor, ids: Tensor, labels: Tensor) -> Any:
    """Run the stock model on one unpadded text behind one prompt."""
    embeds = torch.cat([particle.to(model.dtype), model.shared(ids)])[None]
    return model(inputs_embeds=embeds, labels=labels[None])


def rows() -> list[tuple[Tensor, Tensor]]:
    batch = texts()
    return [
        (ids[:length], target[:answer])
        for ids, target, length, answer in zip(batch.source_ids, batch.target_ids, LENGTHS, ANSWERS, strict=True)
    ]


# --- log-likelihood ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_unpadded_text_has_minus_the_loss_of_transformers(backbone: T5Backbone) -> None:
    found = backbone.log_likelihood(texts(), with_prompts(prompts()), "token_mean").log_likelihood
    model = stock(Path(backbone.path), torch.float32)
    expected = [[-logits_of_row(model, particle, *row).loss for row in rows()] for particle in prompts()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
@torch.no_grad()
def test_log_likelihood_equals_a_float64_loop_over_tokens(backbone: T5Backbone, reduction: str) -> None:
    model, expected = stock(Path(backbone.path)), []
    for particle in prompts():
        for ids, labels in rows():
            probabilities = logits_of_row(model, particle, ids, labels).logits[0].softmax(-1)
            logs = [probabilities[place, label].log() for place, label in enumerate(labels)]
            expected.append(sum(logs) / (len(logs) if reduction == "token_mean" else 1))
    found = backbone.log_likelihood(texts(), with_prompts(prompts()), reduction)
    assert found.log_likelihood.shape == (2, 3)
    assert found.logits.shape == (2, 3, max(ANSWERS), 128)
    torch.testing.assert_close(found.log_likelihood.double().flatten(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ids_of_padding_change_nothing_and_prompts_are_attended(tied: T5Backbone) -> None:
    clean, dirty = texts(pad=0), texts(pad=77)
    expected = tied.log_likelihood(clean, with_prompts(prompts()), "token_sum").log_likelihood
    assert torch.equal(tied.log_likelihood(dirty, with_prompts(prompts()), "token_sum").log_likelihood, expected)
    moved = prompts()
    moved[:, 0] += 1.0  # the first position of the prompt, the farthest from the text
    assert not torch.isclose(tied.log_likelihood(clean, with_prompts(moved), "token_sum").log_likelihood, expected).any()


@torch.no_grad()
def test_a_text_scores_the_same_alone_and_beside_longer_ones(backbone: T5Backbone) -> None:
    together = backbone.log_likelihood(texts(), with_prompts(prompts()), "token_sum").log_likelihood
    for n, (ids, labels) in enumerate(rows()):
        alone = SimpleNamespace(source_ids=ids[None], source_mask=torch.ones_like(ids[None]), target_ids=labels[None])
        found = backbone.log_likelihood(alone, with_prompts(prompts()), "token_sum").log_likelihood
        torch.testing.assert_close(found[:, 0], together[:, n], rtol=1e-5, atol=1e-5)


def test_a_really_untied_head_is_the_one_that_was_stored(folders: dict[str, Path]) -> None:
    """Loaders have silently replaced an untied head by the embedding."""
    from safetensors.torch import load_file

    found = loading.load(str(folders["untied"])).model
    assert torch.equal(found.lm_head.weight, load_file(folders["untied"] / "model.safetensors")["lm_head.weight"])
    assert not torch.equal(found.lm_head.weight, found.shared.weight)
    tied_model = loading.load(str(folders["tied"])).model
    assert tied_model.lm_head.weight is tied_model.shared.weight


@torch.no_grad()
def test_bfloat16_differs_from_float32_by_its_rounding_only(folders: dict[str, Path]) -> None:
    exact = loading.load(str(folders["tied"])).log_likelihood(texts(), with_prompts(prompts()), "token_mean").log_likelihood
    half = loading.load(str(folders["tied"]), dtype="bf16").log_likelihood(texts(), with_prompts(prompts()), "token_mean")
    assert half.log_likelihood.dtype is torch.float32
    torch.testing.assert_close(half.log_likelihood, exact, rtol=3e-2, atol=3e-2)


# --- prediction --------------------------------------------------------------------------------------------------------


def test_ranking_equals_scoring_each_label_separately(backbone: T5Backbone) -> None:
    labels = [[10, 1], [11, 12, 1], [13, 14, 15, 1]]
    candidates = torch.tensor([row + [-100] * (4 - len(row)) for row in labels])
    found = backbone.rank(texts(), candidates, with_prompts(prompts()))
    assert found.shape == (2, 3, 3)
    for c, label in enumerate(labels):
        batch = texts()
        batch.target_ids = torch.tensor([label] * 3)
        alone = backbone.log_likelihood(batch, with_prompts(prompts()), "token_sum").log_likelihood
        torch.testing.assert_close(found[:, :, c], alone.detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generation_equals_the_stock_generate_on_the_same_embeddings(backbone: T5Backbone) -> None:
    found = backbone.generate(texts(), with_prompts(prompts()), max_new_tokens=6)
    model, batch = stock(Path(backbone.path), torch.float32), texts()
    for particle, texts_of_particle in zip(prompts(), found, strict=True):
        embeds = torch.cat([particle.expand(3, -1, -1), model.shared(batch.source_ids)], dim=1)
        mask = torch.cat([torch.ones(3, len(particle), dtype=torch.long), batch.source_mask], dim=1)
        tokens = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert texts_of_particle == backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)


# --- frozen ------------------------------------------------------------------------------------------------------------


def test_only_the_prompt_gets_a_gradient_and_a_changed_weight_is_noticed(tied: T5Backbone) -> None:
    particles = prompts().requires_grad_()
    (-tied.log_likelihood(texts(), with_prompts(particles), "token_mean").log_likelihood.sum()).backward()
    assert particles.grad is not None
    assert particles.grad.flatten(1).norm(dim=1).all()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tied.model.parameters())
    tied.verify_unchanged()
    with torch.no_grad():
        tied.model.encoder.block[0].layer[0].SelfAttention.q.weight[0, 0] += 1e-7
    with pytest.raises(BackboneChanged, match="a weight of the frozen model changed during training; fix the method"):
        tied.verify_unchanged()


def test_identity_is_of_the_weights_not_of_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    original = loading.load(str(folders["tied"]))
    moved = loading.load(str(shutil.copytree(folders["tied"], tmp_path / "elsewhere")), dtype="bf16")
    other = loading.load(str(tiny_t5.make(tmp_path / "other", seed=1)))
    assert moved.identity == original.identity != other.identity
    assert moved.tokenizer_hash == original.tokenizer_hash == other.tokenizer_hash


def test_the_weights_that_tokens_pass_give_the_counted_flops_without_attention(backbone: T5Backbone) -> None:
    num_source, num_target = 11, 4
    config = backbone.model.config
    inner = config.num_heads * config.d_kv
    blocks = backbone.num_blocks
    products = blocks["encoder"] * num_source**2 + blocks["decoder"] * (num_target**2 + num_target * num_source)
    of_source, of_target = backbone.matmul_weights()
    counted = T5Shape(config).row_cost(0, num_source, num_target).forward_flops
    assert counted == 2 * (of_source * num_source + of_target * num_target) + 4 * inner * products
