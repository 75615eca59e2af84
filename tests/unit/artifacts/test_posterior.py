"""The hand-over between the stages: read back bit for bit, refused where it does not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import tiny_t5
import torch

from bpt_dist.artifacts.posterior import Posterior
from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.commands.export import export_run
from bpt_dist.errors import ConfigError, StorageError


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return loading.load(str(tiny_t5.make(tmp_path_factory.mktemp("t5"))))


def facts(backbone: Backbone) -> dict[str, object]:
    return {
        "method": "bpt",
        "backbone": backbone.name,
        "backbone_hash": backbone.identity,
        "tokenizer_hash": backbone.tokenizer_hash,
        "steps": 4,
    }


@pytest.fixture
def stored(backbone: Backbone, tmp_path: Path) -> Posterior:
    particles = torch.randn(3, 4, 32)
    posterior = Posterior({"particles": particles, "mean": particles.mean(0)}, facts(backbone))
    posterior.save(tmp_path / "run" / "source" / "posterior")
    return posterior


@pytest.mark.parametrize("place", ["run", "run/source", "run/source/posterior", "run/source/posterior/posterior.safetensors"])
def test_a_posterior_is_found_from_run_folder_or_file(stored: Posterior, backbone: Backbone, tmp_path: Path, place: str) -> None:
    found = Posterior.load(tmp_path / place, backbone)
    assert found.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in stored.tensors.items())
    assert found.facts["steps"] == 4
    assert found.facts["shapes"] == {"particles": [3, 4, 32], "mean": [4, 32]}


def test_without_its_facts_a_posterior_does_not_exist(stored: Posterior, backbone: Backbone, tmp_path: Path) -> None:
    """They are written last: a crash between the two files leaves none."""
    (tmp_path / "run/source/posterior/posterior.json").unlink()
    with pytest.raises(
        ConfigError, match=r"source\.posterior: no posterior\.safetensors with posterior\.json in .*; give a finished run"
    ):
        Posterior.load(tmp_path / "run", backbone)


def test_a_posterior_of_other_weights_is_refused(stored: Posterior, tmp_path: Path) -> None:
    other = loading.load(str(tiny_t5.make(tmp_path / "other", seed=1)))
    with pytest.raises(ConfigError, match=r"source\.posterior: .* made with another backbone .*; set backbone\.path to that one"):
        Posterior.load(tmp_path / "run", other)


def test_a_posterior_of_a_tokenizer_with_two_pieces_swapped_is_refused(
    stored: Posterior, backbone: Backbone, tmp_path: Path
) -> None:
    """F16: same weights, same size of the vocabulary, another meaning of every text."""
    folder = Path(shutil.copytree(backbone.path, tmp_path / "swapped"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"source\.posterior: .* made with another tokenizer"):
        Posterior.load(tmp_path / "run", loading.load(str(folder)))


BPT, SPOT = {"particles": "M P D", "mean": "P D"}, {"prompts": "K P D", "keys": "K P D", "start": "P D"}


def test_a_method_starts_from_any_posterior_that_has_what_it_needs(stored: Posterior) -> None:
    """BPT's mean is a prompt like any other: vanilla transfer may continue from it."""
    for method, needed in (("bpt", BPT), ("vanilla_transfer", {"mean": "P D"}), ("bpt", {})):
        assert stored.require(method, needed, 32) is None  # what is missing raises, as the next test shows


@pytest.mark.parametrize(("method", "needed", "width", "wanted"), [
    ("spot", SPOT, 32, r"starts from prompts \[K, P, D\], keys \[K, P, D\], start \[P, D\], D being 32;"),
    ("other", {"mean": "K P D"}, 32, r"starts from mean \[K, P, D\], D being 32;"),
    ("bpt", BPT, 64, r"starts from particles \[M, P, D\], mean \[P, D\], D being 64;"),
    ("other", {"particles": "P P D", "mean": "P D"}, 32, r"starts from particles \[P, P, D\]"),
    ("toy", {}, 32, r"method toy starts from its own tensors"),
], ids=["other tensors", "other axes", "another width", "two sizes of one axis", "nothing named"])  # fmt: skip
def test_a_posterior_of_another_kind_is_refused_naming_both(
    method: str, needed: dict[str, str], width: int, wanted: str, stored: Posterior
) -> None:
    with pytest.raises(ConfigError, match=wanted) as refused:
        stored.require(method, needed, width)
    assert str(refused.value).startswith(
        "source.posterior: was made by method bpt and holds mean [4, 32], particles [3, 4, 32]; method "
    )


