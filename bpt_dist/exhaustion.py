"""Out of memory, said so that a user can mend it: which rank, which step, a batch of which shape."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bpt_dist.errors import OutOfMemory
from bpt_dist.mesh import World

# The words of the CPU allocator, of the C++ library and of the kernel; accelerators raise torch.OutOfMemoryError.
SIGNS = ("can't allocate memory", "not enough memory", "bad allocation", "std::bad_alloc", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory has run out, on whatever device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def named(world: World, place: str, shape: str, remedy: str) -> Iterator[None]:
    """Raise OutOfMemory, with rank, `place`, batch `shape` and `remedy`, when the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Its frames hold the tensors of the pass, and what follows (status, logs) needs some memory, too.
        traceback.clear_frames(error.__traceback__)
        where = f"rank {world.rank} on {world.hosts[world.rank]}"
        raise OutOfMemory(f"{where}: out of memory at {place}, {shape}; {remedy}; the same command resumes") from error
