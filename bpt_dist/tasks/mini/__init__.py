"""The miniature world: text tasks made by a grammar, a tokenizer, and a tiny T5 pretrained on that grammar."""

from __future__ import annotations

from pathlib import Path

BACKBONE: Path = Path(__file__).parent / "backbone"
TASKS: Path = Path(__file__).parent / "tasks.yaml"


def backbone_path(path: str) -> str:
    """Return where the backbone of a configuration is: `mini` is the one shipped here, all else a folder or a hub id."""
    return str(BACKBONE) if path == "mini" else path
