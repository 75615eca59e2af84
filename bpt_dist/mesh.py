"""Who am I: the processes of a job as a grid with two axes, `particle` x `data`.

A mesh is a value that is passed down, never a global. One process is not a special case: every collective below is simply the
identity there. Rank `a * C + c` owns the a-th block of particles and evaluates the c-th share of each step's texts for them.
"""

from __future__ import annotations

import datetime
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from bpt_dist.errors import ConfigError, PeerLost, StorageError
from bpt_dist.peers import RollCall, Verdict
from bpt_dist.rendezvous import join

SHARED_SECONDS = 10.0
Exchanged = Literal["all_gather", "coordinates"]


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: my place on it, its length, and the process group along it (None when the length is 1)."""

    index: int = 0
    size: int = 1
    group: Any = None


@dataclass
class Progress:
    """How many collective calls this rank has made (equal on ranks in step), where its main thread is, how long a call may take."""

    calls: int = 0
    place: str = "start"
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """All processes of the job, before any method decides how they are arranged.

    `control` is a gloo group beside whatever moves tensors: flags, numbers and objects travel on it, from the CPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hosts: tuple[str, ...] = ("localhost",)
    control: Any = field(default=None, repr=False, compare=False)
    progress: Progress = field(default_factory=Progress, repr=False, compare=False)
    _roll_call: list[RollCall] = field(default_factory=list, repr=False, compare=False)
    # Process groups are created collectively and cannot be freed cheaply: one cache for the life of the job.
    _axes: dict[tuple[int, int], tuple[Axis, Axis]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def start(cls, timeout_seconds: float, expected_size: int | None = None, job: str = "") -> World:
        """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK (collective: every rank); one process needs no variables.

        `timeout_seconds` bounds every collective until `set_timeout`. Raises ConfigError when the job is not as large as
        `expected_size`, its port is taken, or a rank came here with another `job` (what it is about to do) in mind.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if expected_size is not None and size != expected_size:
            raise ConfigError(
                f"distribution.expect_world_size is {expected_size}, but {size} process(es) were started; "
                "is the hostfile found, and does it list all slots?"
            )
        device = torch.device("cpu")
        if torch.cuda.is_available():
            place = int(os.environ.get("LOCAL_RANK", "0"))
            if place >= torch.cuda.device_count():
                raise ConfigError(
                    f"LOCAL_RANK is {place} on {socket.gethostname()}, which has {torch.cuda.device_count()} GPU(s); start as many "
                    "processes a host as it has, or hide them with CUDA_VISIBLE_DEVICES= to use the CPU"
                )
            device = torch.device("cuda", place)
            torch.cuda.set_device(device)
        if "MASTER_ADDR" in os.environ or size > 1:
            backend, limit = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout_seconds)
            join(backend, job, rank, size, limit)
        if size == 1:
            return cls(rank, size, device)
        hosts: list[Any] = [None] * size
        control = dist.new_group(backend="gloo", timeout=limit)
        dist.all_gather_object(hosts, socket.gethostname(), group=control)
        progress, store = Progress(timeout=limit), dist.distributed_c10d._get_default_store()
        answers = RollCall(store, rank, hosts, lambda: (progress.calls, progress.place))
        return cls(rank, size, device, tuple(hosts), control, progress, [answers])

    def stop(self) -> None:
        """Leave the job (collective: every rank)."""
        while self._roll_call:
            self._roll_call.pop().close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def set_timeout(self, seconds: float) -> None:
        """Bound every collective by `seconds` from now on (collective): long at a start, short once steps follow steps."""
        if self.size == 1:
            return
        self.progress.timeout = datetime.timedelta(seconds=seconds)
        self.barrier()
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(self.progress.timeout, group)
        self.barrier()

    def settle(self, seconds: float) -> None:
        """Bound every collective by `seconds` now that the first step is done; nothing happens when it is so (collective)."""
        if self.progress.timeout.total_seconds() != seconds:
            self.set_timeout(seconds)

    def at(self, place: str) -> None:
        """Say where the main thread is, for the message of a rank that waits for this one."""
        self.progress.place = place

    def say_last(self, words: str) -> None:
        """Leave word of why this rank ends, for the ranks that will miss it."""
        if self._roll_call:
            self._roll_call[0].say_last(words)

    def missing(self) -> Verdict:
        """Return which rank does not answer after a collective failed, and who says so."""
        return self._roll_call[0].verdict() if self._roll_call else Verdict("another rank did not appear", None)

    def mesh(self, num_particles: int, shape: tuple[int, int] | None = None, exchange: Exchanged = "all_gather") -> Mesh:
        """Arrange the ranks for `num_particles` (collective: every rank, in the same order on all).

        Without `shape` the particle axis is gcd(M, W): equal work, no padding, no idle rank. Raises ConfigError naming the shapes
        that are possible when an explicit `shape` divides neither the particles nor the world. `exchange.py` reads `exchange`.
        """
        particle, data = shape or (math.gcd(num_particles, self.size), self.size // math.gcd(num_particles, self.size))
        if particle * data != self.size or num_particles % particle:
            possible = [(a, self.size // a) for a in range(1, self.size + 1) if self.size % a == 0 and num_particles % a == 0]
            raise ConfigError(
                f"distribution.mesh {particle} x {data} does not fit {num_particles} particle(s) on {self.size} process(es); "
                f"possible (particle x data): {', '.join(f'{a} x {c}' for a, c in possible)}"
            )
        if (particle, data) not in self._axes:
            self._axes[particle, data] = self._make_axes(particle, data)
        return Mesh(self, *self._axes[particle, data], exchange)

    def _make_axes(self, particle: int, data: int) -> tuple[Axis, Axis]:
        a, c = divmod(self.rank, data)
        across = [self._group([i * data + j for i in range(particle)]) for j in range(data)]
        along = [self._group([i * data + j for j in range(data)]) for i in range(particle)]
        return Axis(a, particle, across[c]), Axis(c, data, along[a])

    def _group(self, ranks: list[int]) -> Any:
        """Create a group (collective: every rank, also those outside); a group of one needs none."""
        return dist.new_group(ranks, timeout=self.progress.timeout) if len(ranks) > 1 else None

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the float64 `values` of all ranks in rank order (collective: every rank, equally many on each)."""
        if self.size == 1:
            return [[float(value) for value in values]]
        self.progress.calls += 1
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.control)
        return [each.tolist() for each in found]

    def any(self, flag: bool) -> bool:
        """Return whether any rank raised its flag (collective: every rank)."""
        return any(each[0] for each in self.gather_numbers([float(flag)]))

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order (collective: every rank); for predictions and reports, not for tensors."""
        if self.size == 1:
            return [value]
        self.progress.calls += 1
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank (collective: every rank)."""
        if self.size == 1:
            return value
        self.progress.calls += 1
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def sees(self, file: Path, content: bytes | None = None) -> bool:
        """Return whether rank 0 has `file`, once every rank has it, too (collective: every rank): rank 0 decides, nobody alone.

        With `content` rank 0's is what each must read. Raises StorageError on all ranks, naming those that do not see it.
        """
        there, content = self.broadcast((file.is_file(), content) if self.rank == 0 else None)
        if not there:
            return False
        deadline = time.monotonic() + SHARED_SECONDS  # a network file system may show a new file late
        while not (found := _holds(file, content)) and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [f"rank {rank} on {self.hosts[rank]}" for rank, sees in enumerate(self.gather_objects(found)) if not sees]
        if blind:
            raise StorageError(
                f"{file}: rank 0 has it, {', '.join(blind)} does not see it; put the run directory (output=) on a disk that all "
                "hosts share"
            )
        return True

    def barrier(self) -> None:
        """Wait for all ranks (collective: every rank)."""
        if self.size > 1:
            self.progress.calls += 1
            dist.barrier(group=self.control)


