"""The make-believe GPU finds what a real one would refuse or wait for: every mistake planted here, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from make_believe_gpu import GPU, MakeBelieveGpu, is_on_gpu
from torch import Tensor, nn

from bpt_dist.svgd import median

Mistake = Callable[[Tensor, Tensor], object]  # of a tensor on the GPU and one on the CPU, [3, 4] both


@pytest.fixture
def gpu() -> Iterator[MakeBelieveGpu]:
    with MakeBelieveGpu() as found:
        yield found


@pytest.fixture
def there(gpu: MakeBelieveGpu) -> Tensor:
    return torch.ones(3, 4).to(GPU)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda there, here: there + here,
        lambda there, here: here.add_(there),
        lambda there, here: there @ here.mT,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.stack([there[0], here[0]]),
        lambda there, here: there.index_select(0, torch.tensor([1])),
        lambda there, here: torch.where(here > 0, there, 0.0),
        lambda there, here: there.masked_fill(here > 0, 0.0),
        lambda there, here: torch.nn.functional.embedding(torch.tensor([1]), there),
        torch.nn.functional.linear,
        lambda there, here: here[torch.tensor([0, 1], device=GPU)],
        lambda there, here: torch.tensor(1.0).add_(there.sum()),
        lambda there, here: there + torch.zeros(3, 4),
        lambda there, here: there.view(-1)[:4] + torch.arange(4),
        lambda there, here: there + here.to(GPU).cpu(),
        lambda there, here: nn.Linear(4, 2)(there),
        lambda there, here: torch._foreach_add([there, there], [there, here]),
        lambda there, here: torch.randn(3, generator=torch.Generator(), device=GPU),
        lambda there, here: there.numpy(),
    ],
)
def test_a_mixture_of_devices_is_found(gpu: MakeBelieveGpu, there: Tensor, mistake: Mistake) -> None:
    mistake(there, torch.ones(3, 4))
    (line,) = gpu.notes.mismatches
    assert "test_make_believe_gpu.py:" in line


def test_a_mixture_in_the_backward_pass_is_found(gpu: MakeBelieveGpu, there: Tensor) -> None:
    class Mixes(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(context: object, *gradients: Tensor) -> Tensor:
            return gradients[0] * torch.ones(4)

    Mixes.apply(there.requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]
    assert len(gpu.notes.mismatches) == 1


@pytest.mark.parametrize(
    "waits",
    [
        lambda there: there[0, 0].item(),
        lambda there: float(there.sum()),
        lambda there: bool((there > 0).all()),
        lambda there: there.tolist(),
        lambda there: there.cpu(),
        lambda there: there.to("cpu"),
        lambda there: torch.zeros(3, 4).copy_(there),
        lambda there: there.nonzero(),
        lambda there: there[there > 0],
        lambda there: there.masked_select(there > 0),
        lambda there: there.unique(),
        lambda there: torch.equal(there, there),
        lambda there: there[torch.tensor([0, 1])],
        lambda there: torch.tensor([1.0], device=GPU),
        lambda there: there.new_tensor([1.0]),
        lambda there: torch.zeros(3).to(GPU),
        lambda there: torch.zeros(3).to(GPU, non_blocking=True),
        lambda there: torch.zeros(3).pin_memory().to(GPU),
        lambda there: there.copy_(torch.zeros(3, 4)),
        lambda there: [1, 2][there.argmax()],
    ],
)
def test_a_wait_is_found_and_its_line(gpu: MakeBelieveGpu, there: Tensor, waits: Callable[[Tensor], object]) -> None:
    gpu.forget()
    waits(there)
    assert sum(gpu.notes.waits.values()) == 1
    assert all("test_make_believe_gpu.py:" in line for line in gpu.notes.waits)
    assert not gpu.notes.mismatches


def test_what_is_right_is_left_alone(gpu: MakeBelieveGpu, there: Tensor) -> None:
    gpu.forget()
    pinned = torch.arange(3).pin_memory().to(GPU, non_blocking=True)
    there.index_select(0, pinned)
    there * torch.tensor(2.0)  # CUDA takes numbers of the CPU
    there + torch.zeros(3, 4, device=GPU)
    there.new_zeros(3, 4) + torch.zeros_like(there) + torch.full((3, 4), 1.0, device=there.device)
    assert not gpu.notes.waits
    assert not gpu.notes.mismatches
    assert sum(gpu.notes.copies.values()) == 1


def test_a_deep_copy_is_where_its_tensor_is(gpu: MakeBelieveGpu, there: Tensor) -> None:
    """transformers copies its caches of keys and values so."""
    copied, doubled = copy.deepcopy({"keys": there[1:], "values": torch.ones(2)}), there + copy.deepcopy(there)
    assert is_on_gpu(copied["keys"])
    assert not is_on_gpu(copied["values"])
    assert torch.equal(doubled.cpu(), torch.full((3, 4), 2.0))
    assert not gpu.notes.mismatches


def test_launches_are_operators_that_write(gpu: MakeBelieveGpu, there: Tensor) -> None:
    gpu.forget()
    there.view(-1).view(4, 3).mT[1:].unsqueeze(0)
    torch.empty(3, device=GPU), there.detach()
    assert gpu.notes.launches == 0
    there.add_(1).mul(2)
    assert gpu.forget().launches == 2
    torch.ones(3) + 1
    assert gpu.notes.launches == 0


def test_gradients_of_a_model_are_those_of_the_cpu_and_on_its_device(gpu: MakeBelieveGpu) -> None:
    torch.manual_seed(0)
    model, texts, targets = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(5, 4),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    torch.nn.functional.cross_entropy(model(texts), targets).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.to(GPU)
    torch.nn.functional.cross_entropy(model(texts.to(GPU)), targets.to(GPU)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 100.0)
    torch.optim.AdamW(model.parameters()).step()
    assert not gpu.notes.mismatches
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.device == GPU
        assert is_on_gpu(parameter.grad)
        torch.testing.assert_close(parameter.grad.cpu(), gradient)


def test_the_line_of_the_package_is_named(gpu: MakeBelieveGpu, there: Tensor) -> None:
    gpu.forget()
    median(there)
    assert all(line.startswith("svgd.py:") for line in gpu.notes.lines)
    with gpu.counting() as inside:
        float(median(there)[0])
    assert sum(inside.waits.values()) == 1
    assert not gpu.notes.waits
