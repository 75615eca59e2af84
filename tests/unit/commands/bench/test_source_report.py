"""The formula of what a pass needs is what torch's flop counter finds in the stock pass and in ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from bpt_dist.backbones.attention import plain_attention
from bpt_dist.backbones.t5.packed import PackedT5
from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench import correctness
from bpt_dist.commands.bench.source_report import row_flops, useful_flops
from bpt_dist.commands.bench.workload import bench_shape, make_work, random_backbone

KINDS: dict[str, dict[str, Any]] = {
    "relu": {"d_ff": 48, "feed_forward_proj": "relu"},
    "gated": {"d_ff": 40, "feed_forward_proj": "gated-gelu"},
}


def tiny(kind: str) -> T5Shape:
    """Heads are narrower in all than the model is wide, as in t5-v1_1-small, and the decoder is deeper than the encoder."""
    return T5Shape(
        transformers.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            num_heads=6,
            num_layers=2,
            num_decoder_layers=3,
            decoder_start_token_id=0,
            **KINDS[kind],
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(7, 11, 5), (1, 1, 1), (20, 300, 16)])
def test_the_stock_pass_is_counted_exactly(kind: str, lengths: tuple[int, int, int]) -> None:
    num_prompt, num_source, num_target = lengths
    counted = tiny(kind).row_cost(*lengths)
    stated = row_flops(tiny(kind), num_prompt + num_source, num_target, keys=True)
    assert stated.forward == pytest.approx(counted.forward_flops, rel=1e-9)
    assert stated.backward == pytest.approx(counted.backward_flops, rel=0.01)


def test_the_stock_pass_of_a_published_shape_is_counted_within_a_percent() -> None:
    shape = bench_shape("t5-small")
    counted = shape.row_cost(100, 256, 4)
    assert row_flops(shape, 356, 4, keys=True).total == pytest.approx(counted.flops, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_our_pass_does_what_is_counted_as_useful_and_nothing_else(kind: str) -> None:
    shape, num_particles, num_prompt = tiny(kind), 2, 6
    work = make_work(shape, num_particles, [(30, 3), (9, 1), (30, 3), (1, 1)], num_prompt)
    backbone = random_backbone(shape, torch.device("cpu"))
    ours = PackedT5(backbone.model, plain_attention)
    with FlopCounterMode(display=False) as counter:
        correctness.packed(backbone, ours, work)
    assert counter.get_total_flops() == pytest.approx(useful_flops(shape, num_prompt, work.lengths, num_particles), rel=0.01)


def test_leaving_keys_out_pays_for_short_targets_only() -> None:
    shape = bench_shape("t5-base")
    short, long = ([row_flops(shape, 356, length, keys=keys).total for keys in (True, False)] for length in (4, 100))
    assert short[0] / short[1] == pytest.approx(1.13, abs=0.02)
    assert long[0] < long[1]
