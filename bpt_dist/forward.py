"""What a pass through the T5 takes and yields, whichever code makes the pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

EncoderInputs = Callable[[Tensor], Tensor]  # embeds [N, T, D] -> inputs [m, N, L, D], L >= T: what is added comes first


@dataclass(frozen=True)
class Forward:
    """The results of one pass for m particles and N texts."""

    log_likelihood: Float[Tensor, "m N"]
    make_logits: Callable[[], Float[Tensor, "m N U V"]]
    # On request, the last hidden states of encoder [m, N, L, D] and decoder [m, N, U, D].
    states: tuple[Float[Tensor, "m N L D"], Float[Tensor, "m N U D"]] | None = None

    @property
    def logits(self) -> Float[Tensor, "m N U V"]:
        """Return the logits of every target position; where a target has none (padding) they mean nothing."""
        return self.make_logits()
