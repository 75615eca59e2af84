"""Load the frozen model that exported prompts belong to."""

from __future__ import annotations

from pathlib import Path

import torch

from bpt_dist.artifacts.inference.exports import Export
from bpt_dist.backbones import loading
from bpt_dist.backbones.attention import default_attention
from bpt_dist.backbones.base import Backbone
from bpt_dist.errors import ConfigError
from bpt_dist.tasks import mini


def load_backbone(export: Export, path: str | None = None, *, device: str | None = None) -> Backbone:
    """Load the backbone that an export names, or the one in `path`, ready for the fast pass, on a GPU where there is one.

    Raises ConfigError where it cannot be loaded. Whether it is the right one is checked by the Predictor, for every prompt.
    """
    entry = export.record.backbone
    place = path or _place_now(entry.path)
    revision = entry.revision if path is None else None
    try:
        backbone = loading.load(place, revision=revision, dtype=entry.dtype)
    except ConfigError as error:
        raise ConfigError(f"{error}; or name the place of the backbone of {export.folder} by --backbone PATH") from error
    backbone.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone.core.to(backbone.device)
    backbone.use_packed_pass(default_attention(backbone.device, backbone.dtype))
    return backbone


def _place_now(path: str) -> str:
    """Return where a backbone is on this machine: the one of the miniature world comes with the package."""
    own = mini.backbone_path("mini")
    moved = not Path(path).exists() and Path(path).parts[-3:] == Path(own).parts[-3:]
    return own if moved else path
