"""The guard of the fast path: ours against PEFT in a loop on a small T5 with texts of unequal lengths; ratios, never seconds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from bpt_dist.backbones.t5.shapes import T5Shape
from bpt_dist.commands.bench import correctness
from bpt_dist.commands.bench.source import Models, exact, variants
from bpt_dist.commands.bench.timing import Clock, alternate, speedup
from bpt_dist.commands.bench.workload import Work, source_work
from bpt_dist.distributed.mesh import Mesh

SHAPE = T5Shape(
    transformers.T5Config(vocab_size=512, d_model=256, d_kv=64, num_heads=4, d_ff=1024, num_layers=2, decoder_start_token_id=0)
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work() -> Work:
    return source_work(SHAPE, 2)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(SHAPE, CPU, 100)


def test_every_variant_computes_the_same(models: Models, work: Work) -> None:
    chosen = {each.name: each for each in variants(models, work, {"fp32": "sdpa", "bf16": "eager"}, None) if each.stock}
    found = {name: each.run() for name, each in chosen.items()}
    differences = correctness.compare(found, exact(models, work, 2), {name: each.stock or "" for name, each in chosen.items()})
    assert all(each.right for each in differences.values()), differences
    assert set(chosen) >= {"peft_fp32", "padded_fp32", "grouped_fp32", "ours_fp32", "peft_bf16", "ours_bf16"}
    for name, each in differences.items():
        assert each.loss < (1e-5 if name.endswith("fp32") else 2e-2)


def test_a_variant_that_is_wrong_in_one_particle_is_found(models: Models, work: Work) -> None:
    right = {
        each.name: each.run() for each in variants(models, work, {"fp32": "sdpa"}, None) if each.name in ("peft_fp32", "ours_fp32")
    }
    losses, gradient = right["ours_fp32"]
    stock = dict.fromkeys(right, "peft_fp32")
    bent = gradient.clone()
    bent[1] *= 1.01  # float64 is asked about particle 0 only
    assert not correctness.compare({**right, "ours_fp32": (losses, bent)}, exact(models, work), stock)["ours_fp32"].right
    bent[1, 0, 0] = float("nan")
    assert not correctness.compare({**right, "ours_fp32": (losses, bent)}, exact(models, work), stock)["ours_fp32"].right
    assert not correctness.compare({**right, "ours_fp32": (losses * 1.0001, gradient)}, exact(models, work), stock)[
        "ours_fp32"
    ].right


def test_smaller_passes_give_the_same(models: Models, work: Work) -> None:
    backbone, ours = models.backbone("fp32"), models.packed("fp32")
    assert len(correctness.our_microbatches(work, Mesh(), 4)) == 3
    whole, parts = (correctness.packed(backbone, ours, work, size) for size in (None, 4))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-3, atol=1e-6)


def test_ours_is_faster_than_peft_in_a_loop(models: Models) -> None:
    """The median of paired rounds of CPU time; one particle, so that it takes seconds."""
    work = source_work(SHAPE, 1)
    runs = {
        each.name: each.run for each in variants(models, work, {"fp32": "sdpa"}, None) if each.name in ("peft_fp32", "ours_fp32")
    }
    for run in runs.values():
        run()
    times = alternate(runs, Clock(CPU), 5)
    ratio = speedup(times["peft_fp32"], times["ours_fp32"])
    assert ratio.median >= 1.7, ratio


def test_work_moves_to_a_device_whole(work: Work) -> None:
    moved = work.to(CPU)
    assert dataclasses.astuple(moved)[1][3].tolist() == work.texts.target_ids.tolist()
    assert moved.lengths == work.lengths
