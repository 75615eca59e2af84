"""The environment of a process: rank variables of every launcher, GPUs, threads, ports. Never imports torch.

The variables of DeepSpeed and torchrun are used as they are; those of SLURM's `srun` are translated.

All launchers meet in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. LOCAL_RANK is never derived from RANK: over a
hostfile with different numbers of slots DeepSpeed gives rank 1 of `slots=1, slots=2` the local rank 1 and rank 2 the local rank 0.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from itertools import takewhile
from pathlib import Path

from bpt_dist.errors import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Below the ephemeral ports of Linux, so that no connection of another program happens to hold it.
FIRST_PORT, NUM_PORTS, STEPS_OF_A_JOB = 20_000, 12_000, 16
DEVICES = Path("/dev")
# With a workspace of a fixed size cuBLAS gives the same bits in every call; it reads the variable once, at its first use.
CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
OF_A_RANK = frozenset({*NEEDED, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK", "ROLE_RANK"})


log = logging.getLogger(__name__)


def adopt(environment: MutableMapping[str, str]) -> None:
    """Leave complete rank variables in `environment`, or none where this is the only process.

    Raises ConfigError when a launcher set some of them and not all, or when a variable is no number.
    """
    if "RANK" not in environment:
        for name, value in _from_slurm(environment).items():
            environment.setdefault(name, value)
    if not is_launched(environment):
        left = [name for name in NEEDED if name in environment and name != "WORLD_SIZE"]
        if left:
            log.warning("%s set without RANK: left over from another job and ignored, this is one process", ", ".join(left))
        return
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        given = ", ".join(name for name in NEEDED if name in environment)
        raise ConfigError(f"{given} set without {', '.join(missing)}: start with deepspeed, torchrun or srun, or unset {given}")
    rank, size, local = (_number(environment, name) for name in NEEDED[:3])
    if not (0 <= rank < size and local >= 0):
        raise ConfigError(f"RANK={rank}, LOCAL_RANK={local} do not fit WORLD_SIZE={size}; was this shell part of another job?")


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process as a rank of a job; other variables of ranks may be left in a shell."""
    return "RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"


def world_size(environment: Mapping[str, str]) -> int:
    """Return the number of processes that were started."""
    return int(environment.get("WORLD_SIZE", "1"))


def first_host(node_list: str) -> str:
    """Return the first name of a SLURM node list: `gpu[007-012,20],login` begins with `gpu007`."""
    depth, end = 0, len(node_list)
    for position, character in enumerate(node_list):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", node_list[:end])


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Return the entry of one node in SLURM's run-length form: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE: cannot be read (got {tasks_per_node!r}); set RANK, WORLD_SIZE, ... instead"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node]


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return rank variables for a task that `srun` started; nothing elsewhere.

    A batch script has SLURM_PROCID too, but no step: a program it starts without `srun` is alone, whatever SLURM_NTASKS says.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return {}
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if size == "1":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    # Rank 0 runs on the step's first node; the host that called srun may be a login node.
    address = first_host(nodes) if nodes else environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not address:
        raise ConfigError("SLURM_STEP_NODELIST, SLURM_JOB_NODELIST and SLURM_LAUNCH_NODE_IPADDR are missing; set MASTER_ADDR")
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(_port(environment)),
    }
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if tasks and "SLURM_NODEID" in environment:
        variables["LOCAL_WORLD_SIZE"] = str(tasks_on_node(tasks, _number(environment, "SLURM_NODEID")))
    return variables


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step agree on and that jobs sharing a node do not."""
    job = _number(environment, "SLURM_JOB_ID" if "SLURM_JOB_ID" in environment else "SLURM_JOBID")
    return FIRST_PORT + (STEPS_OF_A_JOB * job + _number(environment, "SLURM_STEP_ID")) % NUM_PORTS


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"{name}: is no number (got {text!r}); start with deepspeed, torchrun or srun")
    return int(text)


def num_gpus() -> int:
    """Return how many NVIDIA devices this machine shows to this process; torch is not imported.

    Devices may have any number: a container that was given GPU 3 has /dev/nvidia3 only. CUDA_VISIBLE_DEVICES narrows them as CUDA
    reads it: names behind the first one that is no device do not count.
    """
    present = sum(1 for path in DEVICES.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit())
    present = present or int((DEVICES / "dxg").exists())  # the one device node of WSL, whatever the number of GPUs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    names = [name.strip() for name in visible.split(",")]
    return sum(1 for _ in takewhile(lambda name: re.match(r"GPU-|MIG-|\d+$", name), names))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_process(threads: int | None = None) -> None:
    """Set in this process what must be set before torch, transformers or DeepSpeed is imported; what the user set stays.

    `threads` are those of torch's products; None leaves torch's choice, which is every core, unless several ranks share the host.
    """
    if threads is None and (ranks_here := ranks_on_host(os.environ)) > 1:
        threads = max(1, cores() // ranks_here)  # otherwise each rank takes every core, and ranks wait for each other's threads
    for name, value in _defaults(threads).items():
        os.environ.setdefault(name, value)
    if home_folder() is None:
        # Other libraries would make a folder named "~" in the working directory.
        os.environ["HOME"] = str(cache_home().parent)


def home_folder() -> Path | None:
    """Return the home directory; None for a user without one (HOME is not set and /etc/passwd does not know the user id)."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() else None


