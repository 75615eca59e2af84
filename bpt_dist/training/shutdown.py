"""Why a job ends: the message, the exit code, and what the other ranks are told."""

from __future__ import annotations

import logging
import os
import sys
import time

from bpt_dist.distributed.mesh import World, peer_lost
from bpt_dist.errors import INTERNAL_ERROR, OutOfMemory, PeerLost, UserError, exit_code, reason_of
from bpt_dist.tracking.mirror import shutdown


def exit_job(error: Exception, world: World) -> int:
    """Say why the job ends and return its exit code; with peers, end this process at once.

    After a failed collective the process group can neither be used nor destroyed, and a rank that waits for it would hang.
    """
    if isinstance(error, RuntimeError):
        error = peer_lost(error, world) or error
    code = exit_code(error)
    if code == INTERNAL_ERROR and not isinstance(error, UserError):
        logging.getLogger(__name__).error("internal error", exc_info=error)
    elif not isinstance(error, UserError) or isinstance(error, OutOfMemory) or _reports(error, world):
        sys.stderr.write(f"{reason_of(error)}\n")
    if not isinstance(error, PeerLost):
        world.report_exit(reason_of(error))
    if world.rank == 0:
        shutdown()
    if world.size > 1 and world.rank == 0:
        time.sleep(0.5)  # this process keeps the job's store: the others still read there who is missing
    if world.size > 1:
        sys.stderr.flush()
        os._exit(code)
    return code


def _reports(error: UserError, world: World) -> bool:
    """Return whether this rank tells the user; when rank 0 has taken the job's store with it, the first one left of each host."""
    if not isinstance(error, PeerLost) or world.detector is None:
        return world.rank == 0
    return world.detector.reports(error.reporting_rank)
