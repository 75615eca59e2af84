"""The packed pass equals an independent float64 T5, on random batches of every awkward shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_t5
import torch
from make_believe_gpu import MakeBelieveGpu, Notes
from plain_t5 import PlainT5
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from bpt_dist.backbones import loading
from bpt_dist.backbones.attention import ATTENTIONS
from bpt_dist.backbones.candidates import Tree
from bpt_dist.backbones.grid import Grid
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.model import PromptedT5, T5Backbone
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.data.batches import Batch

NUM_BATCHES = 24
START, END = 0, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"), width=64)


def packed(folder: Path, dtype: str = "fp32", attention: str = "sdpa") -> T5Backbone:
    found = loading.load(str(folder), dtype=dtype)
    found.use_packed_pass(attention)
    return found


def random_batch(seed: int, num_ids: int = 128) -> tuple[Batch, Tensor]:
    """Return texts with unequal lengths and prompts; among the first seeds are one-token texts, targets and the longest of both."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    num_texts, num_particles, length = number(1, 6), number(1, 3), number(1, 12)
    sources = [{0: 1, 1: 40}.get(seed, number(1, 30)) for _ in range(num_texts)]
    targets = [{0: 1, 2: 16}.get(seed, number(1, 6)) for _ in range(num_texts)]
    ids = torch.zeros(num_texts, max(sources), dtype=torch.long)
    mask, target_ids = ids.clone(), torch.full((num_texts, max(targets)), -100)
    for n, (num_source, num_target) in enumerate(zip(sources, targets, strict=True)):
        ids[n, :num_source] = torch.randint(2, num_ids, (num_source,), generator=draw)
        mask[n, :num_source] = 1
        target_ids[n, :num_target] = torch.randint(1, num_ids, (num_target,), generator=draw)
    names = tuple(f"t/{n}" for n in range(num_texts))
    batch = Batch(0, ids, mask, target_ids, torch.zeros(num_texts, dtype=torch.long), names, torch.rand(num_texts, generator=draw))
    return batch, torch.randn(num_particles, length, 64, generator=draw)


class Truth(PlainT5):
    """The float64 T5 with a prompt before the text."""

    def sums(self, batch: Batch, prompts: Tensor) -> Tensor:
        return torch.stack([torch.stack([self.of_row(batch, n, prompt) for n in range(len(batch))]) for prompt in prompts])

    def of_row(self, batch: Batch, n: int, prompt: Tensor) -> Tensor:
        ids = batch.source_ids[n][batch.source_mask[n].bool()]
        targets = batch.target_ids[n][batch.target_ids[n] >= 0]
        states = self.stack("encoder", torch.cat([prompt, self.weights["shared.weight"][ids]]), None)
        start = torch.cat([torch.zeros(1, dtype=torch.long), targets[:-1]])
        decoded = self.stack("decoder", self.weights["shared.weight"][start], states)
        logits = self.linear("lm_head", decoded * self.config.d_model**-0.5)
        return logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()


def answer(backbone: T5Backbone, batch: Batch, prompts: Tensor) -> tuple[Tensor, Tensor]:
    theta = prompts.clone().requires_grad_()
    found = backbone.log_likelihood(batch, lambda embeds: prepend(theta, embeds), "token_sum").log_likelihood
    (found * batch.weight).sum().backward()
    assert theta.grad is not None
    return found.detach().double(), theta.grad.double()


def truth(model: Truth, batch: Batch, prompts: Tensor) -> tuple[Tensor, Tensor]:
    theta = prompts.double().requires_grad_()
    found = model.sums(batch, theta)
    (found * batch.weight.double()).sum().backward()
    assert theta.grad is not None
    return found.detach(), theta.grad


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def pads_attention(backbone: T5Backbone, attention: str) -> T5Backbone:
    """Let attention read all texts in one call, as on a GPU."""
    call = backbone.call
    backbone.packed = PackedT5(
        backbone.model, ATTENTIONS[attention], backbone, lambda run: call("packed", run), pads_attention=True
    )
    return backbone


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(NUM_BATCHES))
def test_fp32_equals_a_float64_t5(folder: Path, seed: int, attention: str, padded: bool) -> None:
    batch, prompts = random_batch(seed)
    backbone = packed(folder, attention=attention)
    if padded:
        pads_attention(backbone, attention)
    found, expected = answer(backbone, batch, prompts), truth(Truth(folder), batch, prompts)
    assert apart(found[0], expected[0]) < 1e-5
    assert apart(found[1], expected[1]) < 1e-5


