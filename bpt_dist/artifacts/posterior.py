"""What the source stage hands over: `source/posterior/{posterior.safetensors, posterior.json}`.

Each method names its own tensors: `particles` [M, P, D] and their `mean` [P, D], or one prompt for each source task. The facts
beside them name the method that made them and the backbone and tokenizer they belong to: a prompt means nothing to another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bpt_dist.artifacts.hub import local_folder, real_file
from bpt_dist.backbones.base import Backbone
from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout
from bpt_dist.storage.checkpoint import read_tensors, write_tensors_atomic
from bpt_dist.storage.digest import SHORT
from bpt_dist.storage.fault_injection import fault_point
from bpt_dist.storage.files import read_json, write_json_atomic


@dataclass(frozen=True)
class Posterior:
    """Tensors of a finished source stage, and what they belong to."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write both files; the facts come last and make the posterior exist (rank 0)."""
        folder.mkdir(parents=True, exist_ok=True)
        fault_point("posterior.before_write")
        write_tensors_atomic(folder / layout.POSTERIOR_TENSORS, self.tensors)
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        write_json_atomic(folder / layout.POSTERIOR_FACTS, {**self.facts, "shapes": shapes})

    @classmethod
    def read(cls, place: Path) -> Posterior:
        """Read a posterior from its folder or file, the directory of its run, or the hub. Raises ConfigError when there is none."""
        folder = _folder(place)
        tensors, _ = read_tensors(real_file(folder / layout.POSTERIOR_TENSORS))
        return cls(tensors, read_json(real_file(folder / layout.POSTERIOR_FACTS)))

    @classmethod
    def load(cls, place: Path, backbone: Backbone) -> Posterior:
        """Read a posterior as `read` does. Raises ConfigError when it was made with another backbone or tokenizer."""
        posterior = cls.read(place)
        for what, here in (("backbone", backbone.identity), ("tokenizer", backbone.tokenizer_hash)):
            made_with = posterior.facts[f"{what}_hash"]
            if made_with != here:
                raise ConfigError(
                    f"source.posterior: {_folder(place)} was made with another {what} ({posterior.facts['backbone']}, hash "
                    f"{made_with[:SHORT]}; here {backbone.name}, {here[:SHORT]}); set backbone.path to that one, or train the "
                    "source stage again"
                )
        return posterior

    def require(self, method: str, needed: Mapping[str, str], width: int) -> None:
        """Raise ConfigError unless `method` can start from these tensors.

        `needed` gives the axes of each tensor, as in "K P D": D is `width`, every other letter has one size throughout. Further
        tensors may be there. A method that needs nothing by name starts from its own posteriors only.
        """
        maker = self.facts["method"]
        sizes, shapes = {"D": width}, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if needed and all(name in shapes and _fits(shapes[name], axes.split(), sizes) for name, axes in needed.items()):
            return
        if not needed and maker == method:
            return
        holds = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
        wanted = ", ".join(f"{name} [{', '.join(axes.split())}]" for name, axes in needed.items()) or "its own tensors"
        raise ConfigError(
            f"source.posterior: was made by method {maker} and holds {holds}; method {method} starts from {wanted}, D being "
            f"{width}; give a posterior that has them, or train the source stage again"
        )

    def agree(self, config: RunConfig, needed: Mapping[str, str]) -> None:
        """Raise ConfigError where a run has another protocol or another length P of prompts than the posterior.

        What else is set for the source stage cannot be told from its tensors and says how a posterior would be made.
        """
        learnt, asked = self.facts.get("protocol"), config.data.protocol  # posteriors of earlier versions do not name it
        if learnt not in (None, asked):
            raise ConfigError(
                f"data.protocol: is {asked}, the source.posterior was learnt from texts of {learnt}; set it to {learnt}"
            )
        wanted = getattr(config.method, "prompt_length", None)
        for name, axes in ((name, axes.split()) for name, axes in needed.items()):
            length = self.tensors[name].shape[axes.index("P")] if "P" in axes else None
            if None not in (wanted, length) and wanted != length:
                raise ConfigError(
                    f"method.length: is {wanted}, the prompts of source.posterior have {length} positions; set it to {length}, or "
                    "train the source stage again"
                )


def _fits(shape: Sequence[int], axes: Sequence[str], sizes: dict[str, int]) -> bool:
    """Return whether a shape has these axes; letters met for the first time enter `sizes`."""
    return len(shape) == len(axes) and all(sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True))


def _folder(place: Path) -> Path:
    place = local_folder(place, "source.posterior: ")
    candidates = [place, place.parent if place.suffix else place / layout.SOURCE / layout.POSTERIOR, place / layout.POSTERIOR]
    for folder in candidates:
        if (folder / layout.POSTERIOR_FACTS).is_file() and (folder / layout.POSTERIOR_TENSORS).is_file():
            return folder
    raise ConfigError(
        f"source.posterior: no {layout.POSTERIOR_TENSORS} with {layout.POSTERIOR_FACTS} in {place}; give a finished run's "
        "directory, its source/posterior folder, or the owner/name of a repository of the hub"
    )
