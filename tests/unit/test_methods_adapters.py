"""Adapters against a T5 written in float64, and their published places, start and count."""

from __future__ import annotations

import math
from pathlib import Path

import inserted
import pytest
import tiny_t5
import torch
from plain_t5 import PlainT5, batch, rows, shake, weights_of
from torch import Tensor

from bpt_dist.mesh import Mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


class WithAdapters(PlainT5):
    """y + up(gelu(down(y))) after self-attention and feed-forward; gains of the norms changed."""

    def __init__(self, folder: Path, trained: dict[str, Tensor]) -> None:
        super().__init__(folder)
        self.trained = trained
        for name, weight in trained.items():
            if name.startswith("norms."):
                self.weights[name.removeprefix("norms.").replace("/", ".") + ".weight"] += weight

    def sublayer(self, place: str, hidden: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        if place.endswith("EncDecAttention"):
            return output
        down, down_bias, up, up_bias = (
            self.trained[f"adapters.{place.replace('.', '/')}/{part}"] for part in ("down", "down_bias", "up", "up_bias")
        )
        inner = output @ down + down_bias
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return output + gelu @ up + up_bias


@torch.no_grad()
def test_log_likelihood_equals_a_float64_t5_with_adapters(folder: Path) -> None:
    method = inserted.begun(folder, "adapters", reduction=8)
    shake(method)
    plain = WithAdapters(folder, weights_of(method))
    expected = torch.stack([plain.log_likelihood(*row) for row in rows(batch())])
    torch.testing.assert_close(method(batch()).log_likelihood[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert method.generate(batch(), 4) == [
        method.backbone.tokenizer.decode(plain.greedy(ids, 4), skip_special_tokens=True) for ids, _ in rows(batch())
    ]


@pytest.mark.parametrize(("activation", "function"), [("relu", torch.relu), ("swish", lambda x: x / (1 + torch.exp(-x)))])
@torch.no_grad()
def test_the_other_activations_are_what_they_are_called(folder: Path, activation: str, function: object) -> None:
    class Changed(WithAdapters):
        def sublayer(self, place: str, hidden: Tensor, normed: Tensor, output: Tensor) -> Tensor:
            if place.endswith("EncDecAttention"):
                return output
            key = f"adapters.{place.replace('.', '/')}"
            inner = function(output @ self.trained[f"{key}/down"] + self.trained[f"{key}/down_bias"])  # type: ignore[operator]
            return output + inner @ self.trained[f"{key}/up"] + self.trained[f"{key}/up_bias"]

    method = inserted.begun(folder, "adapters", activation=activation)
    shake(method)
    plain = Changed(folder, weights_of(method))
    expected = torch.stack([plain.log_likelihood(*row) for row in rows(batch())])
    torch.testing.assert_close(method(batch()).log_likelihood[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_start_within_two_standard_deviations_and_biases_and_norms_at_zero(folder: Path) -> None:
    method = inserted.begun(folder, "adapters", reduction=1, init_std=0.01)
    for name, tensor in method.snapshot().items():
        if name.endswith(("/down", "/up")):
            assert tensor.abs().max() <= 0.02
            # A normal distribution cut at two standard deviations has a standard deviation of 0.88 of the uncut one.
            assert float(tensor.std()) == pytest.approx(0.0088, rel=0.1)
        else:
            assert not tensor.any()


def test_a_joint_stage_shares_all_numbers_and_trains_the_norms_without_touching_the_t5(folder: Path) -> None:
    method = inserted.begun(folder, "adapters", ("mood", "count", "truth"))
    assert method.num_trainable() == inserted.begun(folder, "adapters").num_trainable()
    method(batch()).log_likelihood.sum().backward()
    assert sum(name.startswith("norms.") for name, _ in method.named_parameters()) == 2 * 2 + 2 * 3 + 2
    assert all(bool(parameter.grad.any()) for name, parameter in method.named_parameters() if name.startswith("norms."))
    method.precondition_(Mesh())
    method.backbone.verify_unchanged()
