"""The work that is timed, and its T5. Lengths are stated or real; tokens and weights are random: times do not depend on them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import T5ForConditionalGeneration

from bpt_dist.backbones.attention import default_attention
from bpt_dist.backbones.base import DTYPES
from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.backbones.t5.shapes import T5Shape, shape_of
from bpt_dist.data.batches import IGNORED, Batch
from bpt_dist.errors import ConfigError
from bpt_dist.svgd import KernelOptions, direction, kernel_matrices, squared_distances

SHAPES = ("t5-small", "t5-base", "t5-large")
SPECIAL, END = 3, 1  # ids below SPECIAL are padding, end of text and unknown
SPREAD = 0.1  # of the particles, against prompts of standard deviation 1

# Tokens of (source, target) of one text a task. They are near the means and, for the long two, the caps of the real tasks under the
# T5 tokenizer: 22, 41, 52, 61, 181 and (cut at 256) 256 source tokens; label words have 2 to 6 tokens.
SOURCE_TASKS: Mapping[str, tuple[int, int]] = {
    "sst2": (28, 3), "qqp": (40, 6), "mnli": (48, 5), "qnli": (62, 5), "squad": (190, 5), "record": (256, 4),
}  # fmt: skip
# Eight rows of one target task: the range of a batch of MRPC, and of BoolQ.
TARGET_TASKS: Mapping[str, Sequence[tuple[int, int]]] = {
    "mrpc": [(46, 6), (58, 3), (63, 6), (70, 6), (74, 3), (80, 6), (88, 6), (95, 3)],
    "boolq": [(107, 2), (112, 2), (118, 2), (124, 2), (131, 2), (138, 2), (144, 2), (150, 2)],
}
CAP = 256  # to which the code base of ATTEMPT and MPT pads every text


@dataclass(frozen=True)
class Work:
    """M prompts, each of them put before each of N texts; `texts` is padded to its longest."""

    prompts: Float[Tensor, "M P D"]
    texts: Batch

    @property
    def num_rows(self) -> int:
        """Return M·N."""
        return len(self.prompts) * len(self.texts)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Return the numbers of source and target tokens of every text."""
        return list(zip(self.texts.source_mask.sum(1).tolist(), (self.texts.target_ids != IGNORED).sum(1).tolist(), strict=True))

    @property
    def num_tokens(self) -> int:
        """Return the number of encoder tokens of the step without padding, prompts included."""
        return len(self.prompts) * sum(self.prompts.shape[1] + source for source, _ in self.lengths)

    @property
    def num_padded_tokens(self) -> int:
        """Return the number of encoder tokens of the step when every row is padded to the longest."""
        return self.num_rows * (self.prompts.shape[1] + self.texts.source_ids.shape[1])

    def to(self, device: torch.device) -> Work:
        """Return the work on another device."""
        texts = self.texts
        moved = {name: getattr(texts, name).to(device) for name in ("source_ids", "source_mask", "target_ids")}
        return Work(self.prompts.to(device), Batch(**{**vars(texts), **moved}))


def bench_shape(name: str, dtype: str = "fp32") -> T5Shape:
    """Return the shape to time: one of SHAPES, or that of a folder with a config.json.

    Raises ConfigError for any other name.
    """
    if name not in SHAPES and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"--shape {name}: is not known; choose {', '.join(SHAPES)}, or name a folder with a config.json")
    return shape_of(name, dtype=dtype)


def source_work(
    shape: T5Shape, num_particles: int, *, num_tasks: int = 6, num_prompt: int = 100, texts: int = 1, seed: int = 0
) -> Work:
    """Return one source step: M particles, `texts` texts of each of K tasks, of the lengths of SOURCE_TASKS in turn."""
    stated = list(SOURCE_TASKS.values())
    lengths = [stated[task % len(stated)] for task in range(num_tasks) for _ in range(texts)]
    return make_work(shape, num_particles, lengths, num_prompt, seed)


def make_work(shape: T5Shape, num_particles: int, lengths: Sequence[tuple[int, int]], num_prompt: int, seed: int = 0) -> Work:
    """Return prompts around one common prompt, and random texts of the given numbers of source and target tokens."""
    return work_of(shape.config.vocab_size, shape.config.d_model, num_particles, lengths, num_prompt=num_prompt, seed=seed)


