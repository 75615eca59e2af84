"""What the source stage hands over: `source/posterior/{posterior.safetensors, posterior.json}`.

For prompt methods the tensors are `particles` [M, P, D] and their `mean` [P, D]; other methods name their own. The
facts beside them say which T5 and tokenizer they belong to: a prompt means nothing to another one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bpt_dist.backbone import Backbone
from bpt_dist.checkpoint import read_tensors, write_tensors_atomic
from bpt_dist.errors import ConfigError
from bpt_dist.faults import fault_point
from bpt_dist.files import read_json, write_json_atomic

TENSORS, FACTS = "posterior.safetensors", "posterior.json"


@dataclass(frozen=True)
class Posterior:
    """Tensors of a finished source stage, and what they belong to."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write both files; the facts come last and make the posterior exist (rank 0)."""
        folder.mkdir(parents=True, exist_ok=True)
        fault_point("posterior.before_write")
        write_tensors_atomic(folder / TENSORS, self.tensors)
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        write_json_atomic(folder / FACTS, {**self.facts, "shapes": shapes})

    @classmethod
    def load(cls, place: Path, backbone: Backbone) -> Posterior:
        """Read a posterior from its folder, its file or the directory of its run.

        Raises ConfigError when there is none, or when it was made with another T5 or tokenizer.
        """
        folder = _folder(place)
        facts = read_json(folder / FACTS)
        for what, own in (("backbone", backbone.identity), ("tokenizer", backbone.tokenizer_hash)):
            made_with = facts[f"{what}_hash"]
            if made_with != own:
                raise ConfigError(
                    f"source.posterior: {folder} was made with another {what} ({facts['backbone']}, hash {made_with[:12]}; "
                    f"here {backbone.name}, {own[:12]}); set backbone.path to that one, or train the source stage anew"
                )
        tensors, _ = read_tensors(folder / TENSORS)
        widths = {int(tensor.shape[-1]) for tensor in tensors.values()}
        if widths != {backbone.width}:
            raise ConfigError(f"source.posterior: {folder / TENSORS} is {widths} wide, the backbone {backbone.width}")
        return cls(tensors, facts)


def _folder(place: Path) -> Path:
    candidates = [place, place.parent if place.suffix else place / "source" / "posterior", place / "posterior"]
    for folder in candidates:
        if (folder / FACTS).is_file() and (folder / TENSORS).is_file():
            return folder
    raise ConfigError(
        f"source.posterior: no {TENSORS} with {FACTS} in {place}; give a finished run's directory or its source/posterior folder"
    )
