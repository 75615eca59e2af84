"""BitFit: the list of biases against the published count, and each bias against a T5 written in float64."""

from __future__ import annotations

from pathlib import Path

import inserted
import pytest
import tiny_t5
import torch
from plain_t5 import PlainT5, batch, rows, shake, weights_of
from torch import Tensor

from bpt_dist.backbones.t5.shapes import shape_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


class WithBiases(PlainT5):
    """Every linear layer and every norm of a block with a bias."""

    def __init__(self, folder: Path, trained: dict[str, Tensor]) -> None:
        super().__init__(folder)
        self.biases = {name.removeprefix("biases.").replace("/", "."): bias for name, bias in trained.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return super().linear(name, x) + self.biases.get(name, torch.zeros(()))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return super().norm(name, x) + self.biases.get(name, torch.zeros(()))


@pytest.mark.parametrize("lm_head", [True, False])
@torch.no_grad()
def test_log_likelihood_equals_a_float64_t5_with_biases(folder: Path, lm_head: bool) -> None:
    method = inserted.begun(folder, "bitfit", lm_head=lm_head)
    shake(method)
    plain = WithBiases(folder, weights_of(method))
    assert ("lm_head" in plain.biases) == lm_head
    expected = torch.stack([plain.log_likelihood(*row) for row in rows(batch())])
    torch.testing.assert_close(method(batch()).log_likelihood[0].double(), expected, rtol=1e-4, atol=1e-5)


def expected_biases(config: object) -> dict[str, int]:
    """The published list: q, k, v, o of each attention, wi, wo, each layer norm of a block, lm_head; none after a stack."""
    width, inner = config.d_model, config.d_ff  # type: ignore[attr-defined]
    heads = config.num_heads * config.d_kv  # type: ignore[attr-defined]
    found = {"lm_head": config.vocab_size}  # type: ignore[attr-defined]
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        for block in range(config.num_layers):  # type: ignore[attr-defined]
            for number, attention in enumerate(attentions):
                place = f"{stack}/block/{block}/layer/{number}"
                found |= {f"{place}/{attention}/{name}": heads for name in "qkv"}
                found |= {f"{place}/{attention}/o": width, f"{place}/layer_norm": width}
            place = f"{stack}/block/{block}/layer/{len(attentions)}"
            found |= {f"{place}/DenseReluDense/wi": inner, f"{place}/DenseReluDense/wo": width, f"{place}/layer_norm": width}
    return found


def test_biases_are_where_the_published_code_puts_them(folder: Path) -> None:
    method = inserted.begun(folder, "bitfit")
    found = {name.removeprefix("biases."): tensor.numel() for name, tensor in method.snapshot().items()}
    assert found == expected_biases(method.backbone.model.config)
    assert not any(tensor.any() for tensor in method.snapshot().values())


def test_the_list_counts_248832_on_t5_base_and_280960_with_the_head() -> None:
    numbers = expected_biases(shape_of("t5-base").config)
    assert sum(numbers.values()) == 280_960
    assert sum(numbers.values()) - numbers["lm_head"] == 248_832
