"""Prompts of a run as versions of registered MLflow models: the PEFT folder alone, so no backbone weights enter the store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpt_dist.config.mlflow_environment import URI as TRACKING_URI
from bpt_dist.errors import StorageError
from bpt_dist.storage import layout
from bpt_dist.storage.files import read_json
from bpt_dist.tracking.store import connect

KINDS = {"PROMPT_TUNING": "soft-prompt", "LORA": "low-rank-adapter"}


def register_prompts(folder: Path, *, alias: str) -> dict[str, str]:
    """Register each `target/<task>/adapter` of a mirrored run as a version of the model `<experiment>-<task>`.

    Returns `models:/NAME@alias` by task; `mlflow.artifacts.download_artifacts` of it gives the PEFT folder. What is registered
    already, which the store is asked for, only gets the alias. Raises StorageError if the store fails.
    """
    state = read_json(folder / layout.TRACKING)
    client = connect(state["uri"])
    registered = {}
    try:
        with _global_store(state["uri"]):
            for adapter in sorted((folder / "target").glob("*/adapter")):
                task = adapter.parent.name
                name = re.sub(r"[^\w-]", "_", f"{state['experiment']}-{task}")  # MLflow allows neither dots nor slashes
                version = _registered(client, name, state["run_id"]) or _register(client, state, name, adapter)
                client.set_registered_model_alias(name, alias, version)
                registered[task] = f"models:/{name}@{alias}"
    except Exception as error:
        raise StorageError(f"{state['uri']}: a prompt could not be registered ({type(error).__name__}: {error})") from error
    return registered


@contextmanager
def _global_store(uri: str) -> Iterator[None]:
    """Let MLflow's global client use a store, which the registry of a sqlite store asks for the model.

    MLflow also writes the address into the environment, where a later run of the process would take it for the user's choice.
    So the environment is put back.
    """
    import mlflow

    before: Any = os.environ.get(TRACKING_URI)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _registered(client: Any, name: str, run_id: str) -> str | None:
    """Return the version of a model that a run has left, None before there is one."""
    return next(
        (str(version.version) for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")), None
    )


def _register(client: Any, state: dict[str, Any], name: str, adapter: Path) -> str:
    """Return the version under which the folder `adapter` is stored now."""
    run_id = state["run_id"]
    kind = KINDS[read_json(adapter / layout.ADAPTER_CONFIG)["peft_type"]]
    model = client.create_logged_model(
        experiment_id=state["experiment_id"],
        name=name,
        source_run_id=run_id,
        model_type=kind,
        tags={"bpt.run": state["id"]},
    )
    client.log_model_artifacts(model.model_id, str(adapter))
    client.finalize_logged_model(model.model_id, "READY")
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, tags={"bpt.kind": kind})
    version = client.create_model_version(name, f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id)
    return str(version.version)