@functools.cache
def cache_home() -> Path:
    """Return the folder for caches, `~/.cache`; where that cannot be written, a private temporary folder, with one warning.

    Containers run with user ids that have no home directory, or one that belongs to root. Raises ConfigError when there is no
    folder at all.
    """
    home = home_folder()
    if home is not None and _can_be_made(home / ".cache"):
        return home / ".cache"
    why = "this user has no home directory" if home is None else f"the home directory {home} cannot be written"
    folder = _private_folder(why) / ".cache"
    log.warning("%s; caches are kept in %s, set data.cache= or HOME= to keep them elsewhere", why, folder)
    return folder


def _can_be_made(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private_folder(why: str) -> Path:
    """Return a folder below the temporary one that only this user can write to."""
    folder = None
    try:
        folder = Path(tempfile.gettempdir()) / f"bpt_dist-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        place = folder or "the temporary folder"
        raise ConfigError(f"{why}, and {place} cannot be used ({error.strerror}); set data.cache= or HOME=") from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise ConfigError(f"{why}, and {folder} can be written by others; set data.cache= or HOME=")
    return folder


def child_environment(num_workers: int) -> dict[str, str]:
    """Return the environment for `num_workers` processes that share this machine, each a job of its own.

    Rank variables are left out: a launcher set them for this process.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    return {**_defaults(max(1, cores() // num_workers)), **inherited}


def ranks_on_host(environment: Mapping[str, str]) -> int:
    """Return how many ranks of this job share this host, as the launcher says; 1 where it says nothing."""
    text = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "1"))
    return int(text) if text.isdigit() else 1


def passed_through_shells(environment: Mapping[str, str]) -> bool:
    """Return whether shells have read the command line: the deepspeed launcher hands it to one on each of several hosts."""
    hosts = environment.get("CROSS_SIZE", "1")
    return hosts.isdigit() and int(hosts) > 1


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this process speaks for the job; works before the variables are known to be valid."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def check_world_size(expected: int | None, size: int) -> None:
    """Raise ConfigError for a job of another size than intended.

    A hostfile that is not found makes the launcher start on this host alone, with only a warning.
    """
    if expected is not None and size != expected:
        raise ConfigError(
            f"distribution.expect_world_size is {expected}, but {size} process(es) were started; "
            "check that the hostfile is found and lists all slots"
        )


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free on `host` now ("" for all addresses): 29500, the launcher's default, is often taken."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _defaults(threads: int | None) -> dict[str, str]:
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        # Otherwise each connection between hosts without reverse DNS prints a line; what fails is raised anyway.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if threads is not None:
        defaults["OMP_NUM_THREADS"] = str(threads)
    if num_gpus():
        defaults[CUBLAS_VARIABLE] = CUBLAS_WORKSPACE
    else:
        defaults["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed warns on every rank that it found no accelerator
    return defaults
