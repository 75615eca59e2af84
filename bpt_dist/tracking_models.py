"""Prompts of a run as versions of registered MLflow models: the PEFT folder and nothing else, so no T5 weights enter the store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bpt_dist.errors import StorageError
from bpt_dist.files import read_json, write_json_atomic
from bpt_dist.tracking import connect

RECORD = "models.json"


def register_prompts(folder: Path, *, alias: str) -> dict[str, str]:
    """Register each `target/<task>/adapter` of a mirrored run as a version of the model `<experiment>-<task>`.

    Returns `models:/NAME@alias` by task; `mlflow.artifacts.download_artifacts` of it gives the PEFT folder. A prompt that is
    registered already only gets the alias. Raises StorageError if the store fails.
    """
    state = read_json(folder / "tracking.json")
    adapters = sorted((folder / "target").glob("*/adapter"))
    known = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    client = connect(state["uri"])
    found = {}
    try:
        import mlflow

        mlflow.set_tracking_uri(state["uri"])  # the registry of a sqlite store asks the global client for the model
        for adapter in adapters:
            task = adapter.parent.name
            name = re.sub(r"[^\w-]", "_", f"{state['experiment']}-{task}")  # MLflow allows neither dots nor slashes
            if task not in known:
                known[task] = _register(client, state, name, adapter)
                write_json_atomic(folder / RECORD, known)
            client.set_registered_model_alias(name, alias, known[task])
            found[task] = f"models:/{name}@{alias}"
    except Exception as error:
        raise StorageError(f"{state['uri']}: a prompt could not be registered ({type(error).__name__}: {error})") from error
    return found


def _register(client: Any, state: dict[str, Any], name: str, adapter: Path) -> str:
    """Return the version under which the folder `adapter` is stored now."""
    run_id = state["run_id"]
    model = client.create_logged_model(
        experiment_id=state["experiment_id"],
        name=name,
        source_run_id=run_id,
        model_type="soft-prompt",
        tags={"bpt.run": state["id"]},
    )
    client.log_model_artifacts(model.model_id, str(adapter))
    client.finalize_logged_model(model.model_id, "READY")
    if not any(each.name == name for each in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, tags={"bpt.kind": "soft-prompt"})
    version = client.create_model_version(name, f"models:/{model.model_id}", run_id=run_id, model_id=model.model_id)
    return str(version.version)
