"""MLflow's own variables for the store and the experiment: used where the configuration names none."""

from __future__ import annotations

import os

from bpt_dist.config.sections import RunConfig, TrackingConfig, problem_with_uri

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
LONGEST_EXPERIMENT = 128


def uri_of_environment(tracking: TrackingConfig) -> str | None:
    """Return the address in MLFLOW_TRACKING_URI, None where it is not set, not needed, or no address that a run may use."""
    uri = os.environ.get(URI, "").strip()
    if tracking.uri is not None or not uri:
        return None
    return uri if problem_with_uri(uri, tracking.allow_insecure) is None else None


def experiment_of_environment() -> str | None:
    """Return the name in MLFLOW_EXPERIMENT_NAME, None where it is not set or longer than a name may be."""
    name = os.environ.get(EXPERIMENT, "").strip()
    return name if 0 < len(name) <= LONGEST_EXPERIMENT else None


def experiment_of(config: RunConfig) -> str:
    """Return the MLflow experiment of a run: `tracking.experiment`, or MLFLOW_EXPERIMENT_NAME, or the name of the run."""
    return config.tracking.experiment or experiment_of_environment() or config.name


def with_uri_of_environment(config: RunConfig) -> RunConfig:
    """Return the configuration for a process that does not inherit this environment."""
    uri = uri_of_environment(config.tracking) if config.tracking.mlflow else None
    return config if uri is None else config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def usable_variables(tracking: TrackingConfig) -> dict[str, str]:
    """Return those of the two variables that a run uses; none of them can hold a secret."""
    found = {URI: uri_of_environment(tracking), EXPERIMENT: experiment_of_environment()}
    return {name: value for name, value in found.items() if value is not None}


def notes(config: RunConfig) -> list[str]:
    """Return a sentence for each of the two variables: that a run uses it, or why it does not."""
    if not config.tracking.mlflow:
        return []
    said, name, uri = [], os.environ.get(EXPERIMENT, "").strip(), os.environ.get(URI, "").strip()
    if uri_of_environment(config.tracking) is not None:
        said.append(f"{URI} is used, because tracking.uri is not set: {uri}")
    elif uri and config.tracking.uri is None:
        said.append(f"{URI} is not used: it {problem_with_uri(uri, config.tracking.allow_insecure)}; or set tracking.uri")
    if name and len(name) > LONGEST_EXPERIMENT:
        said.append(f"{EXPERIMENT} is not used: it has {len(name)} characters and at most {LONGEST_EXPERIMENT} are allowed")
    elif name and experiment_of(config) == name:
        said.append(f"{EXPERIMENT} is used: {name}")
    return said
