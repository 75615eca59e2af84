"""Some 300 checkpoints changed at random: each is refused by name, or every weight is bit for bit what its files hold."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mutated_t5 import MAY_FIT, MUTATIONS, TABLES, Mutation
from stored_t5 import StoredT5
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.prompts import prepend
from bpt_dist.errors import ConfigError

SEED, PER_MUTATION = 2024, 12


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[StoredT5]:
    tied = StoredT5.make(tmp_path_factory.mktemp("tied"), layers=1)
    untied = StoredT5.make(tmp_path_factory.mktemp("untied"), layers=1, tied=False)
    mt5 = untied.copy()
    mt5.config["model_type"] = "mt5"
    return [tied, untied, mt5]


def check_weights(t5: StoredT5, backbone: Any) -> None:
    """Compare every weight with the files, by names alone."""
    tables = [t5.tensors[name] for name in TABLES if name in t5.tensors]
    for name, weight in backbone.model.state_dict().items():
        if name in t5.tensors:
            expected = t5.tensors[name]
        else:
            assert name in (*TABLES, "lm_head.weight"), f"{name} is in no file"
            expected = tables[0]
        assert torch.equal(weight, expected.float()), name
    assert backbone.model.config.scale_decoder_outputs == (t5.config["model_type"] == "t5" and "lm_head.weight" not in t5.tensors)


@torch.no_grad()
def check_passes(backbone: Any) -> None:
    """Compare log-likelihoods and texts of the stock and the packed pass."""
    ids = torch.randint(3, 120, (2, 5), generator=torch.Generator().manual_seed(1))
    batch = SimpleNamespace(source_ids=ids, source_mask=torch.ones_like(ids), target_ids=ids[:, :3])
    prompt = torch.randn(1, 2, backbone.width, generator=torch.Generator().manual_seed(2))

    def inputs(embeds: Tensor) -> Tensor:
        return prepend(prompt, embeds)

    def results() -> tuple[Tensor, list[list[str]]]:
        return backbone.log_likelihood(batch, inputs, "token_sum").log_likelihood, backbone.generate(batch, inputs, 4)

    stock = results()
    backbone.use_packed_pass("sdpa")
    packed = results()
    torch.testing.assert_close(packed[0], stock[0], rtol=1e-4, atol=1e-4)
    assert packed[1] == stock[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_no_weight_comes_from_elsewhere(
    mutation: Mutation, originals: list[StoredT5], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No mutation changes the tokenizer, and reading it takes most of the time.
    tokenizer = loading._load_tokenizer(loading.Checkpoint(str(originals[0].tokenizer)), 128)
    monkeypatch.setattr(loading, "_load_tokenizer", lambda _checkpoint, _num_rows: tokenizer)
    draw = random.Random(f"{SEED} {mutation.__name__}")
    num_refused = num_loaded = 0
    for number in range(PER_MUTATION):
        t5 = originals[number % len(originals)].copy()
        named = mutation(t5, draw)
        folder = t5.write(tmp_path / str(number))
        try:
            backbone = loading.load(str(folder))
        except ConfigError as error:
            message = str(error)
            assert len(message.splitlines()) == 1
            assert named is not None, f"refused for no reason: {message}"
            assert any(word in message for word in named), (named, message)
            num_refused += 1
        else:
            assert named is None or mutation in MAY_FIT, f"loaded in spite of {named}"
            check_weights(t5, backbone)
            if num_loaded == 0:
                check_passes(backbone)
            num_loaded += 1
    assert num_refused + num_loaded == PER_MUTATION


def test_there_are_more_than_200_mutated_checkpoints() -> None:
    assert len(MUTATIONS) * PER_MUTATION >= 200
