"""How many sequences a pass takes where the backbone is partitioned: as many as fit, because every pass gathers all weights.

Where the backbone is whole a pass takes 8,192 tokens: smaller passes cost nothing there. `pass_size` replaces either rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.config import RunConfig

# Of the memory of a process that weights and runtime leave free; the rest is for trained tensors, evaluations and fragmentation.
SHARE = 0.5
RUNTIME_BYTES = 600 << 20  # interpreter and libraries of a process, or the context of a GPU


def sequences_that_fit(
    config: RunConfig, shape: ModelShape, memory: int, sharers: int, lengths: tuple[int, int, int], most: int
) -> int | None:
    """Return the most sequences of a pass whose activations take SHARE of what is free; None where `most` of them do.

    `memory` is that of the process with the least, in bytes; `sharers` hold one backbone between them; `lengths` are those of the
    longest prompt, source and target of the stage, in tokens. Every rank gets the same number.
    """
    again, trained = config.distribution.activation_checkpointing, config.method.TRAINS_BACKBONE
    of_one = shape.row_cost(*lengths, trains_weights=trained, recomputed=again).activation_bytes
    weights = shape.weight_bytes // sharers + (shape.gathered_bytes if sharers > 1 else 0)
    fits = max(1, int(SHARE * (memory - RUNTIME_BYTES - weights)) // of_one)
    return None if fits >= most else fits


def num_sharers(config: RunConfig, hosts: Sequence[str], world_size: int) -> int:
    """Return how many ranks hold one backbone between them, on the smallest of the hosts of all ranks."""
    distribution = config.distribution
    return {"none": 1}.get(distribution.shard, min(Counter(hosts).values()) if distribution.scope == "node" else world_size)
