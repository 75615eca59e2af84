"""The FLOPs that the bench states for a decoder-only model are what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from bpt_dist.commands.bench.decoder import flops_of


@pytest.mark.parametrize("rows", [1, 11])
def test_flops_agree_with_torchs_counter(rows: int) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    inputs = torch.randn(1, 11, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs, use_cache=False, logits_to_keep=rows).logits.sum().backward()
    assert flops_of(config, 11, rows, 11 * 11) == pytest.approx(counter.get_total_flops(), rel=0.01)