def test_bf16_is_as_near_as_its_digits_allow(folder: Path) -> None:
    # The float64 T5 with the weights that bf16 has: what is measured is the pass, not the rounding of the checkpoint.
    half = Truth(folder)
    half.weights = {name: weight.to(torch.bfloat16).double() for name, weight in half.weights.items()}
    backbones = {
        "stock": loading.load(str(folder), dtype="bf16"),
        "packed": packed(folder, "bf16", "eager"),
        "padded": pads_attention(packed(folder, "bf16"), "sdpa"),
    }
    errors: dict[str, list[float]] = {name: [] for name in (*backbones, "gpu")}
    for seed in range(NUM_BATCHES):
        batch, prompts = random_batch(seed)
        expected = truth(half, batch, prompts)
        found = {name: answer(backbone, batch, prompts) for name, backbone in backbones.items()}
        for name, (values, gradient) in (found | {"gpu": on_make_believe_gpu(folder, "bf16", batch, prompts)[:2]}).items():
            assert apart(values, expected[0]) < 2e-2, (seed, name)
            errors[name].append(apart(gradient, expected[1]))
    # Gradients of a T5 in bf16 are off by some percent in every implementation: a rounded state flips rectified units.
    stock, *ours = (sum(values) / NUM_BATCHES for values in errors.values())
    assert max(ours) < 1.25 * stock, errors
    assert max(ours) < 0.1, errors


def on_make_believe_gpu(folder: Path, dtype: str, batch: Batch, prompts: Tensor) -> tuple[Tensor, Tensor, Notes]:
    """As `answer`, by the kernels of a GPU, and what the device has noted."""
    with MakeBelieveGpu() as device:
        backbone = loading.load(str(folder), dtype=dtype)
        backbone.device = device.device
        backbone.core.to(device.device)
        backbone.use_packed_pass("sdpa")
        theta = prompts.to(device.device).requires_grad_()
        device.forget()
        found = backbone.log_likelihood(batch, lambda embeds: prepend(theta, embeds), "token_sum").log_likelihood
        (found * batch.weight.to(device.device)).sum().backward()
        noted = device.forget()
        assert theta.grad is not None
        return found.detach().cpu().double(), theta.grad.cpu().double(), noted


