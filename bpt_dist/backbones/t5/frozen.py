"""Products with the weights of frozen layers that may be whole only while their module runs.

ZeRO and FSDP2 gather the weights of a block for its `forward`, release them, and gather them again for its part of the backward
pass. So our own computation is given to the module (`Runs`), and no product keeps a weight for the backward pass: it asks the layer
for it again, at a moment when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpt_dist.backbones.base import is_partitioned


class Runs(nn.Module):
    """A module whose `forward` runs what it is given, with the module's weights whole, instead of its own computation."""

    def forward(self, *args: Any, run: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Return `run(*args)`, or without `run` what the module computes."""
        if run is not None:
            return run(*args)
        stock: Any = super().forward
        return stock(*args, **kwargs)


class _Product(torch.autograd.Function):
    """x W, where W is made again for the backward pass; for matrices, or for one matrix a head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return x @ weight()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.weight().mT, None


def product(x: Float[Tensor, "*b n i"], weight: Callable[[], Tensor]) -> Float[Tensor, "*b n o"]:
    """Return x times the matrix that `weight` makes; nothing of the weight is kept for the backward pass."""
    result: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


class FrozenLinear:
    """Linear layers on the same input as one product: their outputs are side by side."""

    def __init__(self, *layers: Any) -> None:
        self.layers = layers
        is_whole = not any(is_partitioned(layer.weight) for layer in layers)
        # Those of partitioned layers are joined when they are whole: seen as one if they were gathered in one piece, else copied.
        self._kept = joined(layers) if is_whole else None

    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weights below each other; only while the layers are whole."""
        if self._kept is not None:
            return self._kept
        weights = [layer.weight for layer in self.layers]
        if len(weights) == 1:
            return weights[0]
        together = side_by_side(weights)
        return torch.cat(weights) if together is None else together

    def __call__(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        """Return the outputs of all layers."""
        return product(x, self._transposed)

    def _transposed(self) -> Tensor:
        return self.weight().mT


def side_by_side(weights: Sequence[Tensor]) -> Float[Tensor, "outputs inputs"] | None:
    """Return weights that lie one behind the other in one piece of memory as one matrix, not copied; None if they do not."""
    first, place = weights[0], weights[0].data_ptr()
    for weight in weights:
        is_next = weight.data_ptr() == place and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (is_next and weight.is_contiguous()):
            return None
        place += weight.nbytes
    num_rows = sum(len(weight) for weight in weights)
    return first.detach().as_strided((num_rows, first.shape[1]), first.stride(), first.storage_offset())


def joined(layers: Sequence[Any]) -> Float[Tensor, "outputs inputs"]:
    """Return the weights of linear layers below each other; the layers become views of them, so there is no second copy."""
    first = layers[0]
    if len(layers) == 1:
        weight: Tensor = first.weight
        return weight
    size = sum(layer.weight.numel() for layer in layers)
    storage = first.weight.untyped_storage()
    together = first.weight.data_ptr() == storage.data_ptr() and all(
        layer.weight.untyped_storage().data_ptr() == storage.data_ptr() for layer in layers
    )
    if not together or storage.nbytes() != size * first.weight.element_size():
        weights = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, weights.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part
    return first.weight.detach().as_strided((size // first.weight.shape[1], first.weight.shape[1]), first.weight.stride())


class _Norm(torch.autograd.Function):
    """x / rms(x) * gain; keeps one tensor for the backward pass, and x may be changed in place afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, dtype: torch.dtype) -> Tensor:
        # One pass over x and no temporary, unlike the mean of squares.
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(layer.variance_epsilon)
        scale = scale.rsqrt_()
        normed = x * scale
        kept = normed.to(dtype)
        ctx.save_for_backward(kept, scale)
        ctx.layer = layer
        gain = layer.weight.float()
        # In float32 `kept` is `normed` itself, which a backward pass will read.
        is_read = kept is normed and any(ctx.needs_input_grad)
        return normed * gain if is_read else normed.mul_(gain).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale = ctx.saved_tensors
        grad = grads[0] * ctx.layer.weight.float()
        inner = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, inner, value=-1).mul_(scale), None, None


class _FusedNorm(torch.autograd.Function):
    """The same by one kernel of a GPU each way; it keeps x, which must stay as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        normed, scale = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], layer.weight.float(), layer.variance_epsilon)
        ctx.save_for_backward(x, scale)
        ctx.layer = layer
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        gain, wanted = ctx.layer.weight.float(), [True, False]
        grad, _ = torch.ops.aten._fused_rms_norm_backward(grads[0], x, [x.shape[-1]], scale, gain, wanted)
        return grad, None


def norm(x: Float[Tensor, "*rows D"], layer: Any, dtype: torch.dtype) -> Float[Tensor, "*rows D"]:
    """Return T5's layer norm (Zhang & Sennrich 2019: no mean is subtracted) of float32 x in `dtype`, computed in float32."""
    normed: Tensor
    if x.is_cuda:  # a CPU has no such kernel, and computes it in more passes over x than `_Norm`
        normed = _FusedNorm.apply(x, layer)  # type: ignore[no-untyped-call]
        return normed.to(dtype)
    normed = _Norm.apply(x, layer, dtype)  # type: ignore[no-untyped-call]
    return normed
