"""A frozen T5 of a true shape with random weights: nothing is downloaded, and no time depends on the values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bpt_dist.backbone import DTYPES, Backbone
from bpt_dist.backbone_shapes import T5Shape
from bpt_dist.data.prepared import default_cache
from bpt_dist.packed import PackedT5
from bpt_dist.packed_attention import probed


class _NoTokenizer:
    """Stands where texts are token ids from the start."""

    def get_vocab(self) -> dict[str, int]:
        return {}

    def batch_decode(self, rows: Tensor, **_options: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows.tolist()]


def random_backbone(shape: T5Shape, device: torch.device, seed: int = 0) -> Backbone:
    """Return a T5 of that shape in float32, frozen and in eval mode, with the weights that `seed` gives on every machine."""
    torch.manual_seed(seed)
    config = copy.deepcopy(shape.config)
    model: Any = T5ForConditionalGeneration(config)
    return _backbone(model.to(device), device)


def in_dtype(backbone: Backbone, dtype: str) -> Backbone:
    """Return a T5 of its own with the same weights in another dtype (`fp32`, `bf16`, or `fp64` to measure against)."""
    wanted = torch.float64 if dtype == "fp64" else DTYPES[dtype]
    model: Any = copy.deepcopy(backbone.model)
    return _backbone(model.to(wanted), backbone.device)


def _backbone(model: Any, device: torch.device) -> Backbone:
    found = Backbone(model, _NoTokenizer(), name="random weights", path="", identity="")
    found.device = device
    return found


def use_attention(backbone: Backbone, kind: str) -> None:
    """Let the stock modules compute attention by `sdpa` or `eager`."""
    model: Any = backbone.model
    model.set_attn_implementation(kind)


def our_pass(backbone: Backbone) -> PackedT5:
    """Return our own pass over these weights, with the attention that a training run would choose here."""
    backbone.pack(probed(backbone.device, backbone.model.dtype, default_cache()))
    found, backbone.packed = backbone.packed, None
    assert found is not None
    return found
