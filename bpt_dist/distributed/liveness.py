"""Which processes of this host have ended: the kernel tells at once, also where no collective waits for them."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class RankProcess(NamedTuple):
    """The process of one rank: its host, its id there, and when it started (ticks since the host's start, as /proc gives them)."""

    host: str
    pid: int
    started: str | None


def this_process() -> RankProcess:
    """Return the process that runs this code."""
    return RankProcess(socket.gethostname(), os.getpid(), _started(os.getpid()))


class Neighbours:
    """The ranks of this host other than `rank`, watched through descriptors of the kernel until `close`.

    A rank of another host is not watched. Neither is one whose id names another process here: containers may share a host's name
    and not its processes.
    """

    def __init__(self, processes: Sequence[RankProcess], rank: int) -> None:
        own = processes[rank]
        self._ranks: dict[int, int] = {}
        self._poll = select.poll()
        for other, process in enumerate(processes):
            if other == rank or process.host != own.host or process.started is None or _started(process.pid) != process.started:
                continue
            with contextlib.suppress(OSError, AttributeError):  # an old kernel, another system: the collectives find out
                descriptor = os.pidfd_open(process.pid)
                self._ranks[descriptor] = other
                self._poll.register(descriptor, select.POLLIN)

    def ended(self) -> list[int]:
        """Return the ranks whose process has ended."""
        return sorted(self._ranks[descriptor] for descriptor, _ in self._poll.poll(0)) if self._ranks else []

    def close(self) -> None:
        """Stop watching."""
        for descriptor in self._ranks:
            self._poll.unregister(descriptor)
            os.close(descriptor)
        self._ranks = {}


def _started(pid: int) -> str | None:
    """Return when a process started, None where there is no such process or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
