"""The miniature world: text tasks made by a grammar, a tokenizer, and a tiny T5 pretrained on that grammar."""

from __future__ import annotations

from pathlib import Path

BACKBONE: Path = Path(__file__).parent / "backbone"
TASKS: Path = Path(__file__).parent / "tasks.yaml"