@pytest.mark.parametrize(("maker", "taker"), [("bpt", "spot"), ("spot", "mpt"), ("mpt", "attempt"), ("attempt", "bpt")])
def test_a_run_refuses_a_posterior_of_another_kind_before_it_trains(maker: str, taker: str, tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path)
    run = tiny_run.trained(tiny_run.load(tmp_path, tiny_run.settings(world, {"name": maker}, data={"target_tasks": ["mood"]})))
    again = tiny_run.settings(world, {"name": taker}, source={"posterior": str(run)}, name="again")
    with pytest.raises(ConfigError, match=f"was made by method {maker} and holds .*; method {taker} starts from"):
        tiny_run.trained(tiny_run.load(tmp_path, again))
    assert not (world / "runs" / "again" / "target").exists()


def test_settings_that_contradict_a_posterior_are_refused_naming_both(tmp_path: Path) -> None:
    """They would be ignored: prompts have the posterior's length, and its texts are those of its protocol."""
    world = tiny_run.world(tmp_path)
    run = tiny_run.trained(tiny_run.load(tmp_path, tiny_run.settings(world, {"name": "bpt"}, data={"target_tasks": ["mood"]})))
    for number, (method, data, message) in enumerate(
        (
            ({"length": 5}, {}, r"method\.length: is 5, the prompts of source\.posterior have 3 positions; set it to 3"),
            ({}, {"protocol": "attempt"}, r"data\.protocol: is attempt, the source\.posterior was learnt from texts of fixed"),
        )
    ):
        for name in ("bpt", "vanilla_transfer"):
            plain = tiny_run.settings(
                world, {"name": name, **method}, data=data, source={"posterior": str(run)}, name=f"{name}{number}"
            )
            with pytest.raises(ConfigError, match=message):
                tiny_run.trained(tiny_run.load(tmp_path, plain))
            assert not (world / "runs" / f"{name}{number}" / "target").exists()


def test_cards_name_the_tasks_the_posterior_was_learnt_from(tmp_path: Path) -> None:
    """Not those of a configuration that did not learn it."""
    world = tiny_run.world(tmp_path)
    run = tiny_run.trained(tiny_run.load(tmp_path, tiny_run.settings(world, {"name": "bpt"}, data={"target_tasks": ["mood"]})))
    data = {"target_tasks": ["mood", "count"], "source_tasks": ["truth"]}
    plain = tiny_run.settings(
        world, {"name": "bpt"}, data=data, source={"posterior": str(run)}, target={"joint": True}, name="again"
    )
    again = tiny_run.trained(tiny_run.load(tmp_path, plain))
    export_run(again, None, tmp_path / "out", particles=True)
    cards = [again / "target" / "mood" / "adapter", tmp_path / "out" / "joint", tmp_path / "out" / "particles" / "mean"]
    for folder in cards:
        assert "- source tasks: colour, truth\n" in (folder / "README.md").read_text()


def test_attempt_may_mix_the_library_of_spot(tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path)
    run = tiny_run.trained(tiny_run.load(tmp_path, tiny_run.settings(world, {"name": "spot"}, data={"target_tasks": ["mood"]})))
    again = tiny_run.settings(world, {"name": "attempt"}, source={"posterior": str(run)}, name="again")
    assert (tiny_run.trained(tiny_run.load(tmp_path, again)) / "results.json").is_file()


def test_a_torn_posterior_is_named(stored: Posterior, backbone: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "run/source/posterior/posterior.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=str(file)):
        Posterior.load(tmp_path / "run", backbone)
