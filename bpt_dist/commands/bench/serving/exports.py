"""The files of a server that is measured: random weights, a tokenizer whose words are their ids, and a prompt for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from bpt_dist.artifacts.peft_export import CardFacts, export_prompt
from bpt_dist.artifacts.task_record import BackboneEntry, FormEntry, Slot, TaskEntry, TaskRecord
from bpt_dist.backbones.base import Backbone
from bpt_dist.commands.bench.predict import Mixture
from bpt_dist.commands.bench.sides import Sides
from bpt_dist.commands.bench.workload import END, SPECIAL

COLUMN = "text"
LONGEST = 512  # tokens of a text; none is cut


def write_backbone(sides: Sides, folder: Path) -> None:
    """Write the weights and a tokenizer that makes `w12 w7` the ids 12, 7 and, where texts have one, the end token."""
    logging.disable_progress_bar()
    sides.model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "</s>": END, "<unk>": SPECIAL - 1}
    vocabulary |= {f"w{number}": number for number in range(SPECIAL, sides.vocabulary)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if sides.ends_texts:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)


def write_exports(backbone: Backbone, mixed: Mixture, folder: Path, number: int) -> None:
    """Write an export of each task of a mixture of `number`; the backbone was loaded from its files."""
    tokenizer, form, place = backbone.tokenizer, backbone.text_form, backbone.path
    entry = BackboneEntry.of(form, place, None, backbone.identity, "fp32")
    for k, prompt in enumerate(mixed.prompts):
        task = _task(name_of(number, k), [words_of(word) for word in mixed.words[k].tolist()])
        record = TaskRecord.of(entry, backbone.tokenizer_hash, FormEntry.of(form, tokenizer), [task])
        card = CardFacts(
            title=task.name, method="random", backbone_hash=entry.sha256, tokenizer_hash=record.tokenizer_sha256, protocol="fixed"
        )
        export_prompt(
            prompt, folder / task.name, base_model=place, revision=None, config_facts=backbone.facts, card=card, record=record
        )


def rows_of(mixed: Mixture, number: int) -> list[dict[str, Any]]:
    """Return the rows as a client sends them; the `id` of a row is its place."""
    ids = mixed.texts.source_ids.tolist()
    return [{"task": name_of(number, k), "id": row, COLUMN: words_of(ids[row])} for row, k in enumerate(mixed.tasks)]


def name_of(number: int, k: int) -> str:
    """Return the name of a task of the mixture of `number`, whose prompts are its own."""
    return f"task{k}_of_{number}"


def words_of(ids: Sequence[int]) -> str:
    """Return the text of some ids, whose end token and padding the tokenizer or the model adds again."""
    return " ".join(f"w{number}" for number in ids if number >= SPECIAL)


def _task(name: str, words: Sequence[str]) -> TaskEntry:
    given: dict[str, Any] = {"max_source_length": LONGEST, "max_new_tokens": 8, "empty_text": "refuse"}
    return TaskEntry(
        name=name, kind="classification", protocol="fixed", template=(Slot(column=COLUMN, written="plain"),), fields=(COLUMN,),
        label_words=tuple(words), decode="rank", **given,
    )  # fmt: skip
