"""The sections of a run, each key with its range and meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    field_validator,
    model_validator,
)

from bpt_dist.config.base import NAME, Folder, MethodConfig, Names, Section, given_twice, refuse, without_effect

NATURAL_KEY = {"backbone": "path", "method": "name"}
"""Sections that may be written as one value, and the key that it is the value of."""
_LABEL = NAME[1:-1] + "(/(ensemble|best))?"
COMPARISON = rf"{_LABEL}:{_LABEL}(@{NAME[1:-1]}(,{NAME[1:-1]})*)?"
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class BackboneConfig(Section):
    """The pretrained language model: a T5, or a decoder-only model."""

    path: str = Field(default="mini", min_length=1, description="`mini` (shipped with the package), a hub id, or a folder.")
    revision: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._/-]+$", description="Commit hash or tag of a hub id.")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="Type of weights and activations; trained tensors are fp32.")
    attention: Literal["auto", "eager", "sdpa"] = Field(
        default="auto",
        description="Plain products or torch's fused kernel; auto is the kernel, but the products for bf16 on a CPU.",
    )
    forward: Literal["auto", "stock"] = Field(
        default="auto",
        description="`auto` reads texts by our pass without padding wherever it applies, `stock` never.",
    )

    @field_validator("attention", mode="before")
    @classmethod
    def _no_flex(cls, value: Any) -> Any:
        if value == "flex_attention":
            raise ValueError(
                "flex_attention reads beyond T5's position bias at more than one text a pass and is wrong; use auto, eager or sdpa"
            )
        return value

    @model_validator(mode="after")
    def _revision_needs_hub_id(self) -> Self:
        if self.path == "mini" or self.path.startswith((".", "/", "~")):
            refuse(without_effect(self, f"with {self.path!r}, which is not a hub id", "revision"))
        return self


class DataConfig(Section):
    """Which tasks, where they are, and how much of them is used."""

    root: Folder | None = Field(default=None, description="Local folder of JSONL task data; null loads from the hub.")
    protocol: Literal["fixed", "attempt"] = Field(default="fixed", description="`attempt` reproduces the published quirks.")
    source_tasks: Names = Field(default=(), description="Tasks learnt from; names starting with `mini_` need no files.")
    target_tasks: Names = Field(default=(), description="Tasks adapted to and evaluated.")
    task_files: Annotated[tuple[Folder, ...], Field(strict=False)] = Field(
        default=(), description="YAML files that define further tasks."
    )
    max_source_length: int | None = Field(
        default=None, ge=8, le=4096, description="Source tokens kept of a text (T); null takes each task's own limit."
    )
    max_train_rows: int | None = Field(default=None, ge=1, description="Rows kept of each training split.")
    max_eval_rows: int | None = Field(default=None, ge=1, description="Rows kept of each evaluated split.")
    shots: int | None = Field(
        default=None,
        ge=1,
        description="Training rows of each class of the target tasks (few-shot); DePT and MPT publish totals over the classes.",
    )
    split_seed: int = Field(default=42, ge=0, lt=2**31, description="Seed of the split and of every row selection.")
    cache: Folder | None = Field(
        default=None,
        description="Folder for tokens, 4 GiB at most, and downloaded data; null uses the user's cache folder. May be removed.",
    )

    @field_validator("source_tasks", "target_tasks")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"lists {', '.join(repeated)} more than once; name each task once")
        return names


class StageConfig(Section):
    """What the source and the target stage share."""

    steps: int = Field(default=0, ge=0, description="Updates of the stage; 0 skips it.")
    batch_size: int = Field(
        default=1, ge=1, description="Texts of each task in a step (B); a mixture draws K times as many from its K tasks."
    )
    sampling: Literal["all", "proportional", "temperature", "stochastic"] = Field(
        default="all",
        description="Tasks of a step: `all`, or a mixture: `proportional` to their rows, one task with a `temperature`, or "
        "`stochastic` (MPT: 2 to K tasks with replacement).",
    )
    sampling_cap: int = Field(default=2**18, ge=1, description="Most rows a task counts in `proportional`, `stochastic`.")
    sampling_temperature: float = Field(default=10.0, ge=1, description="T of `temperature`: a task weighs its rows^(1/T).")
    lr: float | None = Field(default=None, gt=0, description="Learning rate at its peak.")
    lr_relative: float | None = Field(
        default=None,
        gt=0,
        description="The same of soft prompts, in units of the root mean square of the backbone's word embeddings; or give lr.",
    )
    optimizer: Literal["adamw", "sgd", "rmsprop"] = Field(default="adamw", description="Rule that applies the direction.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="Fraction of the steps in which the rate rises from 0.")
    schedule: Literal["linear", "constant"] = Field(default="linear", description="Learning rate after the warm-up.")
    clip: float | None = Field(default=None, gt=0, description="Largest norm of the direction of one prompt.")
    pass_size: int | None = Field(
        default=None,
        ge=1,
        description="Sequences (particles x texts) in one pass through the backbone; null takes some thousand tokens, or all "
        "that fit into the memory where the backbone is partitioned. Changes memory and speed only.",
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="A NaN or infinite loss or gradient ends the run; or the step is skipped, at most two in a row."
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(default=10, ge=1, description="Steps between records in metrics.jsonl.")

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        refuse(given_twice(self, "lr"))
        return self

    @model_validator(mode="after")
    def _sampling(self) -> Self:
        idle = [] if self.sampling in ("proportional", "stochastic") else ["sampling_cap"]
        idle += [] if self.sampling == "temperature" else ["sampling_temperature"]
        refuse(without_effect(self, f"with sampling {self.sampling}", *idle))
        return self


class SourceStageConfig(StageConfig):
    """Learning from the source tasks; for BPT, the Stein variational sampling of the posterior."""

    tasks_per_step: int | None = Field(default=None, ge=1, description="Source tasks drawn a step (kappa); null takes all K.")
    task_weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="Weight w_k of a task's likelihood; tasks not named weigh 1."
    )
    likelihood_scale: Annotated[float, Field(gt=0)] | Literal["dataset"] = Field(
        default=1.0, description="Factor c of the score; `dataset` multiplies task k by its number of rows."
    )
    annealing: Literal["none", "linear", "tanh", "cyclic"] = Field(
        default="none", description="Schedule of a factor in (0, 1] on the driving term."
    )
    annealing_steps: int | None = Field(
        default=None, ge=1, description="Steps until the factor stays 1; `cyclic` rises four times on the way."
    )
    shared_texts: bool = Field(default=True, description="All particles see the same texts; false draws texts for each.")
    posterior: Folder | None = Field(
        default=None,
        description="Stored posterior to start from, a folder or `owner/name@revision` of the hub; the stage is skipped, its other "
        "keys and the method's options for it describe the origin. In files with seeds `{seed}` is that of the run: "
        "FOLDER/LABEL-s{seed} is another row's.",
    )

    @model_validator(mode="after")
    def _mixture(self) -> Self:
        if self.sampling != "all":
            problems = without_effect(self, f"with sampling {self.sampling}, which draws from all source tasks", "tasks_per_step")
            if self.likelihood_scale == "dataset":
                problems.append(f"likelihood_scale: dataset counts a task's rows, and so does sampling {self.sampling}; use all")
            refuse(problems)
        return self

    @model_validator(mode="after")
    def _annealing(self) -> Self:
        if self.annealing == "none":
            refuse(without_effect(self, "with annealing none", "annealing_steps"))
        elif self.annealing_steps is None:
            refuse([f"annealing_steps: is missing, annealing {self.annealing} needs it; give a number of steps"])
        elif self.steps and self.annealing_steps > self.steps:
            refuse([f"annealing_steps: exceeds source.steps {self.steps} (got {self.annealing_steps}); lower it"])
        return self


class TargetStageConfig(StageConfig):
    """Adaptation to the target tasks."""

    joint: bool = Field(default=False, description="Train all target tasks together, sharing what the method shares.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between validations; there always is one after the last step."
    )
    patience: int | None = Field(default=None, ge=1, description="Validations without improvement before the stage ends.")

    @model_validator(mode="after")
    def _selection(self) -> Self:
        if not self.joint:
            refuse(without_effect(self, "without target.joint, which trains one task at a time", "sampling"))
        if self.patience is not None and self.eval_every is None:
            refuse([f"patience: needs target.eval_every (got {self.patience}); set eval_every or remove patience"])
        return self


class EvaluationConfig(Section):
    """What is predicted and measured at the end."""

    splits: Annotated[tuple[Literal["validation", "test"], ...], Field(strict=False, min_length=1)] = Field(
        default=("test",), description="Splits that are reported."
    )
    decode: Literal["auto", "rank", "generate"] = Field(
        default="auto", description="`rank` compares label words, `generate` writes text; auto ranks where labels are closed."
    )
    predict: Literal["map", "ensemble", "best"] = Field(
        default="map",
        description="`map`: one prompt. `ensemble`: also the average over several. `best`: also the adapted particle with the best "
        "validation score.",
    )
    num_samples: int | None = Field(
        default=None, ge=2, description="Samples around the adapted prompt for `ensemble`; null averages adapted particles."
    )
    batch_size: int = Field(default=32, ge=1, description="Texts in one evaluation pass; changes speed and memory only.")
    max_new_tokens: int | None = Field(default=None, ge=1, le=1024, description="Tokens generated; null takes the task's limit.")

    @model_validator(mode="after")
    def _idle(self) -> Self:
        idle = without_effect(self, f"with predict {self.predict}", "num_samples") if self.predict != "ensemble" else []
        if self.decode == "rank":
            idle += without_effect(self, "with decode rank", "max_new_tokens")
        refuse(idle)
        return self


class MeshShape(Section):
    """Ranks along each axis; their product is the world size."""

    particle: int = Field(ge=1, description="Ranks that share the particles; divides num_particles.")
    data: int = Field(ge=1, description="Ranks that share the texts of a step.")


def _mesh_form(value: Any) -> str:
    return "shape" if isinstance(value, dict | MeshShape) else "word"


class DistributionConfig(Section):
    """Processes: how the work is divided and how long to wait for peers."""

    mesh: Annotated[Annotated[Literal["auto"], Tag("word")] | Annotated[MeshShape, Tag("shape")], Discriminator(_mesh_form)] = (
        Field(default="auto", description="`auto`, or the ranks along `particle` and `data`.")
    )
    exchange: Literal["all_gather", "coordinates"] = Field(
        default="all_gather",
        description="Each rank receives all particles, or a slice of the prompt positions of all; faster from some 64 particles.",
    )
    shard: Literal["none", "deepspeed", "fsdp2"] = Field(
        default="none", description="Who partitions the frozen backbone over all ranks."
    )
    scope: Literal["node", "world"] = Field(
        default="world", description="Partition over all ranks, or within each host, so that no weights cross the network."
    )
    offload: Literal["none", "cpu"] = Field(
        default="none", description="Where partitions wait: on the device, or in the memory of the host; changes nothing on a CPU."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Keep only the inputs of each block and compute the block again in the backward pass."
    )
    zero_config: Folder | None = Field(
        default=None, description="DeepSpeed JSON of `shard: deepspeed`; null takes the measured settings."
    )
    exact: bool = Field(
        default=False,
        description="The same bits on every world size: one particle and one text a pass, also in evaluations. Slow; for audits.",
    )
    expect_world_size: int | None = Field(default=None, ge=1, description="Refuse to start with another number of processes.")
    startup_timeout: int = Field(
        default=600, ge=1, description="Seconds to wait for all ranks to appear, and for one to load the backbone or a task."
    )
    step_timeout: int = Field(default=120, ge=1, description="Seconds after which a silent rank counts as lost.")
    storage_timeout: int = Field(
        default=1800, ge=1, description="Seconds that ranks wait while rank 0 writes a checkpoint, an export, results or figures."
    )
    grace: int | None = Field(
        default=None, ge=1, description="Seconds that a stop request waits for the end of a step; null is step_timeout and 20 more."
    )

    @model_validator(mode="after")
    def _world_size(self) -> Self:
        if self.shard != "deepspeed":
            refuse(without_effect(self, f"with shard {self.shard}", "zero_config"))
        if self.shard == "none":
            refuse(without_effect(self, "with shard none, which partitions nothing", "scope", "offload"))
        if isinstance(self.mesh, MeshShape) and self.expect_world_size is not None:
            ranks = self.mesh.particle * self.mesh.data
            if ranks != self.expect_world_size:
                refuse([f"expect_world_size: differs from the {ranks} ranks of the mesh (got {self.expect_world_size})"])
        return self


class TrackingConfig(Section):
    """Where the run is mirrored; metrics.jsonl is always written."""

    mlflow: bool = Field(default=True, description="Mirror the run to MLflow.")
    uri: str | None = Field(
        default=None, description="MLflow store; null is MLFLOW_TRACKING_URI, or else sqlite in `<output>/mlflow.db`."
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="MLflow experiment; null is MLFLOW_EXPERIMENT_NAME, or else `name`.",
    )
    allow_insecure: bool = Field(default=False, description="Accept plain http to a host other than this one.")
    register_as: str | None = Field(
        default=None,
        pattern=NAME,
        description="Alias under which finished prompts become versions of the registered models `<experiment>-<task>`.",
    )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if not self.mlflow:
            refuse(without_effect(self, "with mlflow false", "uri", "experiment", "allow_insecure", "register_as"))
        if self.register_as is not None and re.fullmatch(r"latest|v\d+|.*\..*", self.register_as):
            refuse([f"register_as: is no alias that MLflow takes (got {self.register_as!r}); use e.g. champion"])
        problem = None if self.uri is None else problem_with_uri(self.uri, self.allow_insecure)
        refuse([] if problem is None else [f"uri: {problem}"])
        return self


Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(strict=False, min_length=1)]


class RunConfig(Section):
    """One run, or with `rows` and `seeds` the list of runs that share its other keys (`config.expand`)."""

    name: str = Field(default="run", pattern=NAME, description="Name of the run and of its folder below `output`.")
    output: Folder = Field(default=Path("runs"), description="Folder that holds run folders.")
    run_dir: Folder | None = Field(default=None, description="Folder of the run; null is `<output>/<name>`.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of initial prompts, batches and sampling.")
    reduction: Literal["token_mean", "token_sum"] = Field(
        default="token_mean", description="Log-likelihood of a text: mean over its target tokens, or their sum."
    )
    method: SerializeAsAny[MethodConfig] = Field(description="The method and its options; a single value is its name.")
    backbone: BackboneConfig = Field(default=BackboneConfig(), description="The pretrained model; a single value is its path.")
    data: DataConfig = Field(default=DataConfig(), description="Tasks and rows.")
    source: SourceStageConfig = Field(default=SourceStageConfig(), description="Source stage.")
    target: TargetStageConfig = Field(default=TargetStageConfig(), description="Target stage.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="Predictions and metrics.")
    distribution: DistributionConfig = Field(default=DistributionConfig(), description="Processes.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="Experiment tracking.")
    figures: bool = Field(default=True, description="Draw figures at the end of the run.")
    rows: Annotated[tuple[dict[str, Any], ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="One run a row: keys that differ from the rest of the file, and `label` to name the row."
    )
    seeds: Seeds | None = Field(default=None, description="One run a seed; a row may have its own.")
    comparisons: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="Rows that the sentences below the table compare, `FIRST:SECOND` or `FIRST:SECOND@TASK,...`; "
        "`LABEL/ensemble` is a row's line of averaged predictions.",
    )
    quick: dict[str, Any] | None = Field(
        default=None,
        description="A smaller version of the table: keys that `bpt-dist run-table --quick` puts in the place of the file's; its "
        "folder is `<name>-quick`.",
    )

    def particles_share_texts(self, stage: StageConfig) -> bool:
        """Return whether ranks may share the particles of a text: not where each has texts of its own, nor with `exact`."""
        return not self.distribution.exact and getattr(stage, "shared_texts", True)

    @property
    def directory(self) -> Path:
        """Return the run directory (for several runs, the folder that holds theirs)."""
        return self.run_dir if self.run_dir is not None else self.output / self.name

    @field_validator("comparisons")
    @classmethod
    def _two_rows(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if not re.fullmatch(COMPARISON, text):
                raise ValueError(f"{text!r} is no comparison of two rows; write FIRST:SECOND or FIRST:SECOND@TASK,TASK")
        return texts

    @model_validator(mode="before")
    @classmethod
    def _values_are_sections(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("backbone"), str):
            return data
        return {**data, "backbone": {NATURAL_KEY["backbone"]: data["backbone"]}}


def problem_with_uri(uri: str, allow_insecure: bool) -> str | None:
    """Return what is wrong with an MLflow store address, or None.

    Every process must reach the same store, so sqlite needs an absolute path; a password in the address would
    end up in the run record, so credentials belong in MLflow's own variables or a file.
    """
    try:
        parts = urlsplit(uri)
        host, credentials = parts.hostname, parts.username is not None or parts.password is not None
    except ValueError:
        return f"is not an address (got {uri!r}); write sqlite:////absolute/path.db or https://HOST:PORT"
    if credentials:
        return "holds credentials (value withheld); remove them from the address"
    if parts.scheme == "sqlite":
        absolute = uri.startswith("sqlite:////")
        return None if absolute else f"needs an absolute path (got {uri!r}); write sqlite:////absolute/path.db"
    if parts.scheme not in {"http", "https"} or not host:
        return f"is neither sqlite nor http(s) (got {uri!r}); write sqlite:////absolute/path.db or https://HOST:PORT"
    if parts.scheme == "http" and host not in LOCAL_HOSTS and not allow_insecure:
        return f"is plain http to another host (got {uri!r}); use https or set tracking.allow_insecure: true"
    return None
