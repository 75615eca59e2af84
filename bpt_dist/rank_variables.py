"""Which rank am I: the variables of DeepSpeed and torchrun as they are, those of SLURM's `srun` turned into them.

All launchers meet in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. LOCAL_RANK is never derived from RANK: over a
hostfile with different numbers of slots DeepSpeed gives rank 1 of `slots=1, slots=2` the local rank 1 and rank 2 the local rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from bpt_dist.errors import ConfigError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Below the ephemeral ports of Linux, so that no connection of another program happens to hold it.
FIRST_PORT, NUM_PORTS, STEPS_OF_A_JOB = 20_000, 12_000, 16


def adopt(environment: MutableMapping[str, str]) -> None:
    """Leave complete rank variables in `environment`, or none where this is the only process.

    Raises ConfigError when a launcher set some of them and not all, or when a variable is no number.
    """
    if "RANK" not in environment:
        for name, value in _from_slurm(environment).items():
            environment.setdefault(name, value)
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        given = ", ".join(name for name in NEEDED if name in environment)
        raise ConfigError(f"{given} set without {', '.join(missing)}: start with deepspeed, torchrun or srun, or unset {given}")
    rank, size, local = (_number(environment, name) for name in NEEDED[:3])
    if not (0 <= rank < size and local >= 0):
        raise ConfigError(f"RANK={rank}, LOCAL_RANK={local} do not fit WORLD_SIZE={size}; was this shell part of another job?")


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
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(_port(environment)),
    }
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if tasks and "SLURM_NODEID" in environment:
        found["LOCAL_WORLD_SIZE"] = str(tasks_on_node(tasks, _number(environment, "SLURM_NODEID")))
    return found


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step agree on and that jobs sharing a node do not."""
    job = _number(environment, "SLURM_JOB_ID" if "SLURM_JOB_ID" in environment else "SLURM_JOBID")
    return FIRST_PORT + (STEPS_OF_A_JOB * job + _number(environment, "SLURM_STEP_ID")) % NUM_PORTS


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"{name}: is no number (got {text!r}); start with deepspeed, torchrun or srun")
    return int(text)
