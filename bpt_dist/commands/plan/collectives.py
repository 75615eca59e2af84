"""What the ranks of a planned run send one another in a step; `distributed/traffic.py` counts the same in a running one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.backbones.shared_prompts import shared_prompts_of
from bpt_dist.config import RunConfig
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.exchange import slices
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method
from bpt_dist.training.sharding.passes import num_sharers

WORD = 8  # bytes of the float64 numbers that ranks agree on
ROWS = "all-to-all of rows of word embeddings, at most"
LOSS = 4  # bytes of a loss that travels with a gradient


@dataclass(frozen=True)
class Collective:
    """One kind of communication: how often in a step, and how many bytes a rank receives from others in the step.

    An all-reduce brings 2 (W - 1)/W of its tensor, as a ring sends it.
    """

    name: str
    calls: int
    bytes: int


def added(method: Method, num_tasks: int) -> tuple[int, int, int]:
    """Return how many particles a method puts before a text, how many positions each adds, and how many prompts a pass shares.

    The pass has a text of each task; no prompts are shared where each text has one of its own.
    """
    ids, tasks = torch.zeros(num_tasks, 1, dtype=torch.long), torch.arange(num_tasks)
    batch = Batch(0, ids, torch.ones_like(ids), ids, tasks, ("plan",) * num_tasks, torch.ones(num_tasks))
    with torch.no_grad():
        inputs = method.input_embeds(torch.zeros(num_tasks, 1, method.backbone.width), batch)
    shared = shared_prompts_of(inputs)
    return inputs.shape[0], inputs.shape[2] - 1, 0 if shared is None else len(shared.choice.unique())


def trained_bytes(method: Method, mesh: Mesh, particles: int | None = None) -> int:
    """Return the bytes of one copy of what a rank of `mesh` trains, or of so many of its particles; float32 in every backbone."""
    total = 0
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            split = mesh.particle.size if name in method.particle_tensors else 1
            if name in method.particle_tensors and particles is not None:
                split = len(parameter) // particles
            total += parameter.numel() * torch.float32.itemsize // split
    return total


def collectives(
    method: Method,
    mesh: Mesh,
    num_tasks: int,
    copies: int,
    num_passes: int,
    num_looked_up: int,
    config: RunConfig,
    shape: ModelShape,
) -> list[Collective]:
    """Return what the ranks send one another in every step; a rank looks up the word embeddings of so many tokens in its passes."""
    size = mesh.world.size
    if size == 1:
        return []
    exact = config.distribution.exact
    # Calls made, step, seconds, stop, not finite, whose rows; and for each task (with `exact` of each particle) a sum and a count.
    kept = num_tasks * (copies if exact else 1)
    found = [Collective("all-gather of flags and losses", 1, (size - 1) * WORD * (6 + 2 * kept))]
    if mesh.data.size > 1 and exact:
        sent = trained_bytes(method, mesh, particles=1) + LOSS
        received = num_passes * (mesh.data.size - 1) * sent
        found.append(Collective("all-gather of gradients over data, pass by pass", num_passes, received))
    elif mesh.data.size > 1:
        # Behind the gradients goes, for each tensor, whether there is one.
        summed = trained_bytes(method, mesh) + torch.float32.itemsize * sum(p.requires_grad for p in method.parameters())
        found.append(Collective("all-reduce of gradients over data", 1, round(2 * summed * _others(mesh.data.size))))
    if mesh.particle.size > 1:
        found += _exchange(method, mesh, copies, getattr(config.method, "scope", "prompt"))
    sharers = num_sharers(config, mesh.world.hosts, size)
    if sharers > 1:
        forwards = 1 + method.extra_forwards
        shard, ours = config.distribution.shard, config.distribution.zero_config is None and not config.method.TRAINS_BACKBONE
        whole = num_passes * shape.gathered_in_a_pass(shard, forwards, prefetched=ours)
        calls = num_passes * (forwards + 1) * sum(shape.num_blocks)
        found.append(Collective(f"all-gather of {shape.noun} blocks, forward and backward", calls, round(whole * _others(sharers))))
        if not config.method.TRAINS_BACKBONE:
            times = num_passes * forwards * shape.lookups
            found.append(Collective(ROWS, 3 * times, _bytes_of_rows(shape, num_looked_up * forwards, times, sharers)))
    return found


def _bytes_of_rows(shape: ModelShape, num_tokens: int, times: int, sharers: int) -> int:
    """Return the most that a rank receives for `num_tokens` that it looks up at so many `times`: rows, and what others ask for."""
    # Padding is looked up, too.
    num_rows = min(num_tokens + times, times * shape.config.vocab_size)
    return num_rows * (shape.feed_forward[0] * shape.item_bytes + WORD) + times * (sharers - 1) * WORD


def _others(size: int) -> float:
    """Return the share of a gathered tensor that the others hold."""
    return (size - 1) / size


def _exchange(method: Method, mesh: Mesh, copies: int, scope: str) -> list[Collective]:
    """Return what the Stein direction needs of the ranks along `particle`."""
    size, whole = mesh.particle.size, trained_bytes(method, Mesh())
    if mesh.exchange == "all_gather":
        return [Collective("all-gather of particles and of scores", 2, round(2 * whole * _others(size)))]
    num_positions = added(method, 1)[1]
    widest = max(part.stop - part.start for part in slices(num_positions, size))
    # The rank of the widest slice gets that of the others' particles and scores, and of its own directions the other slices.
    own_directions = trained_bytes(method, mesh) * (1 - widest / num_positions)
    received = 2 * widest * (whole // num_positions) * _others(size) + own_directions
    found = [Collective("all-to-all of particles, of scores and of directions", 3, round(received))]
    if scope == "prompt":
        found.append(Collective("all-reduce of squared distances", 1, round(2 * WORD * copies**2 * _others(size))))
    return found
