"""The opponent: PEFT's own prompt tuning, one particle after the other, in its best configuration."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bpt_dist.backbone import Backbone
from bpt_dist.bench.work import Work
from bpt_dist.data.batches import Batch
from bpt_dist.errors import ConfigError
from bpt_dist.objective import sequence_log_likelihood


def import_peft() -> Any:
    """Return the package; ConfigError when it is not installed. Asked first, so that forked processes need not import it again."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("bpt-dist bench: peft, which it compares with, is not installed; pip install peft") from error
    return peft


class PeftLoop:
    """PEFT around the weights of a backbone; only the prompt is trainable, texts are padded to the longest of their batch."""

    def __init__(self, backbone: Backbone, num_prompt: int) -> None:
        peft = import_peft()
        # For T5 the default is 2: twice the numbers that are used.
        config = peft.PromptTuningConfig(
            task_type=peft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=num_prompt, num_transformer_submodules=1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = peft.get_peft_model(backbone.model, config).to(backbone.device)
        self.stock: Any = backbone.model
        self.model.eval()

    @property
    def prompt(self) -> Tensor:
        """Return the trainable prompt [P, D], in float32."""
        weight: Tensor = self.model.prompt_encoder["default"].embedding.weight
        return weight

    def gradients(self, work: Work, *, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods [M, N] (mean over target tokens) and the gradient [M, P, D] of their sum."""
        self.model.train(dropout)
        found, gradients = [], []
        for particle in work.prompts:
            self.load(particle)
            log_likelihood = self._log_likelihood(work.texts)
            log_likelihood.sum().backward()
            found.append(log_likelihood.detach())
            gradients.append(self.prompt.grad)
        self.model.eval()
        return torch.stack(found), torch.stack([gradient for gradient in gradients if gradient is not None])

    def load(self, particle: Tensor) -> None:
        """Make `particle` [P, D] the prompt."""
        with torch.no_grad():
            self.prompt.copy_(particle)
        self.prompt.grad = None

    def _log_likelihood(self, texts: Batch) -> Tensor:
        start = self.stock._shift_right(texts.target_ids)
        logits = self.model(
            input_ids=texts.source_ids, attention_mask=texts.source_mask, decoder_input_ids=start, use_cache=False
        ).logits
        return sequence_log_likelihood(logits, texts.target_ids, "token_mean")

    @torch.no_grad()
    def generate(self, particle: Tensor, texts: Batch, num_tokens: int) -> Tensor:
        """Return the greedily decoded ids [N, U] under one prompt."""
        self.load(particle)
        found: Tensor = self.model.generate(
            input_ids=texts.source_ids, attention_mask=texts.source_mask, max_new_tokens=num_tokens, num_beams=1, do_sample=False
        )
        return found
