"""`bench --backbone decoder`: a source step and the ranking of label words on a decoder-only model against PEFT, and a LoRA step.

PEFT computes prompt and text again for every particle and text, padded to the longest, with logits at every position. Ours reads a
prompt once a pass. Low-rank changes of the layers need no prompt: there transformers' modules are what is compared with, padded as
PEFT would pad. FLOPs, counted from the shapes, limit what the ratio of times can be.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from bpt_dist.backbones.attention import default_attention
from bpt_dist.backbones.base import DTYPES
from bpt_dist.backbones.decoder.config import model_class
from bpt_dist.backbones.decoder.model import DecoderBackbone
from bpt_dist.backbones.decoder.shapes import published
from bpt_dist.backbones.families import DECODERS
from bpt_dist.backbones.prompts import prepend
from bpt_dist.commands.bench.baselines import import_peft
from bpt_dist.commands.bench.evaluation import LABEL_TOKENS, NUM_TOKENS, TIES, label_words, same_predictions
from bpt_dist.commands.bench.inserted import RANK, Gradients, distance, inserted_gradients, low_rank
from bpt_dist.commands.bench.source_run import Options, Tell
from bpt_dist.commands.bench.timing import Clock, Timing, alternate, speedup
from bpt_dist.commands.bench.workload import SOURCE_TASKS, TARGET_TASKS, NoTokenizer, Work, work_of
from bpt_dist.data.batches import IGNORED, Batch
from bpt_dist.errors import ConfigError
from bpt_dist.objective import sequence_log_likelihood

SMOLLM2 = "smollm2-135m"
HEADER = ("work", "variant", "dtype", "s", "x first", "FLOP limit", "tokens computed", "padding")
END = 2
# What two ways to compute the same may differ by, against the largest number: log-likelihoods and gradients of the prompts.
CLOSE: Mapping[str, float] = {"fp32": 1e-4, "bf16": 0.1}


def shape_of(name: str, *, quick: bool) -> Any:
    """Return the configuration to time: SmolLM2-135M (`quick`: six of its layers), or that of a folder with a config.json.

    Raises ConfigError for any other name.
    """
    if name == SMOLLM2:
        config: Any = published(SMOLLM2)
        config.num_hidden_layers = 6 if quick else config.num_hidden_layers
    elif not (Path(name) / "config.json").is_file():
        raise ConfigError(f"--shape {name}: is not known; choose {SMOLLM2}, or name a folder with a config.json")
    else:
        config = AutoConfig.from_pretrained(name)
    if config.model_type not in DECODERS:
        raise ConfigError(f"--shape {name}: is a {config.model_type!r} model; give one of {', '.join(DECODERS)}")
    config.eos_token_id = config.pad_token_id = END  # weights and tokens are random: END is one of them
    return config


class Models:
    """A model of random weights in one dtype, behind PEFT and behind our backbone, which share them."""

    def __init__(self, config: Any, dtype: str, device: torch.device, num_prompt: int) -> None:
        torch.manual_seed(0)
        model = model_class(config)(copy.deepcopy(config)).to(DTYPES[dtype]).to(device)
        self.backbone = DecoderBackbone(model, NoTokenizer(), start=None, name="random weights", path="", identity="")
        self.backbone.device = device
        peft = import_peft()
        settings = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=num_prompt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft: Any = peft.get_peft_model(model, settings).to(device).eval()
        self.backbone.use_packed_pass(default_attention(device, DTYPES[dtype]))

    def load(self, particle: Tensor) -> Tensor:
        """Make `particle` [P, D] the prompt of PEFT's model, and return the parameter."""
        prompt: Tensor = self.peft.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            prompt.copy_(particle)
        prompt.grad = None
        return prompt

    def peft_gradients(self, work: Work) -> Gradients:
        """Return log-likelihoods [M, N] and gradients [M, P, D] by PEFT in a loop over particles."""
        ids, mask, labels = joined(work.texts)
        found, gradients = [], []
        for particle in work.prompts:
            prompt = self.load(particle)
            logits = self.peft(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, len(prompt) :]
            log_likelihood = sequence_log_likelihood(logits[:, :-1], labels[:, 1:], "token_mean")
            log_likelihood.sum().backward()
            assert prompt.grad is not None
            found.append(log_likelihood.detach())
            gradients.append(prompt.grad)
        return torch.stack(found), torch.stack(gradients)

    def gradients(self, work: Work, parts: Sequence[Sequence[int]]) -> Gradients:
        """Return the same by our backbone, which reads the texts of each part in one pass."""
        prompts = work.prompts.clone().requires_grad_()
        found = torch.zeros(len(prompts), len(work.texts), device=prompts.device)
        for part in parts:
            forward = self.backbone.log_likelihood(work.texts.select(part), lambda embeds: prepend(prompts, embeds), "token_mean")
            forward.log_likelihood.sum().backward()
            found[:, list(part)] = forward.log_likelihood.detach()
        assert prompts.grad is not None
        return found, prompts.grad

    def stock_gradients(self, work: Work) -> Gradients:
        """Return the same text by text through transformers' modules, each under all particles: no padding, nothing shared."""
        packed, self.backbone.packed = self.backbone.packed, None
        try:
            return self.gradients(work, [[text] for text in range(len(work.texts))])
        finally:
            self.backbone.packed = packed

    @torch.no_grad()
    def generate(self, work: Work, num_tokens: int) -> Tensor:
        """Return the ids that PEFT generates, padded on the left as it asks for."""
        self.load(work.prompts[0])
        lengths = work.texts.source_mask.sum(1).tolist()
        longest = max(lengths)
        ids = torch.stack([row.roll(longest - length) for row, length in zip(work.texts.source_ids, lengths, strict=True)])
        mask = torch.stack([row.roll(longest - length) for row, length in zip(work.texts.source_mask, lengths, strict=True)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT counts them itself
            found: Tensor = self.peft.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, num_beams=1, do_sample=False, pad_token_id=END
            )
        return found

    def inserted_gradients(self, work: Work, trained: list[Tensor], parts: Sequence[Sequence[int]], *, stock: bool) -> Gradients:
        """Return log-likelihoods [1, N] of texts without a prompt, and the gradients of what is inserted, one behind the other."""
        packed, self.backbone.packed = self.backbone.packed, None if stock else self.backbone.packed
        try:
            return inserted_gradients(self.backbone, work.texts, trained, parts)
        finally:
            self.backbone.packed = packed

    def rank(self, work: Work, words: Tensor, *, stock: bool = False) -> Tensor:
        """Return the log-likelihood of every label word for every text."""
        packed, self.backbone.packed = self.backbone.packed, None if stock else self.backbone.packed
        try:
            return self.backbone.rank(work.texts, words, lambda embeds: prepend(work.prompts, embeds))[0]
        finally:
            self.backbone.packed = packed


def joined(texts: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return sources with their targets behind them, padded on the right: ids, mask, and labels of the targets."""
    rows = []
    for n in range(len(texts)):
        source, target = texts.source_ids[n][texts.source_mask[n].bool()], texts.target_ids[n][texts.target_ids[n] != IGNORED]
        rows.append((torch.cat([source, target]), torch.cat([torch.full_like(source, IGNORED), target])))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(ids) for ids, _ in rows])
    return pad([ids for ids, _ in rows], padding_value=END), mask, pad([labels for _, labels in rows], padding_value=IGNORED)


def flops_of(config: Any, num_tokens: int, num_heads_rows: int, pairs: int) -> int:
    """Return the FLOPs of a step: layers over tokens, head over rows, attention over pairs; back to the inputs as much again.

    Products of two activations go back to both.
    """
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    layer = width * size * (2 * heads + 2 * config.num_key_value_heads) + 3 * width * inner
    linear = 2 * 2 * num_tokens * config.num_hidden_layers * layer + 2 * 2 * num_heads_rows * width * config.vocab_size
    return int(linear + 3 * 4 * pairs * config.num_hidden_layers * heads * size)


def step_flops(config: Any, work: Work) -> tuple[int, int]:
    """Return the FLOPs of the step by PEFT, padded, and by ours."""
    particles, prompt = work.prompts.shape[:2]
    longest = prompt + max(source + target for source, target in work.lengths)
    padded = particles * len(work.texts) * longest
    own = [source + target - 1 for source, target in work.lengths]
    pairs = prompt**2 + sum(length * (prompt + length) for length in own)
    targets = sum(target for _, target in work.lengths)
    ours = flops_of(config, particles * (prompt + sum(own)), particles * targets, particles * pairs)
    return flops_of(config, padded, padded, padded * longest), ours


def run_decoder(
    config: Any, particles: int, prompts: Sequence[int], dtypes: Sequence[str], clock: Clock, options: Options, tell: Tell
) -> dict[str, Any]:
    """Return times, ratios and differences for prompts of each length: the source step, and the ranking of label words."""
    clock.use_threads()
    report: dict[str, Any] = {"rows": [], "correct": {}, "notes": []}
    for num_prompt in prompts:
        for dtype in dtypes:
            models = Models(config, dtype, clock.device, num_prompt)
            make = partial(work_of, config.vocab_size, config.hidden_size, num_prompt=num_prompt, seed=options.seed)
            step = make(particles, list(SOURCE_TASKS.values())).to(clock.device)
            _source_step(models, step, dtype, clock, options, report, tell)
            _ranking(models, make(1, list(TARGET_TASKS["boolq"])).to(clock.device), dtype, clock, options, report, tell)
            if num_prompt == prompts[0]:  # there is no prompt in it
                _low_rank_step(models, make(1, list(SOURCE_TASKS.values())).to(clock.device), dtype, clock, options, report, tell)
    return report


def _source_step(
    models: Models, work: Work, dtype: str, clock: Clock, options: Options, report: dict[str, Any], tell: Tell
) -> None:
    """Compare one step in rounds; the results of the last round are checked. A step takes so long that none is for warming up."""
    particles, num_prompt = work.prompts.shape[:2]
    name, everything = f"source step, P = {num_prompt}", [list(range(len(work.texts)))]
    runs: dict[str, Callable[[], Gradients]] = {
        "PEFT loop": partial(models.peft_gradients, work),
        "text by text, stock": partial(models.stock_gradients, work),
        "ours, prompt read once": partial(models.gradients, work, everything),
    }
    tell(f"{name}, {dtype}")
    times = _compared(runs, "text by text, stock", f"{name}, {{}}, {dtype}", dtype, clock, options, report, tell)
    of_peft, of_ours = step_flops(models.backbone.model.config, work)
    own = sum(source + target for source, target in work.lengths)
    longest = max(source + target for source, target in work.lengths)
    tokens = {
        "PEFT loop": particles * len(work.texts) * (num_prompt + longest),
        "text by text, stock": particles * (len(work.texts) * num_prompt + own - len(work.texts)),
        "ours, prompt read once": particles * (num_prompt + own - len(work.texts)),
    }
    for title in runs:
        is_peft = title == "PEFT loop"
        padding = 1 - (len(work.texts) * num_prompt + own) / (len(work.texts) * (num_prompt + longest)) if is_peft else 0.0
        report["rows"].append({
            "work": name, "variant": title, "dtype": dtype, "seconds": statistics.median(time.seconds for time in times[title]),
            "ratio": speedup(times["PEFT loop"], times[title]).to_json(), "tokens": tokens[title], "padding": round(padding, 4),
            "flop_limit": round(of_peft / of_ours, 3) if title.startswith("ours") else None,
        })  # fmt: skip


def _low_rank_step(
    models: Models, work: Work, dtype: str, clock: Clock, options: Options, report: dict[str, Any], tell: Tell
) -> None:
    """Compare one step of low-rank changes of queries and values, which reads texts without a prompt."""
    trained, number = low_rank(models.backbone), len(work.texts)
    name, everything, one_by_one = f"LoRA step, rank {RANK}", [list(range(number))], [[text] for text in range(number)]
    step = partial(models.inserted_gradients, work, trained)
    runs: dict[str, Callable[[], Gradients]] = {
        "one padded batch, stock": partial(step, everything, stock=True),
        "text by text, stock": partial(step, one_by_one, stock=True),
        "ours, packed": partial(step, everything, stock=False),
    }
    tell(f"{name}, {dtype}")
    try:
        times = _compared(runs, "text by text, stock", f"{name}, {{}}, {dtype}", dtype, clock, options, report, tell)
    finally:
        models.backbone.detach()
    own = [source + target - 1 for source, target in work.lengths]
    longest, most = (max(lengths) for lengths in zip(*work.lengths, strict=True))
    padded, config = longest + most - 1, models.backbone.model.config
    stock = flops_of(config, number * padded, number * most, number * padded**2)
    ours = flops_of(config, sum(own), sum(target for _, target in work.lengths), sum(length**2 for length in own))
    for title in runs:
        is_padded = title.startswith("one padded")
        report["rows"].append({
            "work": name, "variant": title, "dtype": dtype, "seconds": statistics.median(time.seconds for time in times[title]),
            "ratio": speedup(times["one padded batch, stock"], times[title]).to_json(),
            "tokens": number * padded if is_padded else sum(own),
            "padding": round(1 - sum(own) / (number * padded), 4) if is_padded else 0.0,
            "flop_limit": round(stock / ours, 3) if title.startswith("ours") else None,
        })  # fmt: skip


def _compared(
    runs: Mapping[str, Callable[[], Gradients]], reference: str, name: str, dtype: str, clock: Clock, options: Options,
    report: dict[str, Any], tell: Tell,
) -> dict[str, list[Timing]]:  # fmt: skip
    """Return the times of variants by rounds; the results of the last round are compared with those of `reference`."""
    found: dict[str, Gradients] = {}

    def kept(title: str) -> Callable[[], None]:
        return lambda: found.update({title: runs[title]()})

    times = alternate(
        {title: kept(title) for title in runs}, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell
    )
    for title, values in found.items():
        far = distance(values, found[reference])
        report["correct"][name.format(title)] = {"difference": far, "right": far <= CLOSE[dtype]}
    return times


def _ranking(models: Models, work: Work, dtype: str, clock: Clock, options: Options, report: dict[str, Any], tell: Tell) -> None:
    """Compare the prediction of label words: generate ten tokens, or rank the words."""
    words = label_words(LABEL_TOKENS["boolq"], models.backbone.vocabulary_size, options.seed).to(clock.device)
    name = f"label words, P = {work.prompts.shape[1]}"
    ours, stock = models.rank(work, words), models.rank(work, words, stock=True)
    report["correct"][f"{name}, ours, {dtype}"] = {
        "difference": float((ours - stock).abs().max() / stock.abs().max()), "right": same_predictions(ours, stock, TIES[dtype])
    }  # fmt: skip
    runs: dict[str, Callable[[], Tensor]] = {
        f"PEFT generate, {NUM_TOKENS} tokens": partial(models.generate, work, NUM_TOKENS),
        "ours, ranked as a tree": partial(models.rank, work, words),
    }
    first = next(iter(runs))
    runs[first]()  # warm-up
    times = alternate(runs, clock, options.repeats, limit_seconds=options.limit_seconds, tell=tell)
    for title in runs:
        report["rows"].append({
            "work": name, "variant": title, "dtype": dtype, "seconds": statistics.median(time.seconds for time in times[title]),
            "ratio": speedup(times[first], times[title]).to_json(), "tokens": None, "padding": None, "flop_limit": None,
        })  # fmt: skip


def decoder_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    return [
        (row["work"], row["variant"], row["dtype"], f"{row['seconds']:.3g}",
         f"{row['ratio']['median']:.2f} [{row['ratio']['low']:.2f}..{row['ratio']['high']:.2f}]",
         "" if row["flop_limit"] is None else f"{row['flop_limit']:.2f}", "" if row["tokens"] is None else f"{row['tokens']:,}",
         "" if row["padding"] is None else f"{row['padding']:.0%}")
        for row in report["rows"]
    ]  # fmt: skip


def wrong_results(report: dict[str, Any]) -> list[str]:
    """Return the variants whose results are too far from those of transformers' modules."""
    return [name for name, check in report["correct"].items() if not check["right"]]
