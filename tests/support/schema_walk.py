"""Every value of the configuration schema that can be run: enums, booleans, bounds, and samples where a type has no bounds.

Cases come from the pydantic models, so a new key is run without a change here. SAMPLES holds values of keys whose type names none,
NEEDS what a value needs beside it, NOT_RUN what cannot be run and why.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy
import tiny_run
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from bpt_dist.config.keys import fields_by_key, leaves, takes_value
from bpt_dist.config.method_source import method_names, method_options

NEAR = 1e-6
"""How far from an exclusive bound of a float its boundary value is."""
REMOVED = "(removed)"
"""Takes a key of the base away."""
BASE_METHOD = "bpt"
"""The method of all cases of section keys: it has both stages and particles."""
METHOD_OF = {"target.lr": "prompt_tuning", "target.lr_relative": "prompt_tuning"}
"""Section keys that the base method does not take."""


class Case(NamedTuple):
    """One value of one key, run with one method; `key` is dotted, `text` the value as JSON, so that cases can be compared."""

    method: str
    key: str
    text: str

    @property
    def value(self) -> Any:
        """Return the value itself."""
        return json.loads(self.text)

    @property
    def names(self) -> list[str]:
        """Return what a table may call the case, from the widest to the narrowest."""
        bare = self.text.replace('"', "")
        value = f"{self.key}={bare}"
        return [self.key, value, f"{self.method} {self.key}", f"{self.method} {value}"]

    def __str__(self) -> str:
        return self.names[-1]


# `world:x` becomes the path of x below the folder that `make_world` filled.
SAMPLES: dict[str, list[Any]] = {
    "name": ["0." + "x" * 62],
    "output": ["world:elsewhere/runs"],
    "run_dir": ["world:one-run"],
    "rows": [[{"label": "one"}, {"label": "two", "reduction": "token_sum"}]],
    "seeds": [[0, 2**31 - 1]],
    "comparisons": [["one:two"]],
    "quick": [{"seeds": [3], "source": {"steps": 1}}],
    "backbone.path": ["mini"],
    "data.root": ["world:catalogue"],
    "data.cache": ["world:cache"],
    "data.task_files": [["world:tasks/tasks.yaml"]],
    "data.source_tasks": [["colour"], ["colour", "truth", "mood"]],
    "data.target_tasks": [["mood"], ["truth", "count", "colour"]],
    "source.task_weights": [{"colour": NEAR}, {"colour": 0.5, "truth": 3.0}],
    "source.posterior": ["world:posterior"],
    "source.weight_decay": [0.0, 0.1],
    "target.weight_decay": [0.0, 0.1],
    "evaluation.splits": [["validation"], ["validation", "test"]],
    "tracking.uri": ["world:mlflow.db"],
    "tracking.experiment": ["e", "E" * 128],
    "tracking.register_as": ["champion"],
    "distribution.zero_config": ["world:zero.json"],
    "distribution.startup_timeout": [60],
    "distribution.step_timeout": [60],
    "distribution.storage_timeout": [60],
    "method.init_text": ["a cat"],
    "method.init_file": ["world:prompt.npy"],
    "method.targets": [["q"], ["q", "k", "v", "o", "wi", "wo"]],
    "method.budget_length": [40],
}
"""Values of keys whose type names none. The bound of the time-outs is one second, which a busy machine breaks; that of
`budget_length` leaves no rank for any length."""

SMALL = {
    "source.batch_size": 1, "target.batch_size": 1, "source.steps": 1, "target.steps": 1, "data.max_eval_rows": 1,
    "data.target_tasks": ["mood"],
}  # fmt: skip
MLFLOW = {"tracking.mlflow": True, "tracking.uri": "world:mlflow.db"}
NEEDS: dict[str, dict[str, Any]] = {
    "comparisons": {"rows": [{"label": "one"}, {"label": "two", "reduction": "token_sum"}]},
    "quick": {"seeds": [0]},
    "source.steps=0": {"source.posterior": "world:posterior"},
    "source.lr=null": {"source.posterior": "world:posterior"},
    "source.lr_relative": {"source.lr": REMOVED},
    "target.lr=null": {"target.lr_relative": 0.1},
    "target.lr_relative": {"target.lr": REMOVED},
    "method.lr_full=null": {"method.lr_full_relative": 0.1},
    "source.annealing": {"source.annealing_steps": 2},
    "source.annealing_steps": {"source.annealing": "cyclic"},
    "source.sampling_cap": {"source.sampling": "proportional"},
    "source.sampling_temperature": {"source.sampling": "temperature"},
    "target.sampling": {"target.joint": True},
    "target.sampling_cap": {"target.joint": True, "target.sampling": "stochastic"},
    "target.sampling_temperature": {"target.joint": True, "target.sampling": "temperature"},
    "target.patience": {"target.eval_every": 1},
    "evaluation.num_samples": {"evaluation.predict": "ensemble"},
    "evaluation.max_new_tokens": {"evaluation.decode": "generate", "data.max_eval_rows": 2, "data.target_tasks": ["mood"]},
    "data.root": {"data.target_tasks": ["rte"]},
    "data.max_eval_rows": {"data.target_tasks": ["truth", "count"]},
    "tracking.mlflow=true": MLFLOW,
    "tracking.uri": MLFLOW,
    "tracking.experiment": MLFLOW,
    "tracking.allow_insecure": MLFLOW,
    "tracking.register_as": MLFLOW,
    "distribution.mesh.particle": {"distribution.mesh.data": "world size"},
    "distribution.mesh.data": {"distribution.mesh.particle": "world size"},
    "distribution.scope": {"distribution.shard": "deepspeed"},
    "distribution.offload": {"distribution.shard": "deepspeed"},
    "distribution.zero_config": {"distribution.shard": "deepspeed"},
    "distribution.expect_world_size": {"distribution.expect_world_size": "world size"},
    "method.init=text": {"method.init_text": "a cat"},
    "method.init=file": {"method.init_file": "world:prompt.npy", "method.length": REMOVED},
    "method.init_text": {"method.init": "text"},
    "method.init_file": {"method.init": "file", "method.length": REMOVED},
    "method.init_scale": {"method.init": "uniform"},
    "method.length=2000": {**SMALL, "method.init": "normal"},
    "dept method.length=2000": {**SMALL, "method.init": "normal", "method.budget_length": 2100},
    "method.particle_init=independent": {"method.init": "normal"},
    "method.num_particles=1024": {**SMALL, "method.length": 1},
    "method.prior=none": {"method.sigma_relative": REMOVED},
    "method.sigma": {"method.sigma_relative": REMOVED},
    "method.sigma_relative=null": {"method.sigma": 0.5},
    "method.distillation=0.0": {"method.teacher_steps": REMOVED},
    "method.top_k": {"method.retrieval": "mixture"},
    "method.max_length=4096": {"method.rank": 1},
}
"""What a key or value needs beside it; the narrowest entry wins. A null needs nothing unless it is named."""

NOT_RUN: dict[str, str] = {
    "backbone.revision": "needs a hub id, and tests have no network",
}
"""Keys and values that are not run anywhere, each with its reason."""
TWO_RANKS_ONLY: dict[str, str] = {
    "distribution.shard": "partitions need ranks",
    "distribution.scope": "partitions need ranks",
    "distribution.offload": "partitions need ranks",
    "distribution.zero_config": "partitions need ranks",
}
"""Keys that one process does not run, and two ranks do."""
TWO_RANKS_TOO = (
    "distribution.", "evaluation.", "source.annealing", "source.sampling", "source.shared_texts", "source.tasks_per_step",
    "source.likelihood_scale", "source.pass_size", "source.on_non_finite", "target.joint", "target.pass_size", "bpt method.kernel",
    "bpt method.scope", "bpt method.form", "bpt method.bandwidth", "bpt method.start", "source.lr_relative",
)  # fmt: skip
"""Where cases begin that two ranks run as well: how work is divided and exchanged, and what is predicted together."""
ACROSS_METHODS = (
    "evaluation.decode", "target.joint", "backbone.dtype", "backbone.forward", "data.protocol", "distribution.shard",
    "distribution.exact", "distribution.activation_checkpointing",
)  # fmt: skip
"""Section keys whose code depends on the method: every method runs their values."""


def values(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield the values of an annotation: enum values, booleans, null, and the numbers at the bounds."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        bounds_given = [item for part in more for item in (part.metadata if isinstance(part, FieldInfo) else [part])]
        yield from values(inner, (*metadata, *bounds_given))
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from values(part, metadata)
    elif origin is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from (False, True)
    elif annotation is type(None):
        yield None
    elif annotation in (int, float):
        yield from _bounds(annotation, metadata)


def _bounds(kind: type, metadata: tuple[Any, ...]) -> Iterator[float]:
    """Yield the smallest and the largest number that the bounds allow."""
    step: float = 1 if kind is int else NEAR
    for item in metadata:
        if isinstance(item, Ge):
            yield kind(item.ge)
        elif isinstance(item, Le):
            yield kind(item.le)
        elif isinstance(item, Gt):
            yield kind(item.gt + step)
        elif isinstance(item, Lt):
            yield kind(item.lt - step)


def all_cases() -> list[Case]:
    """Return every case: section keys with the base method, the options of every method, and with all of them what crosses them."""
    found = []
    for name in method_names():
        for case in _cases_of(name):
            if case.key.startswith("method.") or name == BASE_METHOD or case.key in ACROSS_METHODS:
                found.append(case._replace(method=METHOD_OF.get(case.key, name)))
    return [case for case in dict.fromkeys(found) if not _listed(case, NOT_RUN)]


def one_process() -> list[Case]:
    """Return the cases that one process runs to the end."""
    return [case for case in all_cases() if not _listed(case, TWO_RANKS_ONLY)]


def two_ranks() -> list[Case]:
    """Return the cases that two ranks run to the end."""
    return [case for case in all_cases() if any(name.startswith(TWO_RANKS_TOO) for name in (case.key, str(case)))]


def every_key() -> set[str]:
    """Return every key of the schema, `method key` for options."""
    found = set()
    for name in method_names():
        for key, _field in _leaves(name):
            found.add(f"{name} {key}" if key.startswith("method.") else key)
    return found


def run_somewhere() -> set[str]:
    """Return every key that some case runs with a value."""
    cases = [case for case in (*one_process(), *two_ranks()) if case.value is not None]
    return {f"{case.method} {case.key}" if case.key.startswith("method.") else case.key for case in cases}


def settings(world: Path, folder: Path, case: Case, num_ranks: int = 1) -> dict[str, Any]:
    """Return the plain configuration of one case, which writes below `folder`."""
    short = {"steps": 2, "checkpoint_every": 1, "log_every": 1, "batch_size": 2}
    plain = tiny_run.settings(world, {"name": case.method}, output=str(folder / "runs"), target={**short, "eval_every": 1})
    if "source" in plain:
        plain["source"] |= short
    names = case.names if case.value is not None else case.names[1::2]
    needed = next((NEEDS[name] for name in reversed(names) if name in NEEDS), {})
    for key, value in {case.key: case.value, **needed}.items():
        if not key.startswith("source.") or "source" in plain:
            _set(plain, key, _placed(value, world, num_ranks))
    return plain


def make_world(folder: Path) -> Path:
    """Write what all cases share: T5, tasks, a catalogue task, a prompt, ZeRO's settings and a posterior; return the folder."""
    tiny_run.world(folder)
    place = folder / "catalogue" / "glue" / "rte"
    place.mkdir(parents=True)
    for split, size in (("train", 8), ("validation", 6)):
        rows = [{"sentence1": f"the cat w{n}", "sentence2": f"a dog w{n}", "label": n % 2, "idx": n} for n in range(size)]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numpy.save(folder / "prompt.npy", numpy.linspace(-1, 1, 3 * 32, dtype=numpy.float32).reshape(3, 32))
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    origin = tiny_run.trained(tiny_run.load(folder, settings(folder, folder / "origin", Case(BASE_METHOD, "seed", "0"))))
    (origin / "source" / "posterior").rename(folder / "posterior")
    return folder


