"""Make the tiny T5 of the miniature world: `python -m bpt_dist.tasks.mini.pretrain --out DIR --seed 0`.

Every skill (`skills.py`) from the first step: first with its switch words alone, later among idle words and switched off.
One process, one thread, fp32; the same machine and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from bpt_dist.tasks.mini import lexicon, skills, tokenizer

log = logging.getLogger(__name__)

# Shares of the steps: switch words alone, then more and more idle words and skills switched off, then a falling rate.
BARE_UNTIL, CLUTTERED_FROM, DECAY_FROM = 0.3, 0.4, 0.6
NO_LOSS = -100
SAME_WORD_LOGIT, MISSING_LOGIT, NEIGHBOUR_LOGIT = 8.0, 5.0, 4.0
# Shares of the variance of an embedding: the word itself, the class it shares with its synonyms, its part of speech.
OWN, CLASS, KIND = 0.5, 0.35, 0.15
# Two coordinates of the embeddings are marks: every piece has the first, the end token alone the second.
ALL_MARK, END_MARK, END_SIZE = 0, 1, 4.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the grammar."""

    seed: int = 0
    steps: int = 9_000
    batch_size: int = 48
    lr: float = 1e-3
    warmup: int = 200
    clip: float = 1.0
    d_model: int = 96
    d_ff: int = 256
    num_layers: int = 3
    num_decoder_layers: int = 2
    num_heads: int = 4


def new_model(recipe: Recipe, vocab_size: int) -> T5ForConditionalGeneration:
    """Return a T5 (v1.0 shape, tied embeddings, no dropout) with fresh weights drawn from the seed."""
    torch.manual_seed(recipe.seed)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": recipe.d_model,
        "d_kv": recipe.d_model // recipe.num_heads,
        "d_ff": recipe.d_ff,
        "num_layers": recipe.num_layers,
        "num_decoder_layers": recipe.num_decoder_layers,
        "num_heads": recipe.num_heads,
        "relative_attention_max_distance": 64,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    model = T5ForConditionalGeneration(T5Config(**shape))
    initialise_embeddings_(model)
    initialise_encoder_heads_(model)
    initialise_copying_(model)
    return model


def word_groups() -> list[tuple[str, dict[str, tuple[str, ...]]]]:
    """Return (part of speech, {class: words}) of every word that has a class."""
    return [
        ("noun", {name: (name, *words) for name, words in lexicon.NOUNS.items()}),
        ("ambiguous", {word: (word,) for word in lexicon.AMBIGUOUS}),
        ("verb", lexicon.VERBS),
        ("predicate", lexicon.PREDICATES),
        ("opinion", lexicon.OPINIONS),
        ("label", {str(index): words for index, words in enumerate(lexicon.LABEL_WORDS)}),
        ("quantifier", {"one": lexicon.SINGULAR, "many": lexicon.PLURAL}),
        ("colour", {"colour": lexicon.COLOURS}),
        ("place", {"place": lexicon.PLACES}),
        ("degree", {"degree": lexicon.DEGREES}),
        ("negation", {"negation": (*lexicon.NEGATIONS, "no")}),
        ("field", {field: (field,) for field in lexicon.FIELDS}),
        ("switch", {word: (word,) for words in lexicon.SWITCHES.values() for word in words}),
    ]


@torch.no_grad()
def initialise_embeddings_(model: T5ForConditionalGeneration) -> None:
    """Initialise each embedding as a sum: a vector of its own, one of its class, one of its part of speech; then set the marks.

    The sum has variance 1. A real T5 knows which words are alike from reading; a model this small would learn it from single bits.
    """
    pieces = tokenizer.build()
    table = model.shared.weight
    width = table.shape[1]
    for _, classes_of_kind in word_groups():
        kind = torch.randn(width)
        for words in classes_of_kind.values():
            ids = torch.tensor(pieces.convert_tokens_to_ids([f"▁{word}" for word in words]))
            table[ids] = OWN**0.5 * torch.randn(len(ids), width) + CLASS**0.5 * torch.randn(width) + KIND**0.5 * kind
    table[:, ALL_MARK] = 1.0
    table[:, END_MARK] = 0.0
    table[pieces.eos_token_id, END_MARK] = END_SIZE


@torch.no_grad()
def initialise_encoder_heads_(model: T5ForConditionalGeneration) -> None:
    """Initialise the first half of the encoder's heads to look for the same word elsewhere, the others for a neighbour.

    In a matching head keys are queries: a word scores SAME_WORD_LOGIT against itself; the end token scores MISSING_LOGIT against
    every word, so a word without a match attends to it. A model this small otherwise spends most of its training on
    discovering that two words can be equal. The other heads prefer the word before, or the word after.
    """
    config = model.config
    matching = config.num_heads // 2
    blocks: Any = model.encoder.block
    for block in blocks:
        attention = block.layer[0].SelfAttention
        scale = (SAME_WORD_LOGIT / (config.d_kv * config.d_model)) ** 0.5
        for head in range(matching):
            first, rest = head * config.d_kv, slice(head * config.d_kv + 1, (head + 1) * config.d_kv)
            attention.q.weight[rest].normal_(0.0, scale)
            attention.q.weight[rest, : END_MARK + 1] = 0.0
            attention.k.weight[rest] = attention.q.weight[rest]
            attention.q.weight[first] = attention.k.weight[first] = 0.0
            attention.q.weight[first, ALL_MARK] = attention.k.weight[first, END_MARK] = (MISSING_LOGIT / END_SIZE) ** 0.5
    bias = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight
    own_position, before, after = 0, 1, config.relative_attention_num_buckets // 2 + 1
    bias.zero_()
    bias[own_position, :matching] = -2 * SAME_WORD_LOGIT
    for head in range(matching, config.num_heads):
        bias[before if head % 2 else after, head] = NEIGHBOUR_LOGIT


