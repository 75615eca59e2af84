"""Small tensors of the host go to the device without the host waiting: from pinned memory, several of a pass as one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def send(tensor: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Return a tensor on `device`. A copy from other than pinned memory would let the host wait for all a GPU has yet to do."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send_together(tensors: Sequence[Int[Tensor, "..."]], device: torch.device) -> list[Int[Tensor, "..."]]:
    """Return integer tensors of the host on `device`; a GPU gets them in one copy, of which the results are views."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sent = send(torch.cat([tensor.reshape(-1) for tensor in tensors]), device).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(sent, tensors, strict=True)]
