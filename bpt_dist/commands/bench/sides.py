"""A model as PEFT reads it and as we do, whatever the family, for comparisons of rows of many tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bpt_dist.backbones.base import Texts
from bpt_dist.backbones.decoder.shapes import DecoderShape
from bpt_dist.backbones.shapes import ModelShape
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench.decoder import Models as DecoderModels
from bpt_dist.commands.bench.source import Models
from bpt_dist.commands.bench.timing import Clock
from bpt_dist.objective import sequence_log_likelihood


class Sides(Protocol):
    """A model of random weights as we read it and as PEFT does."""

    vocabulary: int
    width: int
    title: str  # of ours
    model: Any  # the model of transformers whose weights both read
    ends_texts: bool  # whether a text ends with the end token

    @property
    def shape(self) -> ModelShape:
        """The model without its weights."""

    def pass_flops(self, num_prompt: int, num_source: int, num_nodes: int) -> int:
        """Return the FLOPs in which a pass of ours reads a text and its label words, `num_nodes` of them with the root."""

    def together(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "1 _P D"]], words: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "1 _C"]]:
        """Return the log-likelihoods of each text's words under its own prompt, in one pass of ours."""

    def load(self, prompt: Float[Tensor, "P D"]) -> None:
        """Switch PEFT's prompt."""

    def score(self, texts: Texts, word: Int[Tensor, " U"]) -> Float[Tensor, " N"]:
        """Return the log-likelihood of one word behind each text by PEFT."""


class T5Sides:
    """A T5."""

    title = "ours: all tasks in one batch"
    ends_texts = True

    def __init__(self, shape: T5Shape, clock: Clock, num_prompt: int, seed: int) -> None:
        self.models, self.device, self.shape = Models(shape, clock.device, num_prompt, seed), clock.device, shape
        self.vocabulary, self.width = shape.config.vocab_size, shape.config.d_model
        self.model = self.models.backbone("fp32").model

    def pass_flops(self, num_prompt: int, num_source: int, num_nodes: int) -> int:
        """Return the FLOPs of a text with its prompt: the encoder once, the decoder at each node."""
        return self.shape.row_cost(num_prompt, num_source, num_nodes).forward_flops

    def together(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "1 _P D"]], words: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "1 _C"]]:
        """Return the log-likelihoods of each text's words under its own prompt, in one pass of ours."""
        backbone = self.models.backbone("fp32")
        backbone.packed = self.models.packed("fp32")
        try:
            return backbone.rank_each(texts, prompts, words)
        finally:
            backbone.packed = None

    def load(self, prompt: Float[Tensor, "P D"]) -> None:
        """Switch PEFT's prompt."""
        self.models.stock("fp32", "sdpa")
        self.models.peft("fp32").load(prompt)

    def score(self, texts: Texts, word: Int[Tensor, " U"]) -> Float[Tensor, " N"]:
        """Return the log-likelihood of one word behind each text by PEFT."""
        labels = word.repeat(len(texts.source_ids), 1).to(self.device)
        source = {"input_ids": texts.source_ids.to(self.device), "attention_mask": texts.source_mask.to(self.device)}
        logits = self.models.peft("fp32").model(**source, labels=labels).logits
        return sequence_log_likelihood(logits, labels, "token_sum")


class DecoderSides:
    """A decoder-only model."""

    title = "ours: all tasks in one batch, each prompt read once"
    ends_texts = False

    def __init__(self, config: Any, clock: Clock, num_prompt: int, _seed: int) -> None:
        self.models, self.device = DecoderModels(config, "fp32", clock.device, num_prompt), clock.device
        self.vocabulary, self.width, self.shape = config.vocab_size, config.hidden_size, DecoderShape(config, "fp32")
        self.model = self.models.backbone.model

    def pass_flops(self, num_prompt: int, num_source: int, num_nodes: int) -> int:
        """Return the FLOPs of a text behind a prompt that was read before; the root is the text's last token."""
        return self.shape.shared_costs(num_prompt, num_source, num_nodes)[1].forward_flops

    def together(
        self, texts: Texts, prompts: Sequence[Float[Tensor, "1 _P D"]], words: Sequence[Int[Tensor, "_C _U"]]
    ) -> list[Float[Tensor, "1 _C"]]:
        """Return the log-likelihoods of each text's words under its own prompt, in one pass of ours."""
        return self.models.backbone.rank_each(texts, prompts, words)

    def load(self, prompt: Float[Tensor, "P D"]) -> None:
        """Switch PEFT's prompt."""
        self.models.load(prompt)

    def score(self, texts: Texts, word: Int[Tensor, " U"]) -> Float[Tensor, " N"]:
        """Return the log-likelihood of one word behind each text by PEFT, which makes logits from the shortest text's end on."""
        lengths = texts.source_mask.sum(1)
        rows = [torch.cat([ids[:length], word]) for ids, length in zip(texts.source_ids, lengths.tolist(), strict=True)]
        ids = pad_sequence(rows, batch_first=True).to(self.device)
        mask = (torch.arange(ids.shape[1]) < (lengths + len(word))[:, None]).long().to(self.device)
        first = int(lengths.min()) - 1
        logits = self.models.peft(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        places = (lengths[:, None] - 1 - first + torch.arange(len(word))).to(self.device)
        of_word = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[2]))
        return sequence_log_likelihood(of_word, word.repeat(len(ids), 1).to(self.device), "token_sum")
