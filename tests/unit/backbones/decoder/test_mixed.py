"""A pass in which each text has prompts and label words of its own gives what transformers gives one sequence at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import torch
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone, Texts

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WORDS = (  # one token or several, beginning alike or not, one inside another; the first two have trees of one form
    torch.tensor([[9, 12, 1], [30, 1, -100]]),
    torch.tensor([[40, 8, 1], [17, 1, -100]]),
    torch.tensor([[9, 12, 1], [9, 12, 14], [9, 1, -100], [30, -100, -100], [9, 12, -100]]),
    torch.tensor([[5], [6]]),
)
NUM_PROMPTS = 5


@pytest.fixture(scope="module", params=tiny_decoder.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.make(tmp_path_factory.mktemp(request.param), request.param)


@cache
def models(folder: Path) -> tuple[Any, dict[str, Backbone]]:
    """Return transformers' model and our passes: two kinds of attention, kept prefixes, and its own modules padded."""
    passes = {kind: loading.load(str(folder)) for kind in ("sdpa", "eager", "keeps", "stock")}
    for kind in ("sdpa", "eager", "keeps"):
        passes[kind].use_packed_pass("eager" if kind == "eager" else "sdpa")
    assert passes["keeps"].keep_prefixes(1 << 20)
    return tiny_decoder.stock(folder), passes


def mixture(seed: int, num_hypotheses: int) -> tuple[Texts, list[Tensor], list[Tensor]]:
    """Return texts of 1 to 30 tokens, and the prompts of 1 to 12 positions and the label words that each of them has."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    ids = [torch.randint(4, tiny_decoder.NUM_PIECES, (number(1, 30),), generator=draw).tolist() for _ in range(8)]
    lengths = [number(1, 12) for _ in range(NUM_PROMPTS - 1)]
    lengths.append(lengths[0])  # two of one length
    known = [torch.randn(num_hypotheses, length, tiny_decoder.WIDTH, generator=draw) for length in lengths]
    return Texts.of(ids), [known[number(0, NUM_PROMPTS - 1)] for _ in ids], [WORDS[number(0, 3)] for _ in ids]


@pytest.mark.parametrize("seed", range(6))
def test_label_words_are_ranked_as_whole_sequences_are(folder: Path, seed: int) -> None:
    model, passes = models(folder)
    texts, prompts, words = mixture(seed, num_hypotheses=1 + seed % 3)
    for kind, backbone in passes.items():
        found = backbone.rank_each(texts, prompts, words)
        for n, of_text in enumerate(found):
            source = texts.source_ids[n][texts.source_mask[n].bool()]
            expected = [[tiny_decoder.truth(model, prompt, source, word[word >= 0]) for word in words[n]] for prompt in prompts[n]]
            torch.testing.assert_close(of_text, torch.tensor(expected), **CLOSE, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize("seed", range(4))
def test_each_text_is_gone_on_with_to_its_own_limit(folder: Path, seed: int) -> None:
    model, passes = models(folder)
    texts, prompts, _ = mixture(seed, num_hypotheses=1)
    limits = [1 + (seed + 3 * n) % 9 for n in range(len(prompts))]
    for kind, backbone in passes.items():
        found = backbone.generate_each(texts, prompts, limits)
        for n, written in enumerate(found):
            source = texts.source_ids[n][texts.source_mask[n].bool()]
            expected = tiny_decoder.written(model, prompts[n][0], source, limits[n])
            assert written == backbone.tokenizer.decode(expected, skip_special_tokens=True), kind


def test_prompts_that_write_together_write_what_they_write_alone_in_a_batch(folder: Path) -> None:
    _, passes = models(folder)
    texts, prompts, _ = mixture(7, num_hypotheses=3)
    limits = [6] * len(prompts)
    stock = passes["stock"].generate_each(texts, prompts, limits)
    for kind in ("sdpa", "eager", "keeps"):
        assert passes[kind].generate_each(texts, prompts, limits) == stock
    assert len(set(stock)) > 2, "texts must differ, else the test shows nothing"
