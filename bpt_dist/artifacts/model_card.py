"""The README of an export: what the prompt is, for which backbone, how it was measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.artifacts.card_code import code_of
from bpt_dist.artifacts.task_record import TaskRecord

OLDEST_PEFT = "0.6.0"  # the first to read multi-task prompts, and weights as safetensors
SEQ_2_SEQ, CAUSAL = "SEQ_2_SEQ_LM", "CAUSAL_LM"  # what PEFT calls encoder-decoders and decoder-only models
AUTO_CLASSES = {SEQ_2_SEQ: "AutoModelForSeq2SeqLM", CAUSAL: "AutoModelForCausalLM"}  # transformers' names of them
PIPELINES = {SEQ_2_SEQ: "text2text-generation", CAUSAL: "text-generation"}  # the hub's
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class PosteriorFacts:
    """The source posterior in numbers: M particles, and how far apart they ended (Euclidean, in prompt space)."""

    num_particles: int
    steps: int
    distance_min: float
    distance_median: float
    distance_max: float
    norm_of_mean: float
    mean_norm: float

    @classmethod
    def of(cls, particles: Float[Tensor, "M P D"], steps: int) -> PosteriorFacts:
        """Summarise particles after `steps` of the source stage; distances are 0 for one particle."""
        flat = particles.detach().double().flatten(1)
        pairs = torch.triu_indices(len(flat), len(flat), offset=1)
        distances = (flat[pairs[0]] - flat[pairs[1]]).norm(dim=1) if len(flat) > 1 else torch.zeros(1)
        return cls(
            num_particles=len(flat),
            steps=steps,
            distance_min=float(distances.min()),
            distance_median=float(distances.quantile(0.5)),
            distance_max=float(distances.max()),
            norm_of_mean=float(flat.mean(0).norm()),
            mean_norm=float(flat.norm(dim=1).mean()),
        )


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a reader of an export must know; `results` are entries of `results.json` (values in percent)."""

    title: str
    method: str
    backbone_hash: str
    tokenizer_hash: str
    protocol: str
    target_tasks: Sequence[str] = ()
    source_tasks: Sequence[str] = ()
    data: str = ""
    results: Sequence[Mapping[str, Any]] = ()
    posterior: PosteriorFacts | None = None


def card_text(
    facts: CardFacts,
    *,
    what: str,
    base_model: str,
    revision: str | None,
    tasks: Sequence[str] | None = None,
    task_type: str = SEQ_2_SEQ,
    record: TaskRecord | None = None,
) -> str:
    """Return the card in Markdown (without metadata); `what` is exported, `tasks` names the task ids of a multi-task export.

    With the `record` of an export the card holds a program that answers rows.
    """
    purpose = f", for {', '.join(facts.target_tasks)}" if facts.target_tasks else ""
    auto_class = AUTO_CLASSES[task_type]
    sections = [
        f"# {facts.title}",
        f"This is {what} `{base_model}`, trained with {facts.method}{purpose}. The backbone itself is unchanged.",
        *([] if record is not None and record.predict == "ensemble" else [_how_to_load(base_model, revision, tasks, auto_class)]),
        *([] if record is None else [_how_to_use(record, auto_class)]),
    ]
    sections += [_origin(facts, base_model, revision), _measurements(facts.results)]
    if facts.posterior is not None:
        sections.append(_posterior(facts.posterior))
    return "\n\n".join(sections) + "\n"


def is_hub_id(base_model: str) -> bool:
    """Return whether `base_model` can be a repository of the hub: the metadata field may name nothing else."""
    return _HUB_ID.fullmatch(base_model) is not None


def prompt_in_words(shape: tuple[int, int], num_tasks: int | None = None, *, task_type: str = SEQ_2_SEQ) -> str:
    """Return what a prompt of `shape`, or one shared by tasks, is to its backbone."""
    owner = "the encoder's" if task_type == SEQ_2_SEQ else "the"
    form = "one soft prompt" if num_tasks is None else f"one shared soft prompt and a low-rank factor for each of {num_tasks} tasks"
    return f"{form} of {shape[0]} positions x {shape[1]} numbers, to be put before {owner} word embeddings of"


