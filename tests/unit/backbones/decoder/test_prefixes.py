"""Prefixes that are kept save reading a prompt again, stay within their memory, and go with the prompt they are of."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import tiny_decoder
import torch
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone, Texts
from bpt_dist.backbones.prefixes import Prefix, Prefixes

LENGTH, WORDS = 6, torch.tensor([[9, 12, 1], [30, 1, -100]])
BYTES = 3 * 2 * LENGTH * tiny_decoder.WIDTH // 2 * 4  # of a prompt: 3 layers, keys and values, half as many heads as queries, fp32
TEXTS = Texts.of([[7, 11, 5, 20], [9, 8], [33, 6, 14]])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    backbone = loading.load(str(tiny_decoder.make(tmp_path_factory.mktemp("llama"), "llama")))
    backbone.use_packed_pass("sdpa")
    return backbone


@pytest.fixture
def read(backbone: Backbone) -> list[int]:
    """The tokens of each call of the layers, from now on."""
    sizes: list[int] = []

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        sizes.append(states.shape[1])

    handle = backbone.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    yield sizes
    handle.remove()


def prompts_of(seed: int, number: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LENGTH, tiny_decoder.WIDTH, generator=draw) for _ in range(number)]


def ranked(backbone: Backbone, prompts: list[Tensor]) -> list[Tensor]:
    return backbone.rank_each(TEXTS, prompts, [WORDS] * len(prompts))


def test_a_prompt_is_read_once_for_all_passes(backbone: Backbone, read: list[int]) -> None:
    prompts = prompts_of(0)
    backbone.keep_prefixes(0)
    fresh = ranked(backbone, prompts)
    (together,) = read
    backbone.keep_prefixes(10 * BYTES)
    first, second = ranked(backbone, prompts), ranked(backbone, prompts)
    assert read[1:] == [3 * LENGTH, together - 3 * LENGTH, together - 3 * LENGTH]
    assert backbone.prefixes is not None
    assert (backbone.prefixes.found, backbone.prefixes.missed, backbone.prefixes.bytes) == (3, 3, 3 * BYTES)
    for ours, kept, again in zip(fresh, first, second, strict=True):
        torch.testing.assert_close(kept, ours, rtol=1e-5, atol=1e-5)
        assert torch.equal(kept, again)


def test_a_prompt_that_was_written_to_is_read_again(backbone: Backbone) -> None:
    prompts = prompts_of(1)
    backbone.keep_prefixes(10 * BYTES)
    before = ranked(backbone, prompts)
    prompts[0].mul_(-1)
    changed = ranked(backbone, prompts)
    backbone.keep_prefixes(0)
    fresh = ranked(backbone, prompts)
    assert not torch.allclose(before[0], fresh[0], atol=1e-3)
    for ours, expected in zip(changed, fresh, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_what_a_model_is_changed_by_has_prefixes_of_its_own(backbone: Backbone) -> None:
    prompts = prompts_of(2)
    backbone.keep_prefixes(10 * BYTES)
    ranked(backbone, prompts)
    from bpt_dist.backbones.insertion import each_token

    backbone.wrap_linear(lambda _place: each_token(lambda _x, y: 1.5 * y), ("v",))
    try:
        changed = ranked(backbone, prompts)
        backbone.keep_prefixes(0)
        for ours, expected in zip(changed, ranked(backbone, prompts), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    finally:
        backbone.detach()


def test_memory_is_limited_and_the_prompt_not_used_for_longest_goes_first(backbone: Backbone, read: list[int]) -> None:
    backbone.keep_prefixes(4 * BYTES)
    old, new = prompts_of(3), prompts_of(4)
    ranked(backbone, old)
    ranked(backbone, [new[0], old[2], old[2]])
    ranked(backbone, [new[1], new[1], new[1]])  # the fifth: one of the two that were read first must go
    assert backbone.prefixes is not None
    assert backbone.prefixes.bytes == 4 * BYTES
    read.clear()
    ranked(backbone, [new[0], new[1], old[2]])
    assert len(read) == 1, "these are still kept"
    ranked(backbone, [old[0], old[0], old[0]])
    assert len(read) == 3, "this one was forgotten"


def test_more_prompts_than_memory_are_read_with_their_texts(backbone: Backbone, read: list[int]) -> None:
    backbone.keep_prefixes(3 * BYTES - 1)
    prompts = prompts_of(5)
    ranked(backbone, prompts)
    ranked(backbone, prompts)
    assert len(read) == 2
    assert backbone.prefixes is not None
    assert backbone.prefixes.bytes == 0


def test_a_prompt_that_is_gone_frees_its_memory(backbone: Backbone) -> None:
    backbone.keep_prefixes(10 * BYTES)
    prompts = prompts_of(6)
    ranked(backbone, prompts)
    prompts.pop()
    gc.collect()
    assert backbone.prefixes is not None
    assert backbone.prefixes.bytes == 2 * BYTES


def test_prompts_may_die_in_other_threads_while_passes_run() -> None:
    kept = Prefixes(20 * 8)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            kept.of([torch.zeros(1) for _ in range(4)], lambda _prompt: 8, numbered)

    def numbered(prompts: list[Tensor]) -> list[Prefix]:
        return [[(torch.zeros(1), torch.zeros(1))] for _ in prompts]

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        found = kept.of([torch.ones(1)], lambda _prompt: 8, numbered)
        assert found is not None
        assert kept.bytes <= kept.most_bytes
    stop.set()
    for thread in threads:
        thread.join()
    gc.collect()
    assert kept.bytes == 0
