"""Frozen parts of weights in files of memory without a name, which the other ranks of a host read instead of being sent them."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from bpt_dist.distributed.traffic import WEIGHTS, note_read

ALIGNMENT = 64  # bytes; what the products of a CPU like
KEY_BYTES = 16  # at the beginning of a file, because processes of other containers may have the same number


class Offer(NamedTuple):
    """Where another process finds a file; the process and the descriptor are those of the rank that holds it."""

    host: str
    process: int
    file: int
    key: bytes


class HostMemory:
    """This rank's parts, which must not change if they are offered, and the files with those of the other ranks of its host.

    Nothing has to be waited for: what a rank offers is complete before anyone hears of it. The memory lives as long as a rank that
    has opened it, also when the rank that held it is killed.
    """

    def __init__(self, parts: Sequence[Float[Tensor, " n"]], ranks: Any, hosts: Sequence[str], *, offered: bool = True) -> None:
        """Copy the parts into a file if they are `offered`, and open the others' (collective: every rank of `ranks`).

        `parts` have the same lengths on every rank. `hosts` are those of all ranks of the job.
        """
        members = dist.get_process_group_ranks(dist.group.WORLD if ranks is None else ranks)
        rank, host = dist.get_rank(ranks), hosts[dist.get_rank()]
        ends = list(itertools.accumulate((_aligned(part.nbytes) for part in parts), initial=_aligned(KEY_BYTES)))
        self.offsets = ends[:-1]
        self.parts = list(parts)
        shares_host = sum(hosts[member] == host for member in members) > 1
        offer = self._write(ends[-1], host) if offered and shares_host else None
        offers: list[Offer | None] = [None] * len(members)
        dist.all_gather_object(offers, offer, group=ranks)
        self._files = [None if number == rank else _open(found, host) for number, found in enumerate(offers)]
        weakref.finalize(self, _close, [file for file in self._files if file is not None])
        readable: list[list[bool]] = [[] for _ in members]
        dist.all_gather_object(readable, [file is not None for file in self._files], group=ranks)
        self._readers = [by_it[rank] for by_it in readable]

    def may_read(self, source: int) -> bool:
        """Return whether this rank reads the parts of another; all others must be sent."""
        return self._files[source] is not None

    def is_read_by(self, target: int) -> bool:
        """Return whether another rank reads the parts of this one."""
        return self._readers[target]

    def read(self, number: int, source: int, place: Float[Tensor, " n"]) -> None:
        """Copy the beginning of a part of another rank, as much as there is place for."""
        file, done = self._files[source], 0
        assert file is not None
        # Not through numpy, whose arrays forbid that the memory is resized.
        buffer = memoryview((ctypes.c_char * place.nbytes).from_address(place.data_ptr())).cast("B")
        while done < place.nbytes:
            got = os.preadv(file, [buffer[done:]], self.offsets[number] + done)
            assert got, f"part {number} of rank {source} ends after {done} of {place.nbytes} bytes"
            done += got
        note_read(WEIGHTS, place.nbytes)

    def _write(self, size: int, host: str) -> Offer | None:
        """Move the parts into a file; None where the system has no such files or no room."""
        file, key = -1, secrets.token_bytes(KEY_BYTES)
        try:
            file = os.memfd_create("bpt_dist weights")  # closed when a program is started
            os.posix_fallocate(file, 0, size)  # no room is an error now, not a signal when a page is written
            mapped = mmap.mmap(file, size)
        except (AttributeError, OSError):
            _close([file])
            return None
        mapped[:KEY_BYTES] = key
        numbers = torch.frombuffer(mapped, dtype=torch.uint8)
        for index, (begin, part) in enumerate(zip(self.offsets, self.parts, strict=True)):
            if part.numel():
                self.parts[index] = numbers[begin : begin + part.nbytes].view(part.dtype).copy_(part.detach())
        weakref.finalize(self, _close, [file])
        return Offer(host, os.getpid(), file, key)


def _aligned(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT


def _open(offer: Offer | None, host: str) -> int | None:
    """Return a descriptor of another rank's file; None if it is on another host or may not be opened."""
    if offer is None or offer.host != host:
        return None
    try:
        # It may be anything, in another container: a pipe that nobody writes to, a terminal.
        file = os.open(f"/proc/{offer.process}/fd/{offer.file}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    with suppress(OSError):
        if os.pread(file, KEY_BYTES, 0) == offer.key:
            return file
    _close([file])
    return None


def _close(files: Sequence[int]) -> None:
    for file in files:
        with suppress(OSError):
            os.close(file)