@pytest.mark.parametrize("seed", range(4))
def test_a_make_believe_gpu_computes_the_same_by_fused_norms(folder: Path, seed: int) -> None:
    batch, prompts = random_batch(seed)
    expected = truth(Truth(folder), batch, prompts)
    *answered, noted = on_make_believe_gpu(folder, "fp32", batch, prompts)
    assert not noted.mismatches
    assert noted.operators["_fused_rms_norm"] == 12
    assert noted.operators["_fused_rms_norm_backward"] == 10  # before it reads the encoder, the decoder has nothing to learn
    assert apart(answered[0], expected[0]) < 1e-5
    assert apart(answered[1], expected[1]) < 1e-5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_gated_untied_t5_equals_the_stock_pass(attention: str, seed: int, padded: bool) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128, d_model=64, d_kv=8, num_heads=4, d_ff=96, num_layers=2, num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    model.requires_grad_(False).eval()
    ours, stock = PackedT5(model, ATTENTIONS[attention], pads_attention=padded), PromptedT5(model)
    batch, prompts = random_batch(seed)
    own, other = (prompts.clone().requires_grad_() for _ in range(2))
    texts = (batch.source_ids, batch.source_mask, batch.target_ids)
    found = ours.log_likelihood(*texts, lambda embeds: prepend(own, embeds), "token_mean", False).log_likelihood
    expected = stock("log_likelihood", *texts, lambda embeds: prepend(other, embeds), "token_mean", False)[0]
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-5, atol=1e-5)
    assert own.grad is not None
    assert other.grad is not None
    assert apart(own.grad, other.grad) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_states_are_those_of_the_stock_pass_where_there_is_text(folder: Path, padded: bool) -> None:
    batch, prompts = random_batch(4)
    ours, stock = (
        each.log_likelihood(batch, lambda embeds: prepend(prompts, embeds), "token_mean", states=True)
        for each in (pads_attention(packed(folder), "sdpa") if padded else packed(folder), loading.load(str(folder)))
    )
    real, targets = batch.source_mask.bool(), batch.target_ids >= 0
    assert ours.states is not None
    assert stock.states is not None
    encoder_mask = torch.cat([torch.ones(len(batch), prompts.shape[1], dtype=torch.bool), real], dim=1)
    for found, expected, mask in (
        (ours.logits, stock.logits, targets),
        (ours.states[0], stock.states[0], encoder_mask),
        (ours.states[1], stock.states[1], targets),
    ):
        assert found.shape == expected.shape
        torch.testing.assert_close(found[:, mask], expected[:, mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_candidates_read_as_a_tree_have_their_own_log_likelihoods(folder: Path, dtype: str) -> None:
    batch, prompts = random_batch(3)
    # The second begins like the first, the third is the beginning of the fourth, the fifth is the end token alone.
    candidates = [[5, 6, 7, END], [5, 6, 9, END], [11, END], [11, 12, END], [END], [5, 6, 7, 8]]
    padded = torch.full((len(candidates), 4), -100)
    for row, candidate in enumerate(candidates):
        padded[row, : len(candidate)] = torch.tensor(candidate)
    inputs = lambda embeds: prepend(prompts, embeds)  # noqa: E731
    ours, stock = (each.rank(batch, padded, inputs) for each in (packed(folder, dtype), loading.load(str(folder), dtype=dtype)))
    assert ours.shape == (len(prompts), len(batch), len(candidates))
    torch.testing.assert_close(ours, stock.float(), rtol=1e-5 if dtype == "fp32" else 2e-2, atol=1e-4 if dtype == "fp32" else 0.1)
    tree = Tree.of(candidates, START)
    assert len(tree.tokens) == len({tuple(c[:n]) for c in candidates for n in range(len(c))})


@pytest.mark.parametrize("seed", [0, 3, 5, 8])
def test_generates_what_the_stock_pass_generates(folder: Path, seed: int) -> None:
    batch, prompts = random_batch(seed)
    inputs = lambda embeds: prepend(prompts, embeds)  # noqa: E731
    ours, stock = eager_to_end(packed(folder)), eager_to_end(loading.load(str(folder)))
    assert ours.generate(batch, inputs, 9) == stock.generate(batch, inputs, 9)


@torch.no_grad()
def written_together(model: T5ForConditionalGeneration, batch: Batch, prompts: Tensor, limit: int) -> list[list[int]]:
    """Greedy decoding of one text at a time: one full forward a hypothesis and token, the probabilities averaged in float64."""
    written = []
    for ids, mask in zip(batch.source_ids, batch.source_mask.bool(), strict=True):
        tokens = [START]
        while len(tokens) <= limit and tokens[-1] != END:
            total = torch.zeros(128, dtype=torch.float64)
            for prompt in prompts:
                embeds = torch.cat([prompt, model.shared(ids[mask])])[None]
                logits = model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
                total += logits.double().softmax(-1)
            tokens.append(int(total.argmax()))
        written.append(tokens)
    return written


def eager_to_end(backbone: T5Backbone) -> T5Backbone:
    """A random T5 hardly ever ends by itself: this one prefers to, so that rows end at different steps."""
    backbone.model.shared.weight.data[END] += 0.15 * backbone.model.shared.weight.data[5:40].mean(0) + 0.1
    return backbone


@pytest.mark.parametrize("seed", [0, 3, 5, 8, 11, 14])
def test_an_ensemble_writes_the_likeliest_token_of_the_mean_distribution(folder: Path, seed: int) -> None:
    batch, prompts = random_batch(seed)
    prompts = torch.cat([prompts, 2 * torch.randn(3, *prompts.shape[1:], generator=torch.Generator().manual_seed(seed))])
    inputs = lambda embeds: prepend(prompts, embeds)  # noqa: E731
    ours, stock = eager_to_end(packed(folder)), eager_to_end(loading.load(str(folder)))
    expected = ours.tokenizer.batch_decode(written_together(stock.model, batch, prompts, 9), skip_special_tokens=True)
    assert ours.generate(batch, inputs, 9, average=True) == [expected]
    assert stock.generate(batch, inputs, 9, average=True) == [expected]
    assert any(alone != expected for alone in ours.generate(batch, inputs, 9))  # the hypotheses disagree


def test_sequences_end_at_different_steps_and_leave_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, prompts = random_batch(5)
    ours = packed(folder)
    assert ours.packed is not None
    rows: list[int] = []
    logits = ours.packed._logits

    def counted(decoded: Tensor, grid: Grid) -> Tensor:
        found = logits(decoded, grid)
        rows.append(len(found))
        found[: (len(rows) * len(found)) // 4, END] = 1e9  # more and more sequences end
        return found

    monkeypatch.setattr(ours.packed, "_logits", counted)
    ours.generate(batch, lambda embeds: prepend(prompts, embeds), 9)
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 2


def test_it_holds_no_second_copy_of_the_weights(folder: Path) -> None:
    backbone = packed(folder)
    assert backbone.packed is not None
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
    for stack in (backbone.packed.encoder, backbone.packed.decoder):
        assert {layer.weight().untyped_storage().data_ptr() for layer in (*stack.projections, *stack.inner, *stack.outer)} <= own
    backbone.verify_unchanged()


def test_it_leaves_trained_weights_and_long_targets_to_the_stock_pass(folder: Path) -> None:
    backbone = packed(folder)
    assert backbone.packed_pass_for(3) is backbone.packed
    assert backbone.packed_pass_for(1000) is None
    backbone.model.requires_grad_(True)
    assert backbone.packed_pass_for(3) is None