def _listed(case: Case, table: Collection[str]) -> bool:
    return any(name in table for name in (case.names if case.value is not None else case.names[1::2]))


def _leaves(method: str) -> Iterator[tuple[str, FieldInfo]]:
    options = method_options(method)
    for key, field in fields_by_key(options).items():
        if takes_value(field):
            yield key, field


def _cases_of(method: str) -> Iterator[Case]:
    base = leaves(tiny_run.settings(Path(), {"name": method}))
    for key, field in _leaves(method):
        chosen = list(values(field.annotation, tuple(field.metadata)))
        if key in SAMPLES:
            chosen = [*SAMPLES[key], *([None] if None in chosen else [])]
        # A default is run by every other case; the name of the method is the run with nothing but defaults.
        default = [] if key in base else [json.dumps(field.get_default(call_default_factory=True), default=str)]
        other = [value for value in chosen if json.dumps(value) not in default]
        yield from (Case(method, key, json.dumps(value)) for value in other or chosen)


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        below = plain.get(parent)
        plain[parent] = below if isinstance(below, dict) else {}
        plain = plain[parent]
    plain[last] = value
    if value == REMOVED:
        del plain[last]


def _placed(value: Any, world: Path, num_ranks: int) -> Any:
    """Return a value of the tables with the paths and the number of ranks of this test."""
    if isinstance(value, list):
        return [_placed(item, world, num_ranks) for item in value]
    if value == "world size":
        return num_ranks
    if isinstance(value, str) and value.startswith("world:"):
        place = world / value.removeprefix("world:")
        return f"sqlite:///{place}" if place.suffix == ".db" else str(place)
    return value
