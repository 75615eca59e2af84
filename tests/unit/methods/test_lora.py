"""LoRA against PEFT: equal outputs for equal weights, equal shapes and scale; the exported folder is one PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import inserted
import pytest
import tiny_t5
import torch
from peft import LoraConfig, TaskType, get_peft_model
from plain_t5 import PlainT5, batch, rows, shake, weights_of
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bpt_dist.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


def peft_model(folder: Path, **options: Any) -> Any:
    stock = T5ForConditionalGeneration.from_pretrained(folder)
    return get_peft_model(stock, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, lora_dropout=0.0, **options)).eval()


@torch.no_grad()
def give_weights(theirs: Any, method: Any) -> int:
    """Copy the trained pairs into PEFT's model and return how many there are."""
    pairs = method.low_rank_pairs().pairs
    own = dict(theirs.named_parameters())
    for name, (a, b) in pairs.items():
        own[f"base_model.model.{name}.lora_A.default.weight"].copy_(a)
        own[f"base_model.model.{name}.lora_B.default.weight"].copy_(b)
    return 2 * len(pairs)


@pytest.mark.parametrize(
    ("targets", "rank", "alpha"), [(("q", "v"), 8, 8.0), (("q", "k", "v", "o", "wi", "wo"), 3, 16.0)], ids=["default", "all"]
)
@torch.no_grad()
def test_equal_weights_give_the_bits_of_peft(folder: Path, targets: tuple[str, ...], rank: int, alpha: float) -> None:
    method = inserted.begun(folder, "lora", rank=rank, alpha=alpha, targets=targets)
    shake(method)
    theirs = peft_model(folder, r=rank, lora_alpha=alpha, target_modules=list(targets))
    trainable = [name for name, parameter in theirs.named_parameters() if "lora_" in name]
    assert give_weights(theirs, method) == len(trainable)
    texts = batch()
    inputs = {"input_ids": texts.source_ids, "attention_mask": texts.source_mask, "labels": texts.target_ids}
    assert torch.equal(method(texts).logits[0], theirs(**inputs).logits)
    assert method.num_trainable() == sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)


@torch.no_grad()
def test_the_change_is_alpha_over_rank_b_a_x_in_float64(folder: Path) -> None:
    method = inserted.begun(folder, "lora", rank=2, alpha=3.0)
    shake(method)
    trained = weights_of(method)

    class Changed(PlainT5):
        def linear(self, name: str, x: Tensor) -> Tensor:
            key = name.replace(".", "/")
            if f"a.{key}" not in trained:
                return super().linear(name, x)
            return super().linear(name, x) + 1.5 * x @ (trained[f"b.{key}"] @ trained[f"a.{key}"]).T

    plain = Changed(folder)
    expected = torch.stack([plain.log_likelihood(*row) for row in rows(batch())])
    torch.testing.assert_close(method(batch()).log_likelihood[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("init", "std"), [("gaussian", 1 / 8), ("kaiming", 1 / (3 * 32) ** 0.5)])
def test_a_starts_with_the_spread_of_peft_and_b_at_zero(folder: Path, init: str, std: float) -> None:
    method = inserted.begun(folder, "lora", init=init)
    theirs = peft_model(
        folder, r=8, lora_alpha=8, target_modules=["q", "v"], init_lora_weights="gaussian" if init == "gaussian" else True
    )
    spread = torch.cat([a.flatten() for a, _ in method.low_rank_pairs().pairs.values()]).std()
    other = torch.cat([p.detach().flatten() for name, p in theirs.named_parameters() if "lora_A" in name]).std()
    assert float(spread) == pytest.approx(std, rel=0.05)
    assert float(other) == pytest.approx(std, rel=0.05)
    assert not any(b.any() for _, b in method.low_rank_pairs().pairs.values())


def test_a_layer_the_t5_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layer of this backbone matches query; its layers are called .* q, "):
        inserted.begun(folder, "lora", targets=("q", "query"))
