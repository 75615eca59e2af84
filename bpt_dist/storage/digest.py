"""One SHA-256 for tensors: what they are called, their types, shapes and values, and nothing of the file they were read from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SHORT = 12  # hexadecimal digits of a hash that a message shows


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return 64 hexadecimal digits that are equal for equal bits under equal names, on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
