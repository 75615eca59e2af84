"""Whole runs in milliseconds: tasks of 32 rows in the words of the tiny T5, and the configuration that trains on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_t5
import torch
import yaml
from torch import Tensor

from bpt_dist import config as configuration
from bpt_dist import train
from bpt_dist.config import RunConfig
from bpt_dist.config.method_source import method_options
from bpt_dist.distributed.mesh import World
from bpt_dist.storage import checkpoint
from bpt_dist.training.run import TrainingRun
from bpt_dist.training.stage import TrainingStage
from bpt_dist.training.startup import open_run

TASKS = """
colour: {folder: colour, fields: [text], label: label, label_words: [red, blue, green], metrics: [accuracy]}
truth: {folder: truth, fields: [premise, hypothesis], label: label, label_words: ["true", "false"], metrics: [accuracy, f1]}
mood: {folder: mood, fields: [sentence], label: label, label_words: [good, not good], metrics: [accuracy]}
count: {folder: count, fields: [text], target: answer, metrics: [accuracy], max_target_length: 4}
"""
NOUNS, VERBS = ("cat", "dog", "bird"), ("sat", "ran", "flew")


def row(task: str, number: int) -> dict[str, Any]:
    """Return a row whose length and label vary with its number."""
    words = [(NOUNS if place % 2 else VERBS)[(number * 7 + place) % 3] for place in range(2 + number % 4)]
    text = f"the {' '.join(words)} {('red', 'blue', 'green')[number % 3]}"
    return {
        "colour": {"text": text, "label": number % 3},
        "truth": {"premise": text, "hypothesis": f"a {NOUNS[number % 3]} is {VERBS[number % 2]}", "label": number % 2},
        "mood": {"sentence": text + (" not" if number % 2 else ""), "label": number % 2},
        "count": {"text": text, "answer": ("one", "two", "three one")[number % 3]},
    }[task]


def write_tasks(folder: Path, num_train: int = 32, num_eval: int = 6) -> Path:
    """Write the four tasks into `folder` and return their task file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.yaml").write_text(TASKS)
    for task in yaml.safe_load(TASKS):
        (folder / task).mkdir(exist_ok=True)
        for split, first, size in (("train", 0, num_train), ("validation", 100, num_eval), ("test", 200, num_eval)):
            lines = [json.dumps({"id": f"{split}{n}", **row(task, first + n)}) for n in range(size)]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "tasks.yaml"


def world(folder: Path, **options: Any) -> Path:
    """Write T5 and tasks into `folder` and return it: what every run of a test shares."""
    tiny_t5.make(folder / "t5", **options)
    write_tasks(folder / "tasks")
    return folder


def settings(world_folder: Path, method: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """Return plain settings of a short run: two source tasks where the method has them, two targets; `sections` win."""
    options = method_options(method["name"])
    fields = options.model_fields
    short = {"length": 3, "num_particles": 2, "sigma_relative": 1.0, "probe_steps": 3, "teacher_steps": 3}
    given = {key: value for key, value in short.items() if key in fields and not (key == "length" and method.get("init") == "file")}
    if method.get("sigma") or method.get("prior") == "none":
        given.pop("sigma_relative", None)
    plain: dict[str, Any] = {
        "name": "run",
        "output": str(world_folder / "runs"),
        "method": {**given, **method},
        "backbone": {"path": str(world_folder / "t5")},
        "data": {"task_files": [str(world_folder / "tasks" / "tasks.yaml")], "target_tasks": ["mood", "count"]},
        "target": {"steps": 3, "batch_size": 3, "eval_every": 2, "checkpoint_every": 2, "log_every": 1},
        "tracking": {"mlflow": False},
        "figures": False,
    }
    if not options.OWN_TARGET_RATES:
        plain["target"]["lr"] = 0.3
    if options.HAS_SOURCE_STAGE:
        plain["data"]["source_tasks"] = ["colour", "truth"]
        plain["source"] = {"steps": 4, "batch_size": 2, "lr": 0.3, "checkpoint_every": 2, "log_every": 1}
    for section, values in sections.items():
        plain[section] = {**plain.get(section, {}), **values} if isinstance(values, dict) else values
    return plain


def load(folder: Path, plain: Mapping[str, Any]) -> RunConfig:
    """Return the settings as the program reads them from a file."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(dict(plain)))
    return configuration.load(file)


@contextmanager
def session(config: RunConfig, mesh_world: World | None = None) -> Iterator[TrainingRun]:
    """Open a run that is not finished."""
    with open_run(config, mesh_world or World(), fresh=False) as found:
        assert found is not None
        yield found


def trained(config: RunConfig, mesh_world: World | None = None) -> Path:
    """Train and evaluate a whole run and return its folder."""
    with session(config, mesh_world) as found:
        train.train(found)
    return config.directory


class Reached(Exception):
    """Carries the stage that is about to take its first step."""


@contextmanager
def stage_of(monkeypatch: Any, config: RunConfig, number: int = 0) -> Iterator[TrainingStage]:
    """Yield the `number`-th stage of a run as `train` builds it, just before its loop; the stages before it run to their end."""
    reached: list[TrainingStage] = []
    loop = train.run_stage

    def stop_here(stage: TrainingStage) -> None:
        reached.append(stage)
        if len(reached) > number:
            stage.restore()
            raise Reached
        loop(stage)

    with suppress(Reached), session(config) as found:
        with monkeypatch.context() as patch, suppress(Reached):
            patch.setattr(train, "run_stage", stop_here)
            train.train(found)
        yield reached[-1]
        raise Reached  # so that the run does not count as finished


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors have the same names and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def newest_states(config: RunConfig) -> dict[str, dict[str, Tensor]]:
    """Return particles, optimizer state and best tensors in the newest checkpoint of each stage of a BPT run on `mood`."""
    found = {}
    for stage in ("source", "target/mood"):
        newest = checkpoint.latest(
            config.directory / stage / "checkpoints", fingerprint=configuration.fingerprint(config), warn=pytest.fail
        )
        assert newest is not None
        found[stage] = checkpoint.load(newest)[0]
    return found
