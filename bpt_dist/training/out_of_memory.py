"""Out of memory, reported with the rank, the step and the shape of the batch."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bpt_dist.distributed.mesh import World
from bpt_dist.errors import OutOfMemory, UserError

# The words of the CPU allocator, of the C++ library and of the kernel; accelerators raise torch.OutOfMemoryError.
SIGNS = ("can't allocate memory", "not enough memory", "bad allocation", "std::bad_alloc", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory has run out, on whatever device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def explain_out_of_memory(world: World, place: str, shape: str, remedy: str) -> Iterator[None]:
    """Raise OutOfMemory, with rank, `place`, batch `shape` and `remedy`, when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _explained(error, world, f"{place}, {shape}", remedy) from error


def out_of_memory(error: BaseException, world: World) -> OutOfMemory | None:
    """Return what to raise for an error outside the passes (kernel, optimizer, checkpoint); None for any other error."""
    if isinstance(error, UserError) or not is_out_of_memory(error):
        return None
    remedy = "start more processes, set distribution.shard, or lower method.num_particles (`bpt-dist plan` shows what takes memory)"
    return _explained(error, world, f"{world.progress.place or 'the start'}, outside the passes", remedy)


def _explained(error: BaseException, world: World, place: str, remedy: str) -> OutOfMemory:
    # Its frames hold the tensors of the pass, and what follows (status, logs) needs some memory, too.
    traceback.clear_frames(error.__traceback__)
    where = f"rank {world.rank} on {world.hosts[world.rank]}"
    return OutOfMemory(f"{where}: out of memory at {place}; {remedy}, and rerun the same command to resume")
