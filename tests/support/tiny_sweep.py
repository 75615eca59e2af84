"""A sweep in seconds: the tiny T5, a posterior of it, and a sweep file over sigma and a learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_run
import yaml

METHOD = {"name": "bpt", "length": 3, "num_particles": 2}


def world(folder: Path) -> Path:
    """Write T5, tasks and the posterior of a run named `posterior` into `folder` and return it."""
    tiny_run.world(folder)
    plain = tiny_run.settings(folder, METHOD, name="posterior", data={"target_tasks": []}, target={"steps": 0, "eval_every": None})
    tiny_run.trained(tiny_run.load(folder, plain))
    return folder


def plain(folder: Path, **keys: Any) -> dict[str, Any]:
    """Return a sweep of two sigmas, one rate and two seeds, 12 steps each with a validation every second; `keys` win."""
    if not (folder / "tasks").is_dir():
        tiny_run.write_tasks(folder / "tasks")
    run = tiny_run.settings(folder, METHOD)
    shared = {key: run[key] for key in ("backbone", "data", "target", "tracking", "figures")}
    shared["method"] = dict(METHOD)
    shared["source"] = {"posterior": str(folder / "runs" / "posterior")}
    shared["target"] = {"joint": True, "steps": 12, "batch_size": 2, "eval_every": 2, "checkpoint_every": 2, "log_every": 1}
    found: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "run": shared,
        "space": {"method.sigma_relative": [0.1, 10.0], "method.lr_full": [0.1]},
        "seeds": [0, 1],
        "scheduler": "none",
    }
    for key, value in keys.items():
        merged = isinstance(value, dict) and key == "run"
        found[key] = {name: {**found[key].get(name, {}), **part} if isinstance(part, dict) else part
                      for name, part in {**found[key], **value}.items()} if merged else value  # fmt: skip
    return found


def of_source(folder: Path, steps: int, **run: Any) -> dict[str, Any]:
    """Return a sweep of one trial of the source stage, on two ranks."""
    source = {"steps": steps, "batch_size": 2, "lr": 0.3, "checkpoint_every": 2, "log_every": 1, "posterior": None}
    space = {"method.kernel": ["imq"]}
    method = {"sigma_relative": 1.0}
    return plain(folder, stage="source", workers=2, seeds=[0], space=space, run={"source": source, "method": method, **run})


def write(folder: Path, sweep: dict[str, Any]) -> Path:
    """Write a sweep file and return it."""
    file = folder / f"{sweep['name']}.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return file