def work_of(
    vocabulary: int, width: int, num_particles: int, lengths: Sequence[tuple[int, int]], *, num_prompt: int, seed: int
) -> Work:
    """Return such work for a model of which only the sizes count."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(lengths), max(length for length, _ in lengths), dtype=torch.long)
    mask = torch.zeros_like(source)
    target = torch.full((len(lengths), max(length for _, length in lengths)), IGNORED)
    for row, (num_source, num_target) in enumerate(lengths):
        source[row, :num_source] = _text(num_source, vocabulary, generator)
        mask[row, :num_source] = 1
        target[row, :num_target] = _text(num_target, vocabulary, generator)
    return _with_prompts(width, num_particles, num_prompt, _batch(source, mask, target), generator)


def real_work(shape: T5Shape, num_particles: int, *, num_prompt: int = 100, texts: int = 1, seed: int = 0) -> Work:
    """Return one source step with texts drawn from the real source tasks of the data pack, as training draws them.

    Raises ConfigError when the pack or its tokenizer is missing, DataError for a bad row.
    """
    from bpt_dist.config import DataConfig
    from bpt_dist.data.batches import Batches
    from bpt_dist.data.prepare import prepare

    root = data_pack()
    data = DataConfig(root=root, max_source_length=CAP, max_train_rows=1000)
    tasks = prepare(list(SOURCE_TASKS), data, _tokenizer(root), splits=["train"], seed=seed)
    drawn = Batches([task.train.tokens for task in tasks], texts, seed).at(0)
    return _with_prompts(shape.config.d_model, num_particles, num_prompt, drawn, torch.Generator().manual_seed(seed))


def data_pack() -> Path:
    """Return the folder of real tasks: BPT_DATA_ROOT, or shared/data beside the current folder.

    Raises ConfigError when it is missing or has no tokenizer.
    """
    root = Path(os.environ.get("BPT_DATA_ROOT", Path.cwd().parent / "shared" / "data"))
    if not (root / "t5-tokenizer").is_dir():
        raise ConfigError(
            f"--lengths real: {root} has no t5-tokenizer/, so it is no data pack; set BPT_DATA_ROOT to one, or use --lengths stated"
        )
    return root


def random_backbone(shape: T5Shape, device: torch.device, seed: int = 0) -> T5Backbone:
    """Return a T5 of that shape in float32, frozen and in eval mode, with the weights that `seed` gives on every machine."""
    torch.manual_seed(seed)
    config = copy.deepcopy(shape.config)
    model: Any = T5ForConditionalGeneration(config)
    return _backbone(model.to(device), device)


def in_dtype(backbone: T5Backbone, dtype: str) -> T5Backbone:
    """Return a copy of the T5 in another dtype (`fp32`, `bf16`, or `fp64` for the reference)."""
    wanted = torch.float64 if dtype == "fp64" else DTYPES[dtype]
    model: Any = copy.deepcopy(backbone.model)
    return _backbone(model.to(wanted), backbone.device)


def use_attention(backbone: T5Backbone, kind: str) -> None:
    """Set the attention of the stock modules: `sdpa` or `eager`."""
    model: Any = backbone.model
    model.set_attn_implementation(kind)


def our_pass(backbone: T5Backbone) -> PackedT5:
    """Return our pass over these weights, with the attention that a training run would choose on this machine."""
    backbone.use_packed_pass(default_attention(backbone.device, backbone.dtype))
    packed, backbone.packed = backbone.packed, None
    assert packed is not None
    return packed


def stein_phi(particles: Float[Tensor, "M P D"], score: Float[Tensor, "M P D"]) -> Float[Tensor, "M P D"]:
    """Return the direction as the source stage computes it, with the default kernel."""
    rule = KernelOptions()
    return direction(particles, score, kernel_matrices(squared_distances(particles, rule.scope), rule), rule)


def _batch(source: Tensor, mask: Tensor, target: Tensor) -> Batch:
    rows = len(source)
    names = tuple(f"text/{row}" for row in range(rows))
    return Batch(0, source, mask, target, torch.arange(rows), names, torch.full((rows,), 1 / rows))


def _text(length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    ids = torch.randint(SPECIAL, vocabulary, (length,), generator=generator)
    ids[-1] = END
    return ids


def _with_prompts(width: int, num_particles: int, num_prompt: int, texts: Batch, generator: torch.Generator) -> Work:
    size = (num_prompt, width)
    noise = SPREAD * torch.randn((num_particles, *size), generator=generator)
    return Work(torch.randn(size, generator=generator) + noise, texts)


def _tokenizer(root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "t5-tokenizer", local_files_only=True)


def _backbone(model: Any, device: torch.device) -> T5Backbone:
    backbone = T5Backbone(model, NoTokenizer(), name="random weights", path="", identity="")
    backbone.device = device
    return backbone


class NoTokenizer:
    """The tokenizer of a backbone whose texts are token ids from the start."""

    def get_vocab(self) -> dict[str, int]:
        """Return an empty vocabulary."""
        return {}

    def batch_decode(self, rows: Tensor, **_options: Any) -> list[str]:
        """Return the ids, in digits."""
        return [" ".join(map(str, row)) for row in rows.tolist()]