def _how_to_load(base_model: str, revision: str | None, tasks: Sequence[str] | None, auto_class: str) -> str:
    at = "" if revision is None else f", revision={revision!r}"
    lines = [
        "## How to load it\n\n```python",
        f"from peft import PeftModel\nfrom transformers import {auto_class}\n",
        f"base = {auto_class}.from_pretrained({base_model!r}{at})",
        'model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER").eval()\n```',
        f"\nPEFT {OLDEST_PEFT} and later versions read it. Texts were generated greedily, whatever generation_config.json of the "
        "backbone sets: `num_beams=1, do_sample=False`, no penalties, no forced or banned tokens.",
    ]
    if tasks is not None:
        ids = "".join(f"\n| {index} | {task} |" for index, task in enumerate(tasks))
        lines.append(
            f"\nPass `task_ids` (one id per text) to `forward` (with `labels`) and to `generate`:\n\n| id | task |\n|--:|:--|{ids}"
        )
    return "\n".join(lines)


def _how_to_use(record: TaskRecord, auto_class: str) -> str:
    names = ", ".join(f"`{task.name}`" for task in record.tasks)
    columns = ", ".join(f"`{name}`" for name in record.tasks[0].fields)
    measured = (
        " The run also measured the adapted particle with the best validation score, which is an export of its own: this is the "
        "MAP prompt." if (record.evaluated, record.predict) == ("best", "map") else ""
    )  # fmt: skip
    return (
        f"## How to use it\n\n`task.json` says how a row of {names} becomes text and how the answer is found. This program reads "
        "it with PEFT and transformers alone. It gives the answers of the run that made this export; so does `bpt-dist predict`, "
        "in batches. A text that spells a special token, such as `</s>`, is the one exception: only the latter reads it as plain "
        f"text.{measured}"
        f"\n\n```python\n{code_of(record, auto_class)}```\n\nThen `answer({{...}})` takes a row with the columns {columns}."
    )


def _origin(facts: CardFacts, base_model: str, revision: str | None) -> str:
    lines = [
        "## Origin\n",
        f"- backbone: `{base_model}`, revision `{revision or 'not pinned'}`, SHA-256 `{facts.backbone_hash}`",
        f"- tokenizer: SHA-256 `{facts.tokenizer_hash}`",
        f"- source tasks: {', '.join(facts.source_tasks) or 'none'}",
        f"- target tasks: {', '.join(facts.target_tasks) or 'none'}",
        f"- protocol: {facts.protocol}",
    ]
    return "\n".join(lines + ([f"- data: {facts.data}"] if facts.data else []))


def _measurements(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "## Measurements\n\nNone were made before this export."
    lines = [
        "## Measurements\n",
        "| task | split | metric | score, % | test examples | seed |",
        "|:--|:--|:--|--:|--:|--:|",
    ]
    for r in results:
        score = "undefined" if r["value"] is None else f"{r['value']:.1f}"
        lines.append(f"| {r['task']} | {r['split']} | {r['metric']} | {score} | {r['n']} | {r['seed']} |")
    return "\n".join([*lines, "\nOne line is one seed; a difference between prompts needs several."])


def _posterior(facts: PosteriorFacts) -> str:
    return (
        f"## Source posterior\n\n{facts.num_particles} particles after {facts.steps} steps of SVGD. Pairwise distances: "
        f"{facts.distance_min:.4g} (smallest), {facts.distance_median:.4g} (median), {facts.distance_max:.4g} (largest). "
        f"Norm of their mean {facts.norm_of_mean:.4g}, mean of their norms {facts.mean_norm:.4g}: far apart numbers "
        "mean that the particles disagree and that their mean is not one of them."
    )