@dataclass(frozen=True)
class Mesh:
    """The world arranged as `particle` x `data` for one stage."""

    world: World = field(default_factory=World)
    particle: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    exchange: Exchanged = "all_gather"

    def rows(self, num_particles: int) -> slice:
        """Return the block of particles this rank owns."""
        block = num_particles // self.particle.size
        return slice(self.particle.index * block, (self.particle.index + 1) * block)

    def gather_particles(self, local: Float[Tensor, "m ..."]) -> Float[Tensor, "M ..."]:
        """Return the rows of all ranks along `particle`, in order (collective: every rank). Always float32 or wider on the wire."""
        return self.start_gather_particles(local)()

    def start_gather_particles(self, local: Float[Tensor, "m ..."]) -> Callable[[], Float[Tensor, "M ..."]]:
        """Start `gather_particles` and return what waits for it and gives the result: the gather runs beside the forward pass.

        `local` must not change until then; every rank must wait for it, in the same order among its collectives.
        """
        if self.particle.size == 1:
            return lambda: local
        self.world.progress.calls += 1
        whole = local.new_empty((self.particle.size * len(local), *local.shape[1:]))
        parts = list(whole.chunk(self.particle.size))
        pending = dist.all_gather(parts, local.contiguous(), group=self.particle.group, async_op=True)

        def wait() -> Tensor:
            pending.wait()
            return whole

        return wait

    def start_trade(self, outgoing: Sequence[Tensor], received: Sequence[int]) -> Callable[[], Float[Tensor, " n"]]:
        """Start to send `outgoing[r]` to rank r of `particle`, and return what waits for what comes (collective: every rank).

        That is `received[r]` numbers from rank r, one rank after the other. As for a gather, every rank must wait, in order.
        """
        self.world.progress.calls += 1
        packed = torch.cat([part.reshape(-1) for part in outgoing])
        arrived = packed.new_empty(sum(received))
        sent = [part.numel() for part in outgoing]
        pending = dist.all_to_all_single(arrived, packed, list(received), sent, group=self.particle.group, async_op=True)

        def wait() -> Tensor:
            pending.wait()
            return arrived

        return wait

    def sum_over_particles_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over `particle`, the same bits on every rank, and return it (collective: every rank)."""
        if self.particle.size > 1:
            self.world.progress.calls += 1
            dist.all_reduce(tensor, group=self.particle.group)
        return tensor

    def gather_over_data(self, local: Float[Tensor, " n"]) -> list[Float[Tensor, " n"]]:
        """Return the vectors of all replicas along `data`, in order (collective: every rank)."""
        if self.data.size == 1:
            return [local]
        self.world.progress.calls += 1
        parts = [torch.empty_like(local) for _ in range(self.data.size)]
        dist.all_gather(parts, local, group=self.data.group)
        return parts

    def sum_over_data_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over `data`, the same bits on every replica (collective: every rank)."""
        if self.data.size == 1 or not tensors:
            return
        self.world.progress.calls += 1
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.data.group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _holds(file: Path, content: bytes | None) -> bool:
    try:
        return file.is_file() and (content is None or file.read_bytes() == content)
    except OSError:
        return False


def peer_lost(error: RuntimeError, world: World) -> PeerLost | None:
    """Return what a failed collective means to a user, with the rank that is missing; None when `error` is something else."""
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Socket Timeout")
    if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
        first = text.strip().splitlines()[0]
        missing, spokesman = world.missing()
        return PeerLost(f"{missing} ({first}); the same command resumes from the newest checkpoint", spokesman)
    return None


def deal(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal texts to `num_shares` ranks by cost, largest first to the least loaded; ascending indices within a share.

    Deterministic (ties go to the lower rank), so every rank computes the same deal without communication.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        target = min(range(num_shares), key=lambda share: (loads[share], share))
        shares[target].append(index)
        loads[target] += costs[index]
    return [sorted(share) for share in shares]
