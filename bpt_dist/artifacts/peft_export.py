"""Write prompts and low-rank changes as PEFT folders that load without this package, under PEFT 0.6.0 and later.

Every export is built in a folder beside its place and moved there by one rename, after its tensors were read back.
Only one rank may export.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpt_dist.artifacts.model_card import PIPELINES, SEQ_2_SEQ, CardFacts, card_text, is_hub_id, prompt_in_words
from bpt_dist.artifacts.task_record import TaskRecord
from bpt_dist.errors import ConfigError, NonFinite, StorageError
from bpt_dist.storage import layout
from bpt_dist.storage.files import (
    OS_FILES,
    encode_json,
    leftovers_of,
    remove_leftovers,
    remove_tree,
    temporary_name,
    write_or_explain,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PromptLearningConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
T5 = "t5"  # what a backbone is whose facts do not say
# What the oldest version (`model_card.OLDEST_PEFT`) knows of adapter_config.json: PEFT refuses a file with a key it does not know.
_PEFT_KEYS = frozenset(("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"))
_PROMPT_KEYS = _PEFT_KEYS | {
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path",
}  # fmt: skip
KEYS_OF_OLDEST_PEFT = {
    "PROMPT_TUNING": _PROMPT_KEYS,
    "MULTITASK_PROMPT_TUNING": _PROMPT_KEYS
    | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_ranks", "num_tasks"},
    "LORA": _PEFT_KEYS
    | {"r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights",
       "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"},
}  # fmt: skip
ConfigFacts = Mapping[str, Any]  # d_model, num_layers, num_heads, model_type, and task_type of PEFT: `Backbone.facts` has them


def export_prompt(
    prompt: Float[Tensor, "P D"],
    folder: Path,
    *,
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    card: CardFacts,
    record: TaskRecord | None = None,
) -> Path:
    """Write one prompt as a PEFT PROMPT_TUNING folder, replacing an earlier export there, and return the folder.

    With `record`, the language of its tasks, the folder can be used alone: `task.json`. The logits under PEFT are bit-identical to
    those of the prompt put before the word embeddings by hand. `base_model` must be what `from_pretrained` understands: a hub id or
    a folder. Raises ConfigError for a prompt of another width, NonFinite, StorageError.
    """
    prompt = _checked(prompt, config_facts, "prompt")

    def build(place: Path) -> None:
        given: dict[str, Any] = {"base_model": base_model, "revision": revision, "config_facts": config_facts}
        _write_prompt(prompt, place, **given, card=card, record=record)

    return _publish(Path(folder), build, prompt.nbytes)


def export_multitask(
    shared: Float[Tensor, "P D"],
    cols: Float[Tensor, "tasks P R"],
    rows: Float[Tensor, "tasks R D"],
    folder: Path,
    *,
    tasks: Sequence[str],
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    card: CardFacts,
    record: TaskRecord | None = None,
) -> Path:
    """Write the prompts shared * (cols @ rows) of several tasks as one PEFT MULTITASK_PROMPT_TUNING folder.

    `tasks` names the ids 0, 1, ... in the card. PEFT's `forward` takes `labels` with this type and ignores
    `decoder_input_ids`. Raises as `export_prompt`.
    """
    from peft import MultitaskPromptTuningConfig

    shared = _checked(shared, config_facts, "shared prompt")
    factors = {"prefix_task_cols": _plain(cols, "cols"), "prefix_task_rows": _plain(rows, "rows")}
    if not len(cols) == len(rows) == len(tasks):
        raise ConfigError(f"{folder}: {len(cols)} and {len(rows)} factors for {len(tasks)} tasks; give one of each per task")
    peft_config = MultitaskPromptTuningConfig(
        num_tasks=len(tasks), num_ranks=cols.shape[2], **_common(shared, base_model, revision, config_facts)
    )

    def build(place: Path) -> None:
        tensors = {"prompt_embeddings": shared, **factors}
        _write_adapter(place, peft_config, tensors, base_model)
        what = prompt_in_words((shared.shape[0], shared.shape[1]), len(tasks), task_type=_task_type(config_facts))
        given: dict[str, Any] = {"base_model": base_model, "revision": revision, "config_facts": config_facts}
        _write_card(place, card, what, **given, tasks=tasks, record=record)

    return _publish(Path(folder), build, shared.nbytes)


def export_particles(
    particles: Float[Tensor, "M P D"],
    folder: Path,
    *,
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    card: CardFacts,
    record: TaskRecord | None = None,
) -> Path:
    """Write every particle (`particles/00`, `particles/01`, ...) and their mean (`mean`) as PEFT PROMPT_TUNING folders.

    With `record`, the language of the source tasks, the folder as a whole is the ensemble of the particles.
    """
    prompts = {f"particles/{m:02d}": particle for m, particle in enumerate(particles)}
    more = {"mean": particles.mean(0)}
    given: dict[str, Any] = {"base_model": base_model, "revision": revision, "config_facts": config_facts}
    return _export_several(prompts, more, folder, **given, card=card, record=record)


def export_ensemble(
    prompts: Float[Tensor, "m P D"],
    folder: Path,
    *,
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    card: CardFacts,
    record: TaskRecord,
) -> Path:
    """Write the prompts whose predictions an ensemble averages as PEFT PROMPT_TUNING folders (`00`, `01`, ...)."""
    several = {f"{number:02d}": prompt for number, prompt in enumerate(prompts)}
    given: dict[str, Any] = {"base_model": base_model, "revision": revision, "config_facts": config_facts}
    return _export_several(several, {}, folder, **given, card=card, record=record)


def _export_several(
    prompts: Mapping[str, Tensor],
    more: Mapping[str, Tensor],
    folder: Path,
    *,
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    card: CardFacts,
    record: TaskRecord | None,
) -> Path:
    """Write prompts by their places below `folder`; the ensemble of the folder is `prompts`, without those of `more`."""
    checked = {name: _checked(prompt, config_facts, f"prompt {name}") for name, prompt in {**more, **prompts}.items()}

    def build(place: Path) -> None:
        given: dict[str, Any] = {"base_model": base_model, "revision": revision, "config_facts": config_facts}
        for name, prompt in checked.items():
            _write_prompt(prompt, place / name, **given, card=card, record=record)
        if record is not None:
            (place / "README.md").write_text(f"---\nbase_model: {base_model}\nlibrary_name: peft\n---\n", encoding="utf-8")
            shape = next(iter(checked.values())).shape
            what = f"{len(prompts)} soft prompts of {shape[0]} positions x {shape[1]} numbers, whose predictions are averaged, for"
            ensemble = record.with_prompts(list(prompts), "ensemble")
            _write_card(place, card, what, **given, record=ensemble)

    return _publish(Path(folder), build, sum(prompt.nbytes for prompt in checked.values()))


def export_low_rank(
    pairs: Mapping[str, tuple[Float[Tensor, "R inputs"], Float[Tensor, "outputs R"]]],
    alpha: float,
    folder: Path,
    *,
    base_model: str,
    revision: str | None,
    card: CardFacts,
    config_facts: ConfigFacts = MappingProxyType({}),
    record: TaskRecord | None = None,
) -> Path:
    """Write the changes B A alpha / R of linear layers, given by the layer's name, as a PEFT LORA folder and return the folder.

    The logits under PEFT are bit-identical to ours. Raises NonFinite, StorageError.
    """
    from peft import LoraConfig

    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _plain(a, name)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _plain(b, name)
    rank = len(next(iter(pairs.values()))[0])
    peft_config = LoraConfig(
        task_type=_task_type(config_facts),
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT's type is int, but it only divides it
        lora_dropout=0.0,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in pairs}),
        base_model_name_or_path=base_model,
        revision=revision,
        inference_mode=True,
    )

    def build(place: Path) -> None:
        place.mkdir()
        peft_config.save_pretrained(str(place))
        _drop_new_keys(place / CONFIG, peft_config)
        save_file(tensors, place / WEIGHTS)
        (place / "README.md").write_text(f"---\nbase_model: {base_model}\nlibrary_name: peft\n---\n", encoding="utf-8")
        what = f"a change of rank {rank} of {len(pairs)} linear layers of"
        given: dict[str, Any] = {"base_model": base_model, "revision": revision, "config_facts": config_facts}
        _write_card(place, card, what, **given, record=record, tag="low-rank-adaptation")

    return _publish(Path(folder), build, sum(tensor.nbytes for tensor in tensors.values()))


class _ConfigOnly(nn.Module):
    """A replacement for the backbone while PEFT writes a prompt: PEFT reads its config and no weight, so none is copied."""

    device = torch.device("cpu")
    is_gradient_checkpointing = False

    def __init__(self, base_model: str) -> None:
        super().__init__()
        self.name_or_path = base_model
        self.config = {"_name_or_path": base_model, "model_type": T5}

    def prepare_inputs_for_generation(self, *_args: Any, **_kwargs: Any) -> Any:
        """Exist, because PEFT keeps a reference to it."""
        raise AssertionError("this replacement never generates")


def _task_type(config_facts: ConfigFacts) -> str:
    """Return what PEFT calls the kind of backbone."""
    return str(config_facts.get("task_type", SEQ_2_SEQ))


def _common(prompt: Tensor, base_model: str, revision: str | None, config_facts: ConfigFacts) -> dict[str, Any]:
    return {
        "task_type": _task_type(config_facts),
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        # PEFT's default of 2 would store twice the rows and, in the multi-task form, prompt the decoder as well.
        "num_transformer_submodules": 1,
        "num_layers": config_facts["num_layers"],
        "num_attention_heads": config_facts["num_heads"],
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
    }


def _write_prompt(
    prompt: Tensor,
    place: Path,
    *,
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    card: CardFacts,
    record: TaskRecord | None,
) -> None:
    from peft import PromptTuningConfig

    peft_config = PromptTuningConfig(**_common(prompt, base_model, revision, config_facts))
    _write_adapter(place, peft_config, {"prompt_embeddings": prompt}, base_model)
    what = prompt_in_words((prompt.shape[0], prompt.shape[1]), task_type=_task_type(config_facts))
    _write_card(place, card, what, base_model=base_model, revision=revision, config_facts=config_facts, record=record)


def _write_adapter(place: Path, peft_config: PromptLearningConfig, tensors: Mapping[str, Tensor], base_model: str) -> None:
    """Let PEFT write configuration, weights and card skeleton, then read the weights back."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):  # PEFT initialises the prompt at random before it is replaced here
        model = get_peft_model(_ConfigOnly(base_model), peft_config)
    encoder = model.prompt_encoder["default"]
    names = {"prompt_embeddings": "embedding.weight"}
    with torch.no_grad():
        for name, tensor in tensors.items():
            encoder.get_parameter(names.get(name, name)).copy_(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # False, not "auto": "auto" asks the hub whether the vocabulary was resized.
        model.save_pretrained(str(place), save_embedding_layers=False)
    _drop_new_keys(place / CONFIG, peft_config)
    stored = load_file(place / WEIGHTS)
    if stored.keys() != tensors.keys() or not all(torch.equal(stored[name], tensors[name]) for name in tensors):
        raise StorageError(f"{place / WEIGHTS}: reads back differently than written; check the disk and export again")


def _drop_new_keys(file: Path, peft_config: PeftConfig) -> None:
    """Take keys out of a written adapter_config.json that the oldest PEFT does not know and that have their default value."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    old = KEYS_OF_OLDEST_PEFT[facts["peft_type"]]
    defaults = vars(type(peft_config)())
    kept = {key: value for key, value in facts.items() if key in old or (key in defaults and value != defaults[key])}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_card(
    place: Path,
    facts: CardFacts,
    what: str,
    *,
    base_model: str,
    revision: str | None,
    config_facts: ConfigFacts,
    tasks: Sequence[str] | None = None,
    record: TaskRecord | None = None,
    tag: str = "prompt-tuning",
) -> None:
    """Replace the text of PEFT's card skeleton, keeping its metadata where the hub would accept it; write `task.json`."""
    if record is not None:
        (place / layout.TASK_RECORD).write_bytes(encode_json(record.as_json(), indent=1))
    card = ModelCard.load(place / "README.md")
    task_type = _task_type(config_facts)
    card.data.pipeline_tag = PIPELINES[task_type]
    card.data.tags = [tag, config_facts.get("model_type", T5), facts.method]
    if is_hub_id(base_model) and not Path(base_model).exists():
        card.data.tags.append(f"base_model:adapter:{base_model}")
    else:
        del card.data.base_model
    measured = [result for result in facts.results if result["value"] is not None]
    if measured:
        card.data.model_name = facts.title
        card.data.eval_results = [_eval_result(result, PIPELINES[task_type]) for result in measured]
    given: dict[str, Any] = {"base_model": base_model, "revision": revision, "tasks": tasks}
    card.text = card_text(facts, what=what, **given, task_type=task_type, record=record)
    card.save(place / "README.md")


def _eval_result(result: Mapping[str, Any], pipeline: str) -> EvalResult:
    return EvalResult(
        task_type=pipeline,
        dataset_type=result["task"],
        dataset_name=result["task"],
        dataset_split=result["split"],
        metric_type=result["metric"],
        metric_name=f"{result['metric']} (n={result['n']}, seed {result['seed']})",
        metric_value=result["value"],
    )


def _checked(prompt: Tensor, config_facts: ConfigFacts, what: str) -> Tensor:
    if prompt.shape[1] != config_facts["d_model"]:
        raise ConfigError(
            f"export: the {what} is {prompt.shape[1]} wide, the backbone {config_facts['d_model']}; "
            "export it for the backbone it was trained with"
        )
    return _plain(prompt, what)


def _plain(tensor: Tensor, what: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NonFinite(f"export: the {what} holds NaN or infinity; export an earlier checkpoint")
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _publish(folder: Path, build: Callable[[Path], None], num_bytes: int) -> Path:
    """Build the export beside its place and move it there by one rename.

    A folder cannot replace a folder, so an earlier export is first moved aside: between the two renames a reader finds
    nothing, never a mixture. Anything else in the place is the user's and stops the export.
    """
    if folder.exists() and not _is_replaceable(folder):
        raise StorageError(f"{folder}: exists and is not an export; remove it or choose another folder")

    def publish() -> Path:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, leftovers_of(folder), OS_FILES)
        place, aside = temporary_name(folder), temporary_name(folder)
        try:
            build(place)
            for path in (place, *place.rglob("*")):
                OS_FILES.fsync(path)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        if folder.exists():
            OS_FILES.rename(folder, aside)
        OS_FILES.rename(place, folder)
        OS_FILES.fsync(folder.parent)
        if aside.exists():
            remove_tree(aside, OS_FILES)
        return folder

    return write_or_explain(folder, num_bytes, publish)


def _is_replaceable(folder: Path) -> bool:
    markers = (CONFIG, f"mean/{CONFIG}", f"00/{CONFIG}")
    return folder.is_dir() and (any((folder / m).is_file() for m in markers) or not os.listdir(folder))
