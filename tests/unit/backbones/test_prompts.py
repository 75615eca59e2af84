"""Where a prompt starts and where it stands, against the embedding table and an explicit loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_t5
import torch

from bpt_dist.backbones import loading, prompts
from bpt_dist.backbones.base import Backbone
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import generator


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return loading.load(str(tiny_t5.make(tmp_path_factory.mktemp("t5"))))


def start(backbone: Backbone, seed: int = 0, **options: Any) -> torch.Tensor:
    return prompts.initial_prompt(PromptOptions(name="any", **options), backbone, generator(seed, "prompt"))


def pieces_of(prompt: torch.Tensor, backbone: Backbone) -> list[int]:
    """The rows of the embedding table a prompt consists of; fails where a position is no row of it."""
    table = backbone.model.shared.weight
    found = [torch.nonzero((table == position).all(1)).flatten().tolist() for position in prompt]
    assert all(len(rows) == 1 for rows in found)
    return [rows[0] for rows in found]


def test_vocabulary_draws_distinct_ordinary_pieces(backbone: Backbone) -> None:
    pieces = pieces_of(start(backbone, length=100), backbone)
    assert len(set(pieces)) == 100
    assert not set(pieces) & set(backbone.tokenizer.all_special_ids)


def test_vocabulary_draws_from_the_common_pieces_only(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lester et al. (2021): the 5,000 most common; a T5 vocabulary has them first."""
    assert prompts.COMMON_PIECES == 5000
    monkeypatch.setattr(prompts, "COMMON_PIECES", 20)
    assert max(max(pieces_of(start(backbone, seed, length=10), backbone)) for seed in range(5)) < 20


def test_a_prompt_longer_than_the_vocabulary_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"method\.length: 126 .* 125 ordinary pieces .*use init=normal"):
        start(backbone, length=126)


def test_text_is_repeated_to_the_length(backbone: Backbone) -> None:
    ids = backbone.tokenizer("the cat sat", add_special_tokens=False).input_ids
    assert len(ids) == 3
    assert pieces_of(start(backbone, length=7, init="text", init_text="the cat sat"), backbone) == [*ids, *ids, ids[0]]
    assert pieces_of(start(backbone, length=2, init="text", init_text="the cat sat"), backbone) == ids[:2]
    with pytest.raises(ConfigError, match=r"method\.init_text: the text has no pieces"):
        start(backbone, init="text", init_text=" ")


@pytest.mark.parametrize("init", ["vocabulary", "normal", "uniform"])
def test_a_start_depends_on_the_seed_alone(backbone: Backbone, init: str) -> None:
    torch.manual_seed(1)
    first = start(backbone, 3, length=8, init=init)
    torch.manual_seed(2)
    assert torch.equal(start(backbone, 3, length=8, init=init), first)
    assert not torch.equal(start(backbone, 4, length=8, init=init), first)
    assert first.dtype is torch.float32
    assert first.shape == (8, 32)


def test_normal_and_uniform_have_their_scales(backbone: Backbone) -> None:
    normal, uniform = (start(backbone, length=500, init=init, init_scale=0.2) for init in ("normal", "uniform"))
    # 16,000 numbers: the standard error of a standard deviation is 0.6 %.
    assert float(normal.std()) == pytest.approx(0.2, rel=0.03)
    assert float(uniform.abs().max()) == pytest.approx(0.2, rel=0.01)
    assert float(uniform.std()) == pytest.approx(0.2 / 3**0.5, rel=0.03)
    assert float(start(backbone, length=500, init="uniform").abs().max()) == pytest.approx(0.5, rel=0.01)


def test_a_stored_prompt_is_taken_as_it_is_and_one_of_another_width_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    stored = numpy.random.default_rng(0).normal(size=(6, 32)).astype(numpy.float32)
    numpy.save(tmp_path / "prompt.npy", stored)
    assert torch.equal(start(backbone, init="file", init_file=tmp_path / "prompt.npy"), torch.from_numpy(stored))
    numpy.save(tmp_path / "wide.npy", stored.reshape(3, 64))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'wide.npy'}: the prompt is 64 wide, the backbone 32")):
        start(backbone, init="file", init_file=tmp_path / "wide.npy")


def test_prompts_stand_before_every_text_particle_by_particle() -> None:
    particles, embeds = torch.randn(3, 2, 5), torch.randn(4, 6, 5)
    found = prompts.prepend(particles, embeds)
    own = prompts.prepend_own(torch.randn(3, 4, 2, 5), embeds)
    assert found.shape == own.shape == (3, 4, 8, 5)
    for m in range(3):
        for n in range(4):
            assert torch.equal(found[m, n], torch.cat([particles[m], embeds[n]]))
            assert torch.equal(own[m, n, 2:], embeds[n])


def test_own_prompts_meet_their_own_text() -> None:
    several, embeds = torch.randn(2, 3, 2, 5), torch.randn(3, 1, 5)
    found = prompts.prepend_own(several, embeds)
    assert all(torch.equal(found[m, n, :2], several[m, n]) for m in range(2) for n in range(3))


def test_float32_prompts_enter_a_bfloat16_t5_in_its_own_type() -> None:
    assert prompts.prepend(torch.randn(1, 2, 5), torch.randn(1, 2, 5, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("rows", [slice(1, 3), slice(2), slice(None), slice(3, 4)])
def test_the_gradient_of_some_rows_is_that_of_plain_indexing(rows: slice) -> None:
    plain, chosen = (torch.nn.Parameter(torch.arange(12.0).view(4, 3)) for _ in range(2))
    for tensor, take in ((plain, lambda p: p[rows]), (chosen, lambda p: prompts.rows_of(p, rows))):
        for _ in range(2):  # a second pass adds to the first
            take(tensor).sin().sum().backward()
    assert torch.equal(prompts.rows_of(chosen, rows), plain[rows])
    assert torch.equal(chosen.grad, plain.grad)


def test_some_rows_write_no_gradient_as_large_as_all() -> None:
    many = torch.nn.Parameter(torch.zeros(5000, 100))
    many.grad = torch.zeros_like(many)
    with torch.profiler.profile(profile_memory=True) as profile:
        prompts.rows_of(many, slice(7, 9)).exp().sum().backward()
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < many.nbytes / 100
    assert many.grad.count_nonzero() == many.grad[7:9].count_nonzero() == 200
