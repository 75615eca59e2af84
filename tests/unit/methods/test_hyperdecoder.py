"""HyperDecoder against a float64 re-computation: a decoder of its own for each text, from the mean of its encoder states."""

from __future__ import annotations

from pathlib import Path

import inserted
import pytest
import tiny_t5
import torch
from plain_t5 import PlainT5, batch, rows, shake, weights_of
from torch import Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


class WithWrittenDecoder(PlainT5):
    """Adapters parallel to the feed-forward sub-layers: learned in the encoder, written for each text in the decoder."""

    def __init__(self, folder: Path, trained: dict[str, Tensor], raw: bool, mlp: bool) -> None:
        super().__init__(folder)
        self.trained, self.raw, self.mlp = trained, raw, mlp

    def affine(self, name: str, x: Tensor) -> Tensor:
        return self.trained[f"generator.{name}.weight"] @ x + self.trained[f"generator.{name}.bias"]

    def encoded(self, states: Tensor) -> None:
        pooled = states.mean(0)
        if self.mlp:
            pooled = self.affine("mlp.2", self.affine("mlp.0", pooled).clamp_min(0))
        self.written = []
        for block in self.trained["generator.blocks"]:
            hidden = self.affine("hidden", torch.cat([pooled, block])).clamp_min(0)
            found = {name: self.affine(f"writers.{name}", hidden) for name in ("down", "down_bias", "up", "up_bias")}
            width = len(pooled)
            self.written.append(found | {"down": found["down"].view(width, -1), "up": found["up"].view(-1, width)})

    def sublayer(self, place: str, hidden: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        stack, _, block, _, _, kind = place.split(".")
        if kind != "DenseReluDense":
            return output
        parts = ("down", "down_bias", "up", "up_bias")
        own = self.written[int(block)] if stack == "decoder" else {part: self.trained[f"adapters.{block}/{part}"] for part in parts}
        inner = (hidden if self.raw else normed) @ own["down"] + own["down_bias"]
        return output + inner.clamp_min(0) @ own["up"] + own["up_bias"]


@pytest.mark.parametrize(("adapter_input", "pooled_mlp"), [("normed", False), ("raw", False), ("normed", True)])
@torch.no_grad()
def test_every_text_gets_a_decoder_of_its_own(folder: Path, adapter_input: str, pooled_mlp: bool) -> None:
    options = {"bottleneck": 4, "hidden": 6, "adapter_input": adapter_input, "pooled_mlp": pooled_mlp}
    method = inserted.begun(folder, "hyperdecoder", **options)
    shake(method)
    plain = WithWrittenDecoder(folder, weights_of(method), adapter_input == "raw", pooled_mlp)
    expected = torch.stack([plain.log_likelihood(*row) for row in rows(batch())])
    torch.testing.assert_close(method(batch(pad=77)).log_likelihood[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert method.generate(batch(pad=77), 4) == [
        method.backbone.tokenizer.decode(plain.greedy(ids, 4), skip_special_tokens=True) for ids, _ in rows(batch())
    ]


def test_it_starts_as_published(folder: Path) -> None:
    method = inserted.begun(folder, "hyperdecoder")
    width, inner, hidden = 32, 64, 128
    bounds = {
        "writers.down.weight": 1e-3 * (3 / (hidden * width)) ** 0.5,
        "writers.up.weight": 1e-3 * (3 / (hidden * inner)) ** 0.5,
        "writers.down_bias.weight": 1e-3 * (3 / hidden) ** 0.5,
        "writers.up_bias.weight": 1e-3 * (3 / hidden) ** 0.5,
        "hidden.weight": (width + 10) ** -0.5,
        "hidden.bias": (width + 10) ** -0.5,
    }
    trained = method.snapshot()
    for name, bound in bounds.items():
        assert 0.8 * bound <= float(trained.pop(f"generator.{name}").abs().max()) <= bound
    assert float(trained.pop("generator.blocks").std()) == pytest.approx(1.0, abs=0.5)
    for name, tensor in trained.items():
        bound = 0.0 if name.endswith("bias") else 1e-4 * (6 / (width + inner)) ** 0.5
        assert 0.9 * bound <= float(tensor.abs().max()) <= bound
    assert {name.split(".")[0] for name in trained} == {"adapters", "generator"}
    assert sorted(name for name in trained if name.endswith("/up")) == ["adapters.0/up", "adapters.1/up"]


@pytest.mark.parametrize(("pooled_mlp", "expected"), [(False, 14_078_008), (True, 14_078_008 + 1_181_184)])
def test_the_published_count_follows_from_the_layers(folder: Path, pooled_mlp: bool, expected: int) -> None:
    def count(width: int, inner: int, hidden: int, blocks: int) -> int:
        adapter = 2 * width * inner + inner + width
        learned = blocks * adapter
        written = blocks * 10 + (width + 10 + 1) * hidden + (hidden + 1) * adapter
        return learned + written + (2 * (width + 1) * width if pooled_mlp else 0)

    assert count(768, 64, 128, 12) == expected
    assert inserted.begun(folder, "hyperdecoder", pooled_mlp=pooled_mlp).num_trainable() == count(32, 64, 128, 2)
