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

from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.adapters import Adapters


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


class WithOneAdapterATask(WithAdapters):
    """Each text passes the adapter of its own task; the gains of the norms are those of all tasks."""

    def of_task(self, task: int) -> WithAdapters:
        own = {name: tensor[task] if name.startswith("adapters.") else tensor for name, tensor in self.trained.items()}
        alone = WithAdapters(self.folder, {name: tensor for name, tensor in own.items() if name.startswith("adapters.")})
        alone.weights = self.weights
        return alone

    def __init__(self, folder: Path, trained: dict[str, Tensor]) -> None:
        super().__init__(folder, trained)
        self.folder = folder


@torch.no_grad()
def test_targets_trained_together_have_an_adapter_each_and_share_the_norms(folder: Path) -> None:
    """The published row of several targets: HyperFormer's "adapter dagger"."""
    tasks, task_index = ("mood", "count", "truth"), (2, 0, 1, 0)
    method = inserted.begun(folder, "adapters", tasks, reduction=8)
    shake(method)
    plain = WithOneAdapterATask(folder, weights_of(method))
    texts = batch(task_index)
    expected = [plain.of_task(task).log_likelihood(*row) for task, row in zip(task_index, rows(texts), strict=True)]
    torch.testing.assert_close(method(texts).log_likelihood[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert method.generate(texts, 4) == [
        method.backbone.tokenizer.decode(plain.of_task(task).greedy(ids, 4), skip_special_tokens=True)
        for task, (ids, _) in zip(task_index, rows(texts), strict=True)
    ]
    one_task = batch((1, 1, 1, 1))
    expected = [plain.of_task(1).log_likelihood(*row) for row in rows(one_task)]
    torch.testing.assert_close(method(one_task).log_likelihood[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_an_adapter_a_task_learns_from_its_own_texts_alone_and_starts_elsewhere(folder: Path) -> None:
    method = inserted.begun(folder, "adapters", ("mood", "count", "truth"))
    down = [tensor for name, tensor in method.named_parameters() if name.endswith("/down")]
    assert all(not torch.equal(tensor[0], tensor[1]) for tensor in down)
    method(batch((0, 2, 0, 2))).log_likelihood.sum().backward()
    for name, tensor in method.named_parameters():
        if name.startswith("adapters.") and name.endswith("/up"):
            assert [bool(tensor.grad[task].any()) for task in range(3)] == [True, False, True], name


def test_with_shared_all_targets_have_one_adapter(folder: Path) -> None:
    alone = inserted.begun(folder, "adapters").num_trainable()
    shared = inserted.begun(folder, "adapters", ("mood", "count", "truth"), shared=True)
    assert shared.num_trainable() == alone
    norms = sum(tensor.numel() for name, tensor in shared.named_parameters() if name.startswith("norms."))
    apart = inserted.begun(folder, "adapters", ("mood", "count", "truth"))
    assert apart.num_trainable() == 3 * (alone - norms) + norms
    shared(batch((2, 0, 1, 0))).log_likelihood.sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for name, tensor in shared.named_parameters() if "up" in name)


@pytest.mark.parametrize("shared", [True, False])
def test_stored_tensors_say_whether_the_adapter_was_shared(folder: Path, shared: bool) -> None:
    """Runs of earlier versions shared one adapter without naming the option."""
    trained = inserted.begun(folder, "adapters", ("mood", "count"), shared=shared).snapshot()
    assert Adapters.options_of_stored({"reduction": 32}, trained) == {"reduction": 32, "shared": shared}


def test_a_joint_stage_trains_the_norms_without_touching_the_backbone(folder: Path) -> None:
    method = inserted.begun(folder, "adapters", ("mood", "count", "truth"))
    method(batch()).log_likelihood.sum().backward()
    assert sum(name.startswith("norms.") for name, _ in method.named_parameters()) == 2 * 2 + 2 * 3 + 2
    assert all(bool(parameter.grad.any()) for name, parameter in method.named_parameters() if name.startswith("norms."))
    method.precondition_(Mesh())
    method.backbone.verify_unchanged()
