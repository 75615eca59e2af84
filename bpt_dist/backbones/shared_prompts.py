"""Which prompts the inputs of a pass were made of: a family that reads a prompt once for all its texts asks for it.

Inputs are one tensor [m, N, L, D], in which a prompt is repeated before every text that has it. The note travels with that very
tensor: what is computed from it has none, and is read as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class SharedPrompts(NamedTuple):
    """The S different prompts of each particle, and which of them is before each text, which the host knows."""

    prompts: Float[Tensor, "m S P D"]
    choice: Int[Tensor, " N"]


def note_shared_prompts(
    inputs: Float[Tensor, "m N L D"], prompts: Float[Tensor, "m S P D"], choice: Int[Tensor, " N"]
) -> Float[Tensor, "m N L D"]:
    """Return `inputs` with the note that its first P positions are `prompts[:, choice]`."""
    noted: Any = inputs
    noted.shared_prompts = SharedPrompts(prompts, choice)
    return inputs


def shared_prompts_of(inputs: Float[Tensor, "m N L D"]) -> SharedPrompts | None:
    """Return what was noted of these inputs."""
    return getattr(inputs, "shared_prompts", None)
