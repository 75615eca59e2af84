"""Where trials run: a Ray of our own on the loopback address, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bpt_dist.commands.sweep.settings import Settings
from bpt_dist.distributed.environment import cores
from bpt_dist.errors import ConfigError, StorageError
from bpt_dist.storage.files import read_json, write_json_atomic

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_LOGGING": "0",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray binds to every address on Linux and to the loopback one on other systems; this variable of Ray decides which."""
PREFIX = "bpt-ray-"
STORE_BYTES = 80 << 20  # what trials hand to each other are a few numbers


@dataclass(frozen=True)
class Resources:
    """What one trial takes, and how many fit side by side."""

    cpus: float
    gpus: float
    workers: int
    concurrency: int

    @property
    def of_a_process(self) -> dict[str, float]:
        """Return the resources of one process of a trial."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@contextmanager
def cluster(settings: Settings, sweep_folder: Path) -> Iterator[Resources]:
    """Connect to Ray, starting one on this machine unless RAY_ADDRESS names another.

    `sweep_folder` remembers where Ray keeps its sockets, so that the next start can clear away what a killed one left.
    Raises ConfigError when no node can ever hold a trial.
    """
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    # It prints the traceback of every failed attempt; the screen and the table of the sweep show why a trial failed.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if "RAY_ADDRESS" in os.environ:
        import ray

        _join(ray)
        try:
            yield fitting(settings, _nodes(ray))
        finally:
            ray.shutdown()
        return
    here = _this_machine()
    with _own_ray(settings, here, sweep_folder / "ray.json"):
        yield fitting(settings, [here])


def check_resources(settings: Settings) -> None:
    """Raise ConfigError for a trial that this machine can never hold; the nodes of another Ray are known once it is joined."""
    if "RAY_ADDRESS" not in os.environ:
        fitting(settings, [_this_machine()])


def _this_machine() -> dict[str, float]:
    """Return the cores and GPUs this process may use; the GPUs are those that torch will train on."""
    import torch

    return {"CPU": float(cores()), "GPU": float(torch.cuda.device_count())}


def _join(ray: Any) -> None:
    """Connect to the cluster that RAY_ADDRESS names; Ray itself would wait for minutes for one that is not there."""
    parts = urlsplit(f"//{os.environ['RAY_ADDRESS'].rpartition('//')[2]}")
    try:
        if parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), timeout=10).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"RAY_ADDRESS: no Ray can be joined at {os.environ['RAY_ADDRESS']} ({reason}); start it, or unset RAY_ADDRESS to use "
            "this machine alone"
        ) from error


@contextmanager
def _own_ray(settings: Settings, resources: dict[str, float], remembered: Path) -> Iterator[None]:
    if remembered.is_file():
        _clear(Path(read_json(remembered)["folder"]))
    # Short, because Ray puts sockets there and their paths may have 107 bytes; private, because it holds the token.
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    write_json_atomic(remembered, {"folder": str(folder)})
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {**LOOPBACK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    previous = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        import ray

        # The driver of a trial of several processes waits for them and computes nothing.
        drivers = settings.concurrency or int(resources["CPU"]) if settings.stage == "source" else 0
        ray.init(
            address="local",
            num_cpus=int(resources["CPU"]) + drivers,
            num_gpus=int(resources["GPU"]),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=STORE_BYTES,
            _temp_dir=str(folder),
        )
        try:
            yield
        finally:
            ray.shutdown()
    except OSError as error:
        raise StorageError(f"{folder}: Ray cannot be started there ({error}); set TMPDIR to another folder") from error
    finally:
        for key, value in previous.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        _clear(folder)
        remembered.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove a folder of our own making and nothing else."""
    if folder.name.startswith(PREFIX) and folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
        shutil.rmtree(folder, ignore_errors=True)


def fitting(settings: Settings, nodes: list[dict[str, float]]) -> Resources:
    """Return what a trial takes and how many fit on `nodes`. Raises ConfigError when not even one does."""
    gpus = settings.gpus if settings.gpus is not None else float(any(node.get("GPU", 0) for node in nodes))
    wanted = {"CPU": settings.cpus, "GPU": gpus}
    on_each = [min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in wanted.items() if amount) for node in nodes]
    trials = sum(on_each) // settings.workers
    if trials < 1:
        total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in wanted}
        process = f"{settings.workers} process(es) with cpus {settings.cpus:g} and gpus {gpus:g} each"
        raise ConfigError(
            f"cpus, gpus, workers: one trial needs {process}, and {len(nodes)} node(s) with CPUs {total['CPU']:g} and GPUs "
            f"{total['GPU']:g} cannot hold it; lower them, or give the sweep a larger machine"
        )
    return Resources(settings.cpus, gpus, settings.workers, min(trials, settings.concurrency or trials))


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
