"""The names of all files of a run directory, a posterior and a sweep.

Users, other programs and older runs know these names: a changed name is a changed format.

    config.yaml  run.json  status.json  run.lock  metrics.jsonl  backbone.json  data.json  inputs.json  results.json
    logs/  figures/  method/<name>.py
    source/checkpoints/  source/posterior/{posterior.safetensors,posterior.json}  source/particles/step-<n>.safetensors
    target/<task>/{checkpoints/, adapter/, ensemble/, best/, weights/, result.json, predictions*.jsonl}
"""

from __future__ import annotations

# --- a run ------------------------------------------------------------------------------------------------------------
CONFIG = "config.yaml"
RUN = "run.json"
STATUS = "status.json"
LOCK = "run.lock"
METRICS = "metrics.jsonl"
BACKBONE = "backbone.json"  # hashes of the backbone and the tokenizer
DATA = "data.json"  # hashes of the rows
INPUTS = "inputs.json"  # hashes of everything else a run reads
RESULTS = "results.json"
METHOD = "method"  # a copy of the file of a method outside the package
BAD_STEP = "bad_step.json"  # the rows of a step whose numbers were not finite
TRACKING = "tracking.json"  # how far the mirror to MLflow has come
LOGS = "logs"
FIGURES = "figures"

# --- a stage ----------------------------------------------------------------------------------------------------------
SOURCE, TARGET = "source", "target"
JOINT = "joint"  # the target stage of several tasks together
CHECKPOINTS = "checkpoints"
POSTERIOR = "posterior"
PARTICLES = "particles"  # where more than a few of them were, step by step
POSTERIOR_TENSORS, POSTERIOR_FACTS = "posterior.safetensors", "posterior.json"
ADAPTER = "adapter"  # a PEFT folder
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENSEMBLE = "ensemble"  # a PEFT folder for each prompt that an ensemble averages over
BEST = "best"  # a PEFT folder: the adapted particle that `evaluation.predict: best` chose
TASK_RECORD = "task.json"  # of an export: how its texts are worded and its answers found
WEIGHTS = "weights"  # trained tensors that PEFT does not know
WEIGHTS_FACTS = "weights.json"
RESULT = "result.json"  # ends a target stage

# --- beside runs ------------------------------------------------------------------------------------------------------
STORE = "mlflow.db"
ARTIFACTS = "mlartifacts"  # of the store: copies of files of runs
SWEEP = "sweep.json"
PRUNED, STOP, TAGS = "pruned.json", "stop.json", "tags.json"  # of trials


def predictions(split: str, predict: str) -> str:
    """Return the file of the predictions of a split; the test split's MAP predictions have the plain name."""
    parts = [part for part in (split, predict) if part not in ("test", "map")]
    return "-".join(["predictions", *parts]) + ".jsonl"


def target_stage(task: str, *, joint: bool) -> str:
    """Return the name of the target stage that trains `task`, which is also its folder."""
    return f"{TARGET}/{JOINT if joint else task}"
