"""What makes two configurations the same run: which keys a resumed run may change, and how a stored one is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from bpt_dist.config.keys import fields_by_key, leaves
from bpt_dist.config.own_method import OwnMethod
from bpt_dist.config.sections import RunConfig
from bpt_dist.config.strict_yaml import read
from bpt_dist.errors import ConfigError

CHANGEABLE = frozenset({
    "name", "output", "run_dir", "rows", "seeds", "comparisons", "quick", "figures",
    "data.cache",
    "source.pass_size", "target.pass_size",
    "source.checkpoint_every", "source.log_every", "target.checkpoint_every", "target.log_every",
    "evaluation.batch_size", "backbone.attention", "backbone.forward",
    "distribution.mesh", "distribution.mesh.particle", "distribution.mesh.data", "distribution.exchange",
    "distribution.shard", "distribution.zero_config", "distribution.scope", "distribution.offload",
    "distribution.activation_checkpointing",
    "distribution.expect_world_size", "distribution.startup_timeout", "distribution.step_timeout",
    "distribution.storage_timeout", "distribution.grace",
    "tracking.mlflow", "tracking.uri", "tracking.experiment", "tracking.allow_insecure", "tracking.register_as",
})  # fmt: skip
"""Keys that a resumed run may change: where things are, how often, on how many processes. All others shape the result."""

MOVABLE = frozenset({
    "backbone.path", "backbone.revision", "data.root", "data.task_files", "source.posterior", "method.init_file", "method.path",
})  # fmt: skip
"""Keys that say where an input is. A resumed run may change them, because the contents are compared (backbone.json, data.json,
inputs.json)."""

GIVEN_OR_NOT = frozenset({"source.posterior"})
"""Those of them that shape the result by being there: with a posterior there is no source stage."""

ABSENT = object()


def fingerprint(config: RunConfig, *, with_paths: bool = False) -> str:
    """Return the SHA-256 of all keys that shape the result, 64 hexadecimal digits; CHANGEABLE keys are left out.

    MOVABLE keys are left out too, but for whether a posterior is given; `with_paths` keeps them, as versions before 0.2 did. Two
    runs with the same value `with_paths` are the same experiment.
    """
    return _hash(_values(config), with_paths=with_paths)


def job_identity(config: RunConfig) -> str:
    """Return what the ranks of one job have in common, 64 hexadecimal digits.

    The defaults of a method outside the package are left out: ranks that have another file of it meet, so that it can be named.
    """
    given = config.method.model_dump(mode="json", exclude_unset=isinstance(config.method, OwnMethod))
    return _hash(leaves({**config.model_dump(mode="json"), "method": given}), with_paths=False)


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Return the dotted keys that differ and may not change between a run and its resumption, sorted."""
    return _differing(_values(old), _values(new))


def is_same_run(record: Mapping[str, Any], stored: Path, config: RunConfig) -> bool:
    """Return whether the run whose `run.json` holds `record` and whose configuration is in the file `stored` is that of `config`.

    The fingerprint of a run never changes, because its checkpoints carry it. That of an earlier version has other keys or holds
    paths: then the stored file must be the one it was made of, and no key may differ that a resumed run may not change.
    """
    recorded = {record["fingerprint"], record.get("resume_fingerprint")}
    if not recorded.isdisjoint({fingerprint(config), fingerprint(config, with_paths=True)}):
        return True
    before = stored_values(stored)
    unaltered = not recorded.isdisjoint({_hash(before, with_paths=False), _hash(before, with_paths=True)})
    return unaltered and not _differing(_with_new_defaults(before, config), _values(config))


def changes(stored: Path, config: RunConfig) -> list[str]:
    """Return `key: old -> new` for every key in which a stored configuration forbids `config` to resume its run."""
    before, after = _with_new_defaults(stored_values(stored), config), _values(config)
    return _lines(before, after, _differing(before, after))


def moved_inputs(stored: Path, config: RunConfig) -> list[str]:
    """Return `key: old -> new` for every input that is at another place than in a stored configuration."""
    before, after = stored_values(stored), _values(config)
    return _lines(before, after, sorted(key for key in MOVABLE if key in before and before[key] != after.get(key, ABSENT)))


def stored_values(file: Path) -> dict[str, Any]:
    """Return the values of a run's `config.yaml` by dotted key; none where it cannot be read.

    Nothing is validated: files the configuration names may be gone.
    """
    try:
        return leaves(read(file).data)
    except ConfigError:
        return {}


def _values(config: RunConfig) -> dict[str, Any]:
    return leaves(config.model_dump(mode="json"))


def _hash(values: Mapping[str, Any], *, with_paths: bool) -> str:
    shaping = {key: value for key, value in values.items() if key not in CHANGEABLE}
    if not with_paths:
        shaping = {key: value for key, value in shaping.items() if key not in MOVABLE}
        shaping |= {key: values.get(key) is not None for key in GIVEN_OR_NOT}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    differing = {key for key in {*before, *after} if before.get(key, ABSENT) != after.get(key, ABSENT)}
    given = {key for key in GIVEN_OR_NOT if (before.get(key) is None) != (after.get(key) is None)}
    return sorted(differing - CHANGEABLE - MOVABLE | given)


def _with_new_defaults(before: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return stored values with the defaults of keys that an earlier version did not have."""
    fields, after = fields_by_key(type(config.method)), _values(config)
    defaults = {
        key: to_jsonable_python(fields[key].get_default(call_default_factory=True))
        for key in after
        if key not in before and key in fields and fields[key].get_default(call_default_factory=True) is not PydanticUndefined
    }
    return {**defaults, **before}


def _lines(before: Mapping[str, Any], after: Mapping[str, Any], keys: list[str]) -> list[str]:
    return [f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in keys]
