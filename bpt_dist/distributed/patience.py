"""Time for what rank 0 does alone: a checkpoint of 12 GB, an export, figures. The others wait for it in a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bpt_dist.distributed.mesh import World
from bpt_dist.distributed.watchdog import Watchdog


@contextmanager
def while_rank_0_works(world: World, watchdog: Watchdog, place: str) -> Iterator[None]:
    """Let ranks wait up to `storage_timeout` for rank 0 inside, not only `step_timeout` (every rank enters).

    `place` says in messages what rank 0 does. A rank 0 that ended or was stopped is still noticed within `step_timeout`: it beats.
    """
    watchdog.heartbeat(place)
    world.set_location(place)
    with watchdog.patience(), world.patience(watchdog.storage_timeout):
        yield
