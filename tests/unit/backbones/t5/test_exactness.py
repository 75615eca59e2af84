"""How many digits of float32 the packed pass keeps, beside transformers' own pass: both are compared with float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Texts
from bpt_dist.tasks import mini

NUM_PROMPTS, NUM_TEXTS, LENGTH = 6, 15, 20
LABELS = [[50, 1], [60, 1], [70, 80, 1]]


def read_by_transformers(model: Any, prompt: Tensor, texts: list[list[int]]) -> Tensor:
    """Return the log-likelihood of each label of each text in the type of the model, one text at a time."""
    found = []
    for text in texts:
        embeds = model.shared(torch.tensor([text]))
        inputs = torch.cat([prompt[None].to(embeds.dtype), embeds], dim=1)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long)
        encoded = BaseModelOutput(last_hidden_state=model.encoder(inputs_embeds=inputs, attention_mask=mask)[0])
        for label in LABELS:
            target = torch.tensor([label])
            logits = model(encoder_outputs=encoded, attention_mask=mask, labels=target).logits
            found.append(logits.log_softmax(-1).gather(-1, target[..., None]).double().sum())
    return torch.stack(found).view(len(texts), len(LABELS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_it_is_about_as_near_to_float64_as_the_stock_pass(attention: str) -> None:
    """On the pretrained backbone, whose attention is sharp as random weights' is not, and under prompts as long as trained ones.

    Distances have long tails, so their geometric means are compared: 1.4 apart, and 1.1 where the stock pass reads a batch. What
    is left belongs to float32: with every operation exact and only its result rounded, half of the stock pass's distance remains.
    """
    backbone = loading.load(mini.backbone_path("mini"))
    exact = copy.deepcopy(backbone.model).double()
    backbone.use_packed_pass(attention)
    draw = torch.Generator().manual_seed(0)
    size = backbone.vocabulary_size
    candidates = torch.tensor([[50, 1, -100], [60, 1, -100], [70, 80, 1]])
    distances: dict[str, list[Tensor]] = {"ours": [], "stock": []}
    for _ in range(NUM_PROMPTS):
        rows = backbone.vocabulary_rows(torch.randint(3, size, (LENGTH,), generator=draw))
        prompt = 2 * rows * torch.rand(LENGTH, 1, generator=draw).add(0.5)
        lengths = torch.randint(4, 24, (NUM_TEXTS,), generator=draw).tolist()
        texts = [[*torch.randint(3, size, (length,), generator=draw).tolist(), 1] for length in lengths]
        truth = read_by_transformers(exact, prompt, texts)
        ours = backbone.rank_each(Texts.of(texts), [prompt[None]] * NUM_TEXTS, [candidates] * NUM_TEXTS)
        distances["ours"].append(torch.stack([of_text[0] for of_text in ours]) - truth)
        distances["stock"].append(read_by_transformers(backbone.model, prompt, texts) - truth)
    ours, stock = (float(torch.stack(found).abs().clamp_min(1e-9).log().mean().exp()) for found in distances.values())
    assert 0 < stock < 5e-6
    assert ours < 3 * stock
