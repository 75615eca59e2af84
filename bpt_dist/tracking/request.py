"""Where MLflow mirrors a run, and under which names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.config.mlflow_environment import experiment_of
from bpt_dist.storage.provenance import git_state, versions
from bpt_dist.storage.run_directory import RunDirectory
from bpt_dist.tracking.names import ROW, log10_name
from bpt_dist.tracking.places import store_uri

LONGEST_PARAMETER = 500
UNTRACKED = ("name", "output", "run_dir", "seed", "tracking", "figures", "data.cache", "rows", "seeds", "comparisons", "quick")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Where a run is mirrored to and under which name; `id` is that of `run.json` and finds the run again.

    With an `alias` the prompts of the run, once it is finished, become versions of registered models under it.
    """

    id: str
    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    alias: str | None = None


def parameters(config: Mapping[str, Any], *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Flatten a configuration to dotted names; `leave_out` names sections or keys that explain no result.

    Logarithms of sigma are added because the axes of MLflow's charts are linear. Nothing is cut: longer
    values stay in the artifact `config.yaml` only.
    """
    flat: dict[str, str] = {}
    for name, value in _leaves("", config):
        skipped = any(name == out or name.startswith(f"{out}.") for out in leave_out)
        if skipped or value is None or len(str(value)) > LONGEST_PARAMETER:
            continue
        flat[name] = str(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and value > 0 and (logged := log10_name(name)):
            flat[logged] = f"{math.log10(value):.6g}"
    return flat


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), entry)
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, value


def tracking_request(
    config: RunConfig, run: RunDirectory, world_size: int, absolute_rates: Mapping[str, float] | None = None
) -> Request:
    """Return where and under which name, parameters and tags MLflow mirrors the run.

    `absolute_rates` are the learning rates that the configuration gives in other units: runs compare by `source.lr` then, too.
    """
    commit, rates = git_state() or {}, {key: f"{rate:.6g}" for key, rate in (absolute_rates or {}).items()}
    tags = {
        "git.commit": str(commit.get("commit", "")),
        "git.dirty": str(commit.get("dirty", "")),
        "config.sha256": configuration.fingerprint(config),
        "method": config.method.name,
        "seed": str(config.seed),
        ROW: row_label(config),
        "bpt.stage": "source, target" if config.method.HAS_SOURCE_STAGE else "target",
        "world_size": str(world_size),
        **{f"version.{package}": version for package, version in versions().items()},
    }
    return Request(
        id=run.id,
        uri=store_uri(config),
        experiment=experiment_of(config),
        run_name=config.name,
        params=parameters(config.model_dump(mode="json"), leave_out=UNTRACKED) | rates,
        tags=tags,
        alias=config.tracking.register_as,
    )