@torch.no_grad()
def initialise_copying_(model: T5ForConditionalGeneration) -> None:
    """Initialise the decoder to repeat what it attends to: values and outputs are inverse rotations."""
    blocks: Any = model.decoder.block
    for block in blocks:
        attention = block.layer[1].EncDecAttention
        torch.nn.init.orthogonal_(attention.v.weight)
        attention.o.weight.copy_(attention.v.weight.T)


def padded(rows: list[list[int]], fill: int) -> Int[Tensor, "N T"]:
    """Return the rows as one tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def batches(recipe: Recipe, pieces: T5Tokenizer) -> Iterator[tuple[Int[Tensor, "N T"], Int[Tensor, "N U"]]]:
    """Yield (input ids, target ids) without end: a pure function of the recipe."""
    rng = random.Random(f"pretrain {recipe.seed}")  # noqa: S311  (reproducible, not secret)
    for step in itertools.count():
        clutter = min(1.0, max(0.0, (step / recipe.steps - BARE_UNTIL) / (CLUTTERED_FROM - BARE_UNTIL)))
        sources, targets = zip(*(skills.drawn(rng, clutter) for _ in range(recipe.batch_size)), strict=True)
        yield padded(pieces(list(sources)).input_ids, 0), padded(pieces(list(targets)).input_ids, NO_LOSS)


def classes(pieces: T5Tokenizer) -> Int[Tensor, " V"]:
    """Return a number for every piece: the class index of an answer word, a unique number for any other piece."""
    number = torch.arange(len(pieces)) + len(lexicon.LABEL_WORDS)
    for index, words in enumerate(lexicon.LABEL_WORDS):
        number[pieces.convert_tokens_to_ids([f"▁{word}" for word in words])] = index
    return number


@torch.no_grad()
def accuracy(
    model: T5ForConditionalGeneration, pieces: T5Tokenizer, num_examples: int, seed: str, clutter: float = 1.0
) -> dict[str, float]:
    """Return the share of examples that are switched on and answered correctly (teacher-forced argmax), by skill."""
    rng = random.Random(seed)  # noqa: S311  (reproducible, not secret)
    hits: dict[str, list[bool]] = defaultdict(list)
    for skill in skills.SKILLS:
        pairs = [skills.example(rng, skill, True, clutter) for _ in range(num_examples)]
        source = padded(pieces([text for text, _ in pairs]).input_ids, 0)
        target = padded(pieces([answer for _, answer in pairs]).input_ids, NO_LOSS)
        guess = model(input_ids=source, attention_mask=source.ne(0), labels=target).logits.argmax(-1)
        right = classes(pieces)[guess] == classes(pieces)[target.clamp(min=0)]
        hits[skill.title] += (right | target.eq(NO_LOSS)).all(1).tolist()
    return {name: round(sum(answers) / len(answers), 3) for name, answers in hits.items()}


def new_optimizer(recipe: Recipe, model: T5ForConditionalGeneration) -> torch.optim.AdamW:
    """Return AdamW with half the rate for the embeddings: at the full rate they become larger than what the layers add."""
    embeddings = list(model.shared.parameters())
    rest = [weight for weight in model.parameters() if weight is not embeddings[0]]
    groups = [{"params": embeddings, "lr": recipe.lr / 2}, {"params": rest, "lr": recipe.lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Return the warm-up, then 1, then linear decay to zero from `DECAY_FROM` on."""
    return min(1.0, (step + 1) / recipe.warmup, max(0.0, (1 - step / recipe.steps) / (1 - DECAY_FROM)))


def train(
    recipe: Recipe, log_file: Path, log_every: int = 500, num_examples: int = 64
) -> tuple[T5ForConditionalGeneration, T5Tokenizer]:
    """Train for `recipe.steps` and write one JSON line every `log_every` steps."""
    pieces = tokenizer.build()
    model = new_model(recipe, len(pieces))
    optimizer = new_optimizer(recipe, model)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step))
    stream, losses, began = batches(recipe, pieces), [], time.perf_counter()
    for step in range(1, recipe.steps + 1):
        source, target = next(stream)
        loss = model(input_ids=source, attention_mask=source.ne(0), labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % log_every == 0 or step == recipe.steps:
            record: dict[str, Any] = {"step": step, "loss": round(sum(losses) / len(losses), 4)}
            record["seconds"] = round(time.perf_counter() - began)
            record["bare"] = accuracy(model, pieces, num_examples, f"log {step}", clutter=0.0)
            record["cluttered"] = accuracy(model, pieces, num_examples, f"log {step}")
            with log_file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            log.info("%s", record)
            losses = []
    return model, pieces


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, and write model, tokenizer and log."""
    parser = argparse.ArgumentParser(prog="python -m bpt_dist.tasks.mini.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--log", type=Path, help="JSON lines of the run (default: OUT/../pretrain_log.jsonl)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--measure", action="store_true", help="print the accuracy of the model in OUT by skill and train nothing")
    parser.add_argument("--examples", type=int, default=64, help="examples of each skill in a measurement")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if options.measure:
        model = T5ForConditionalGeneration.from_pretrained(options.out).eval()
        for name, share in accuracy(model, tokenizer.build(), options.examples, "measure").items():
            log.info("%-18s %5.1f %%", name, 100 * share)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    log_file = options.log or options.out.parent / "pretrain_log.jsonl"
    log_file.unlink(missing_ok=True)
    model, pieces = train(Recipe(seed=options.seed, steps=options.steps), log_file, num_examples=options.examples)
    model.save_pretrained(options.out)
    pieces.save_pretrained(options.out)


if __name__ == "__main__":
    main()
