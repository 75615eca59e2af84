"""The processes of a job as a grid with two axes, `particle` x `data`.

A mesh is a value that is passed down, never a global. One process is not a special case: there every collective below is the
identity. Rank `a * C + c` owns the a-th block of particles and evaluates the c-th share of each step's texts for them.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from bpt_dist.distributed import environment
from bpt_dist.distributed.determinism import use_deterministic_kernels
from bpt_dist.distributed.device import check_devices, describe, own_device
from bpt_dist.distributed.failure_detection import Diagnosis, FailureDetector
from bpt_dist.distributed.gathering import gather_objects, gather_rows
from bpt_dist.distributed.liveness import this_process
from bpt_dist.distributed.mesh_shape import mesh_shape
from bpt_dist.distributed.rendezvous import join
from bpt_dist.errors import PeerLost, StorageError

SHARED_SECONDS = 10.0
NCCL_EXTRA = datetime.timedelta(minutes=5)
T = TypeVar("T")
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

    `control` is a gloo group beside the one that moves tensors: flags, numbers and objects are sent through it from the CPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hosts: tuple[str, ...] = ("localhost",)
    control: Any = field(default=None, repr=False, compare=False)
    progress: Progress = field(default_factory=Progress, repr=False, compare=False)
    _detectors: list[FailureDetector] = field(default_factory=list, repr=False, compare=False)
    # Process groups are created collectively and cannot be freed cheaply: one cache for the life of the job.
    _axes: dict[tuple[int, int], tuple[Axis, Axis]] = field(default_factory=dict, repr=False, compare=False)
    _host_groups: list[Any] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def start(cls, timeout_seconds: float, expected_size: int | None = None, job: str = "") -> World:
        """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK (collective: every rank); one process needs no variables.

        `timeout_seconds` bounds every collective until `set_timeout`. `job` is a text that only the ranks of this job have. Raises
        ConfigError when the job is not as large as `expected_size`, its port is taken, or a rank has another `job`.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        environment.check_world_size(expected_size, size)
        device = own_device(int(os.environ.get("LOCAL_RANK", "0")) if environment.is_launched(os.environ) else 0)
        use_deterministic_kernels(device)
        if environment.is_launched(os.environ):
            backend, limit = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout_seconds)
            join(backend, job, rank, size, limit, device.type)
        if size == 1:
            return cls(rank, size, device)
        control = dist.new_group(backend="gloo", timeout=limit)
        processes, devices = zip(*gather_objects((this_process(), describe(device)), size, control), strict=True)
        check_devices(devices)
        progress, store = Progress(timeout=limit), dist.distributed_c10d._get_default_store()
        detector = FailureDetector(store, rank, processes, lambda: (progress.calls, progress.place))
        return cls(rank, size, device, detector.hosts, control, progress, [detector])

    @property
    def detector(self) -> FailureDetector | None:
        """What notices lost ranks; None in one process."""
        return self._detectors[0] if self._detectors else None

    def stop(self) -> None:
        """Leave the job (collective: every rank)."""
        self.barrier()  # a rank that ends earlier must not count as lost
        while self._detectors:
            self._detectors.pop().close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def set_timeout(self, seconds: float) -> None:
        """Bound every collective by `seconds` from now on (collective): long at a start, short once steps follow steps."""
        if self.size == 1:
            return
        self.progress.timeout = datetime.timedelta(seconds=seconds)
        self.barrier()
        for group in list(dist.distributed_c10d._world.pg_map):
            # A call of NCCL that is overdue ends the process without a word: it must be the last to notice.
            more = NCCL_EXTRA if dist.get_backend(group) == "nccl" else datetime.timedelta()
            dist.distributed_c10d._set_pg_timeout(self.progress.timeout + more, group)
        self.barrier()

    def shorten_timeout(self, seconds: float) -> None:
        """Bound every collective by `seconds` once the first step is done; later calls do nothing (collective)."""
        if self.progress.timeout.total_seconds() != seconds:
            self.set_timeout(seconds)

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Bound the collectives of objects and flags inside by `seconds`: the others wait there for work of rank 0 (every rank)."""
        if self.size == 1:
            yield
            return
        usual, detector = self.progress.timeout, self._detectors[0]
        dist.distributed_c10d._set_pg_timeout(max(usual, datetime.timedelta(seconds=seconds)), self.control)
        detector.patient = True
        try:
            yield
        finally:
            detector.patient = False
            dist.distributed_c10d._set_pg_timeout(usual, self.control)

    def set_location(self, place: str) -> None:
        """Record where the main thread is, for the message of a rank that waits for this one."""
        self.progress.place = place

    def report_exit(self, words: str) -> None:
        """Tell the ranks that will wait for this one why it exits."""
        if self._detectors:
            self._detectors[0].report_exit(words)

    def find_missing_rank(self) -> Diagnosis:
        """Return which rank does not answer after a collective failed, and which rank reports it."""
        return self._detectors[0].diagnose() if self._detectors else Diagnosis("another rank did not appear", None)

    def mesh(self, num_particles: int, shape: tuple[int, int] | None = None, exchange: Exchanged = "all_gather") -> Mesh:
        """Arrange the ranks for `num_particles` (collective: every rank, in the same order on all).

        The axes are those of `mesh_shape`, which raises ConfigError for a `shape` that does not fit.
        `exchange` is read by `exchange.py`.
        """
        particle, data = mesh_shape(num_particles, self.size, shape)
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
        return dist.new_group(ranks, timeout=self._group_timeout) if len(ranks) > 1 else None

    @property
    def _group_timeout(self) -> datetime.timedelta:
        return self.progress.timeout + (NCCL_EXTRA if self.device.type == "cuda" else datetime.timedelta())

    def host_group(self) -> tuple[Any, int]:
        """Return the process group of the ranks on this rank's host, and how many ranks the largest host has (collective)."""
        hosts = host_groups(self.hosts)
        if not self._host_groups:
            # Every rank creates every group, also those of other hosts.
            self._host_groups.extend(dist.new_group(ranks, timeout=self._group_timeout) for ranks in hosts)
        groups = zip(hosts, self._host_groups, strict=True)
        return next(group for ranks, group in groups if self.rank in ranks), max(map(len, hosts))

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the float64 `values` of all ranks in rank order (collective: every rank, equally many on each)."""
        if self.size == 1:
            return [[float(value) for value in values]]
        self.progress.calls += 1
        rows: list[list[float]] = gather_rows(torch.tensor(values, dtype=torch.float64), self.size, self.control).tolist()
        return rows

    def any(self, flag: bool) -> bool:
        """Return whether any rank raised its flag (collective: every rank)."""
        return any(numbers[0] for numbers in self.gather_numbers([float(flag)]))

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order (collective: every rank); for predictions and reports, not for tensors."""
        if self.size == 1:
            return [value]
        self.progress.calls += 1
        return gather_objects(value, self.size, self.control)

    def once_a_host(self, facts: Any, compute: Callable[[], T]) -> T:
        """Return `compute()`, called by one rank for all ranks of its host that have the same `facts` (collective: every rank).

        `facts` say what is computed of, such as which files: containers may share a host's name and see other files.
        """
        if self.size == 1:
            return compute()
        places = list(zip(self.hosts, self.gather_objects(facts), strict=True))
        first = places.index(places[self.rank])
        values = self.gather_objects(compute() if first == self.rank else None)
        value: T = values[first]
        return value

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank (collective: every rank)."""
        if self.size == 1:
            return value
        self.progress.calls += 1
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def wait_for_file(self, file: Path, content: bytes | None = None) -> bool:
        """Wait until every rank can read a file that exists on rank 0; return False if rank 0 does not have it (collective).

        With `content`, every rank must read what rank 0 passes. Raises StorageError on all ranks, naming those that do not see it.
        """
        there, content = self.broadcast((file.is_file(), content) if self.rank == 0 else None)
        if not there:
            return False
        deadline = time.monotonic() + SHARED_SECONDS  # a network file system may show a new file late
        while not (is_there := _holds(file, content)) and time.monotonic() < deadline:
            time.sleep(0.1)
        blind = [f"rank {rank} on {self.hosts[rank]}" for rank, sees in enumerate(self.gather_objects(is_there)) if not sees]
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

    def start_all_to_all(self, outgoing: Sequence[Tensor], received: Sequence[int]) -> Callable[[], Float[Tensor, " n"]]:
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


def host_groups(names: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each host, given the host name of every rank; hosts in the order of their first rank."""
    return [[rank for rank, name in enumerate(names) if name == host] for host in dict.fromkeys(names)]


def _holds(file: Path, content: bytes | None) -> bool:
    try:
        return file.is_file() and (content is None or file.read_bytes() == content)
    except OSError:
        return False


def peer_lost(error: BaseException, world: World) -> PeerLost | None:
    """Return what a failed collective means to a user, with the rank that is missing; None when `error` is something else."""
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Socket Timeout")
    if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
        first = text.strip().splitlines()[0]
        missing, reporting_rank = world.find_missing_rank()
        return PeerLost(f"{missing} ({first}); rerun the same command to resume from the newest checkpoint", reporting_rank)
    return None
