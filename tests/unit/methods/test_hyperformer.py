"""HyperFormer against a float64 re-computation of its hyper-networks in a plain T5, and the published counts."""

from __future__ import annotations

import math
from pathlib import Path

import inserted
import pytest
import tiny_t5
import torch
from plain_t5 import PlainT5, batch, rows, shake, weights_of
from torch import Tensor

from bpt_dist.objective import sequence_log_likelihood

TASKS = ("mood", "count", "truth")
TASK_INDEX = (2, 0, 1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"))


class WithHyperNetworks(PlainT5):
    """I = LN(W2 relu(W1 [task; block; position])); every weight of an adapter is linear in I."""

    def __init__(self, folder: Path, trained: dict[str, Tensor], variant: str) -> None:
        super().__init__(folder)
        self.trained, self.variant, self.task = trained, variant, 0
        for name, weight in trained.items():
            if name.startswith("norms."):
                self.weights[name.removeprefix("norms.").replace("/", ".") + ".weight"] += weight

    def affine(self, name: str, x: Tensor) -> Tensor:
        return self.trained[f"networks.{name}.weight"] @ x + self.trained[f"networks.{name}.bias"]

    def sublayer(self, place: str, hidden: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        stack, _, block, _, _, kind = place.split(".")
        if kind == "EncDecAttention":
            return output
        position = 1 if kind == "SelfAttention" else 0
        parts = [self.trained["tasks"][self.task], self.trained[f"networks.{stack}.blocks"][int(block)]]
        parts += [self.trained[f"networks.{stack}.positions"][position]] if self.variant == "++" else []
        joint = self.affine(f"{stack}.project", self.affine(f"{stack}.hidden", torch.cat(parts)).clamp_min(0))
        joint = (joint - joint.mean()) / (joint.var(correction=0) + 1e-6).sqrt()
        joint = joint * self.trained[f"networks.{stack}.norm.weight"] + self.trained[f"networks.{stack}.norm.bias"]
        writer = f"{stack}.writers.{0 if self.variant == '++' else position}"
        found = {name: self.affine(f"{writer}.{name}", joint) for name in ("down", "down_bias", "up", "up_bias", "gain", "bias")}
        width = output.shape[-1]
        inner = output @ found["down"].view(width, -1) + found["down_bias"]
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        states = inner @ found["up"].view(-1, width) + found["up_bias"]
        centred = states - states.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return output + normed * found["gain"] + found["bias"]


@pytest.mark.parametrize("variant", ["++", "plain"])
@torch.no_grad()
def test_every_text_gets_the_adapters_of_its_task(folder: Path, variant: str) -> None:
    method = inserted.begun(folder, "hyperformer", TASKS, variant=variant, reduction=8, embedding=5, hidden=7, projected=6)
    shake(method)
    plain, texts = WithHyperNetworks(folder, weights_of(method), variant), batch(TASK_INDEX)
    generated, expected = [], []
    for task, (ids, target) in zip(TASK_INDEX, rows(texts), strict=True):
        plain.task = task
        expected.append(plain.log_likelihood(ids, target))
        generated.append(method.backbone.tokenizer.decode(plain.greedy(ids, 4), skip_special_tokens=True))
    torch.testing.assert_close(method(texts).log_likelihood[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert method.generate(texts, 4) == generated
    other = method(batch((0, 0, 0, 0))).log_likelihood[0]
    assert [bool(torch.isclose(a, b)) for a, b in zip(other, method(texts).log_likelihood[0], strict=True)] == [
        False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(("variant", "of_networks"), [("++", 5_162_928), ("plain", 10_241_248)])
def test_the_hyper_networks_count_as_published_on_the_shape_of_t5_base(
    tmp_path: Path, variant: str, of_networks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shapes the networks have: two linear layers, a norm, embeddings, and per writer six linear layers."""
    width, inner, blocks, embedding, hidden, joint = 768, 24, 12, 64, 128, 64
    parts, writers = (3, 1) if variant == "++" else (2, 2)
    adapters = 2 * width * inner + inner + width + 2 * width
    network = blocks * embedding + (2 * embedding if variant == "++" else 0)
    network += (parts * embedding + 1) * hidden + (hidden + 1) * joint + 2 * joint + writers * (joint + 1) * adapters
    assert 2 * network == of_networks
    # The same formula counts what the method really made on the tiny T5.
    method = inserted.begun(tiny_t5.make(tmp_path / "t5"), "hyperformer", TASKS, variant=variant)
    width, inner, blocks = 32, 1, 2
    adapters = 2 * width * inner + inner + width + 2 * width
    network = blocks * embedding + (2 * embedding if variant == "++" else 0)
    network += (parts * embedding + 1) * hidden + (hidden + 1) * joint + 2 * joint + writers * (joint + 1) * adapters
    assert method.num_trainable() == 2 * network + 3 * embedding + 12 * 32


def test_embeddings_start_normal_and_layers_small(folder: Path) -> None:
    trained = inserted.begun(folder, "hyperformer", TASKS).snapshot()
    for name, tensor in trained.items():
        if name == "tasks" or name.endswith(("blocks", "positions")):
            assert float(tensor.std()) == pytest.approx(1.0, abs=0.2)
        elif name.endswith(".norm.weight"):
            assert bool((tensor == 1).all())
        elif name.startswith("norms.") or name.endswith("bias"):
            assert not tensor.any()
        else:
            assert float(tensor.std()) == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("name", ["hyperformer", "hyperdecoder"])
def test_label_smoothing_is_the_mixture_with_all_pieces(folder: Path, name: str) -> None:
    method, texts = inserted.begun(folder, name, label_smoothing=0.1), batch()
    method.reduction = "token_mean"
    forward = method(texts)
    total = torch.zeros((), dtype=torch.float64)
    for logits, (_, target), weight in zip(forward.logits[0].detach().double(), rows(texts), texts.weight, strict=True):
        logs = logits[: len(target)].log_softmax(-1)
        tokens = [0.9 * logs[place, token] + 0.1 * logs[place].mean() for place, token in enumerate(target.tolist())]
        total -= weight * sum(tokens) / len(tokens)
    torch.testing.assert_close(method.loss(forward, texts).double(), total, rtol=1e-5, atol=1e-6)
    plain = inserted.begun(folder, name)
    plain.reduction = "token_mean"
    unsmoothed = sequence_log_likelihood(forward.logits[0], texts.target_ids, "token_mean")
    torch.testing.assert_close(plain.loss(plain(texts), texts), -(unsmoothed * texts.weight).sum())
