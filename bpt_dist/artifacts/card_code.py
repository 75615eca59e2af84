"""The program of a model card: PEFT and transformers alone, from a row to the answer that the run gave to it."""

from __future__ import annotations

import inspect

from bpt_dist.artifacts.task_record import Slot, TaskRecord
from bpt_dist.tasks import writings
from bpt_dist.tasks.spec import column

PLACE = "PATH OF THIS FOLDER"
HEAD = """\
import json
{imports}
import torch
from peft import PeftModel
from transformers import {classes}

FOLDER = "{place}"
record = json.load(open(f"{{FOLDER}}/task.json", encoding="utf-8"))
tasks = {{task["name"]: task for task in record["tasks"]}}
base = {auto_class}.from_pretrained({base}).to(torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained({base})
model = PeftModel.from_pretrained(base, f"{{FOLDER}}/{{record['prompts'][0]}}", adapter_name="0").eval()
for number, prompt in enumerate(record["prompts"][1:], 1):
    model.load_adapter(f"{{FOLDER}}/{{prompt}}", adapter_name=str(number))
names = [str(number) for number in range(len(record["prompts"]))]
"""
TEXT = """\
def ids_of(text, limit):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids[: limit - 1] + [tokenizer.eos_token_id]])


def source_of(row, task):
    pieces = task["template"]
    text = " ".join(piece if isinstance(piece, str) else WRITINGS[piece["written"]](row, piece["column"]) for piece in pieces)
    ids = ids_of(text, task["max_source_length"])
    return {{"input_ids": ids, "attention_mask": torch.ones_like(ids){task_ids}}}
"""
# Both families score each label word in their own way, and what is made of the scores is the same.
_RANK = """\
@torch.no_grad()
def rank(row, task):
    source, distributions = source_of(row, task), []
    for name in names:
        model.set_adapter(name)
        scores = []
        for word in task["label_words"]:
{score}
        distributions.append(torch.stack(scores).softmax(0))
    probabilities = torch.stack(distributions).mean(0)
    return {{"prediction": task["label_words"][int(probabilities.argmax())], "probabilities": probabilities.tolist()}}
"""
RANK = _RANK.format(
    score="""\
            target = ids_of(word, 10**9)
            logits = model(**source, labels=target).logits.float()
            scores.append(logits.log_softmax(-1).gather(-1, target[..., None]).double().sum())"""
)
GENERATE = """\
@torch.no_grad()
def generate(row, task):
    config = base.config
    settings = GenerationConfig(
        num_beams=1,
        do_sample=False,
        max_new_tokens=task["max_new_tokens"],
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    written = model.generate(**source_of(row, task), generation_config=settings)[0]
    return {"prediction": tokenizer.decode(written, skip_special_tokens=True).strip()}
"""
GENERATE_TOGETHER = """\
@torch.no_grad()
def generate(row, task):
    # Each token is the likeliest under the mean of the distributions of all prompts.
    source, config = source_of(row, task), base.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    written = [config.decoder_start_token_id]
    while len(written) <= task["max_new_tokens"] and written[-1] not in ends:
        of_prompts = []
        for name in names:
            model.set_adapter(name)
            logits = model(**source, decoder_input_ids=torch.tensor([written])).logits[0, -1].float()
            of_prompts.append(logits.log_softmax(-1))
        written.append(int(torch.stack(of_prompts).logsumexp(0).argmax()))
    return {"prediction": tokenizer.decode(written, skip_special_tokens=True).strip()}
"""
# The same for decoder-only models, which read text and answer as one sequence.
TEXT_OF_DECODER = """\
form = record["text_form"]


def ids_of(text):
    return tokenizer(text, add_special_tokens=False).input_ids


def source_of(row, task):
    pieces = task["template"]
    text = " ".join(piece if isinstance(piece, str) else WRITINGS[piece["written"]](row, piece["column"]) for piece in pieces)
    ids = ([] if form["start"] is None else [form["start"]]) + ids_of(text)
    return ids[: task["max_source_length"]]


def logits_of(source, written, task):
    # One row for each token of the answer so far, and one for the next.
    ids = torch.tensor([source + written])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids){task_ids}).logits[0]
    return logits[-len(written) - 1 :].float().log_softmax(-1)
"""
RANK_OF_DECODER = _RANK.format(
    score="""\
            target = ids_of(form["before_answer"] + word) + [tokenizer.eos_token_id]
            logits = logits_of(source, target[:-1], task)
            scores.append(logits.gather(-1, torch.tensor(target)[:, None]).double().sum())"""
)
GENERATE_OF_DECODER = """\
@torch.no_grad()
def generate(row, task):
    # Each token is the likeliest, of several prompts under the mean of their distributions.
    source, ends, written = source_of(row, task), base.config.eos_token_id, []
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    while len(written) < task["max_new_tokens"] and not ends.intersection(written):
        of_prompts = []
        for name in names:
            model.set_adapter(name)
            of_prompts.append(logits_of(source, written, task)[-1])
        written.append(int(torch.stack(of_prompts).logsumexp(0).argmax()))
    return {"prediction": tokenizer.decode(written, skip_special_tokens=True).strip()}
"""
END = """\
def answer(row, name={name!r}):
    task = tasks[name]
    return {choice}
"""


def code_of(record: TaskRecord, auto_class: str) -> str:
    """Return the program; `answer(row)` is its result, and PLACE the one thing to fill in.

    `auto_class` is transformers' name of the class that loads the backbone.
    """
    of_decoder = record.backbone.kind == "decoder-only"
    at = "" if record.backbone.revision is None else f", revision={record.backbone.revision!r}"
    used = [
        name for name in writings.WRITINGS
        if any(isinstance(piece, Slot) and piece.written == name for task in record.tasks for piece in task.template)
    ]  # fmt: skip
    head = HEAD.format(
        imports=writings.IMPORTS, place=PLACE, base=f"{record.backbone.path!r}{at}",
        dtype="bfloat16" if record.backbone.dtype == "bf16" else "float32", auto_class=auto_class,
        classes=", ".join([auto_class, "AutoTokenizer", *([] if of_decoder else ["GenerationConfig"])]),
    )  # fmt: skip
    functions = [inspect.getsource(function) for function in (column, *(writings.WRITINGS[name] for name in used))]
    functions[-1] += f"\n\nWRITINGS = {{{', '.join(f'{name!r}: {name}' for name in used)}}}\n"
    several = any(task.task_id is not None for task in record.tasks)
    template, given = (TEXT_OF_DECODER, ", task_ids=") if of_decoder else (TEXT, ', "task_ids": ')
    functions.append(template.format(task_ids=f'{given}torch.tensor([task["task_id"]])' if several else ""))
    ways = sorted({task.decode for task in record.tasks}, reverse=True)
    programs = {"rank": RANK, "generate": GENERATE_TOGETHER if record.predict == "ensemble" else GENERATE}
    if of_decoder:
        programs = {"rank": RANK_OF_DECODER, "generate": GENERATE_OF_DECODER}
    functions += [programs[way] for way in ways]
    choice = f"{ways[0]}(row, task)" if len(ways) == 1 else "(rank if task['decode'] == 'rank' else generate)(row, task)"
    functions.append(END.format(name=record.tasks[0].name, choice=choice))
    return "\n\n".join([head.replace("\n\n\n", "\n\n"), *functions]).rstrip() + "\n"
