"""The work that is timed: prompts and texts of stated or real lengths; tokens are random, for no time depends on their values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.backbone_shapes import T5Shape, shape_of
from bpt_dist.data.batches import IGNORED, Batch
from bpt_dist.errors import ConfigError

SHAPES = ("t5-small", "t5-base", "t5-large")
SPECIAL, END = 3, 1  # ids below SPECIAL are padding, end of text and unknown
SPREAD = 0.1  # of the particles, against prompts of standard deviation 1

# Tokens of (source, target) of one text a task. They lie near the means and, for the long two, the caps of the real tasks under the
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
    """M prompts, each before each of N texts; `texts` is padded to its longest."""

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
        """Return how many encoder tokens of the step are no padding, prompts included."""
        return len(self.prompts) * sum(self.prompts.shape[1] + source for source, _ in self.lengths)

    @property
    def num_padded_tokens(self) -> int:
        """Return how many encoder tokens the step has when every row is as long as the longest."""
        return self.num_rows * (self.prompts.shape[1] + self.texts.source_ids.shape[1])

    def to(self, device: torch.device) -> Work:
        """Return the same work on a device."""
        texts = self.texts
        moved = {name: getattr(texts, name).to(device) for name in ("source_ids", "source_mask", "target_ids")}
        return Work(self.prompts.to(device), Batch(**{**vars(texts), **moved}))


def bench_shape(name: str, dtype: str = "fp32") -> T5Shape:
    """Return the shape to time: one of SHAPES, or that of a folder with a config.json.

    Raises ConfigError for any other name.
    """
    if name not in SHAPES and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"--shape {name}: is not known; choose {', '.join(SHAPES)}, or give a folder with a config.json")
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
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(len(lengths), max(length for length, _ in lengths), dtype=torch.long)
    mask = torch.zeros_like(source)
    target = torch.full((len(lengths), max(length for _, length in lengths)), IGNORED)
    for row, (num_source, num_target) in enumerate(lengths):
        source[row, :num_source] = _text(num_source, shape.config.vocab_size, generator)
        mask[row, :num_source] = 1
        target[row, :num_target] = _text(num_target, shape.config.vocab_size, generator)
    return _with_prompts(shape, num_particles, num_prompt, _batch(source, mask, target), generator)


def _text(length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    ids = torch.randint(SPECIAL, vocabulary, (length,), generator=generator)
    ids[-1] = END
    return ids


def _batch(source: Tensor, mask: Tensor, target: Tensor) -> Batch:
    rows = len(source)
    names = tuple(f"text/{row}" for row in range(rows))
    return Batch(0, source, mask, target, torch.arange(rows), names, torch.full((rows,), 1 / rows))


def _with_prompts(shape: T5Shape, num_particles: int, num_prompt: int, texts: Batch, generator: torch.Generator) -> Work:
    size = (num_prompt, shape.config.d_model)
    noise = SPREAD * torch.randn((num_particles, *size), generator=generator)
    return Work(torch.randn(size, generator=generator) + noise, texts)


def real_work(shape: T5Shape, num_particles: int, *, num_prompt: int = 100, texts: int = 1, seed: int = 0) -> Work:
    """Return one source step with texts drawn from the real source tasks of the data pack, as training draws them.

    Raises ConfigError when the pack or its tokenizer is not here, DataError for a bad row.
    """
    from bpt_dist.config import Data
    from bpt_dist.data.batches import Batches
    from bpt_dist.data.prepared import prepare

    root = data_pack()
    data = Data(root=root, max_source_length=CAP, max_train_rows=1000)
    tasks = prepare(list(SOURCE_TASKS), data, _tokenizer(root), splits=["train"], seed=seed)
    drawn = Batches([task.train.tokens for task in tasks], texts, seed).at(0)
    return _with_prompts(shape, num_particles, num_prompt, drawn, torch.Generator().manual_seed(seed))


def data_pack() -> Path:
    """Return the folder of real tasks: BPT_DATA_ROOT, or shared/data beside the current folder.

    Raises ConfigError when it is not there or has no tokenizer.
    """
    root = Path(os.environ.get("BPT_DATA_ROOT", Path.cwd().parent / "shared" / "data"))
    if not (root / "t5-tokenizer").is_dir():
        raise ConfigError(
            f"--lengths real: {root} holds no data pack with a t5-tokenizer/; set BPT_DATA_ROOT to one, or use --lengths stated"
        )
    return root


def _tokenizer(root: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "t5-tokenizer", local_files_only=True)
