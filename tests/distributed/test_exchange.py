"""The Stein direction over ranks: slices of coordinates against gathered particles and against one process."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
import tiny_run
import torch
import torch.distributed as dist
from records import repeatable
from torch import Tensor

from bpt_dist.backbones.t5.shapes import ShapeBackbone, shape_of
from bpt_dist.commands.plan.estimate import estimate
from bpt_dist.config import RunConfig, fingerprint
from bpt_dist.distributed.exchange import SteinExchange, slices
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.errors import ConfigError
from bpt_dist.methods import base as methods
from bpt_dist.storage import checkpoint
from bpt_dist.storage.metrics_log import iter_records
from bpt_dist.storage.snapshots import with_snapshots
from bpt_dist.svgd import KernelOptions, stein_direction, summarize
from bpt_dist.train import run_all

TOLERANCE = 4e-7  # of the norm: float32 rounding of a sum that is split
RULES = [
    KernelOptions(kernel, scope, bandwidth, form)
    for kernel in ("rbf", "imq")
    for scope in ("prompt", "token")
    for form in ("svgd", "shared_scores", "repulsive_ensemble")
    for bandwidth in ("median", 30.0)
]
# Particles and positions: few and many particles (differences, matrix products), uneven slices, one position a rank, M that W
# does not divide (6 on 4 ranks makes a mesh of 2 x 2, 5 on 2 has nothing to exchange).
SHAPES = [(4, 5, 7), (8, 4, 16), (6, 9, 3), (20, 5, 8), (40, 6, 12), (5, 5, 4)]


def cloud(num_particles: int, num_positions: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Particles and scores as one process has them, and axes to look at them."""
    generator = torch.Generator().manual_seed(num_particles)
    particles, score = torch.randn(2, num_particles, num_positions, width, generator=generator)
    return particles, score, torch.randn(num_positions, width, 3, generator=generator)


class Found(NamedTuple):
    """What one rank has of a step."""

    rows: tuple[int, int]
    phi: Tensor
    metrics: dict[str, float] | None
    projection: Tensor | None
    kernel: Tensor | None


def exchanged(world: World, cases: list[tuple[str, tuple[int, int, int], KernelOptions]]) -> list[Found]:
    found = []
    for exchange, shape, rule in cases:
        particles, score, axes = cloud(*shape)
        mesh = world.mesh(shape[0], exchange=exchange)
        own = mesh.rows(shape[0])
        stein, local = SteinExchange(mesh, *shape[:2], rule), particles[own].clone()
        stein.begin(torch.zeros_like(local))  # of a step that was skipped
        stein.begin(local)
        phi = stein.direction(local, score[own])
        local.zero_()  # the update comes before the diagnostics
        picture = stein.diagnostics(axes.clone)
        found.append(Found((own.start, own.stop), phi, *(picture or (None, None, None))))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_every_exchange_has_the_direction_and_the_diagnostics_of_one_process(size: int) -> None:
    cases = list(itertools.product(("all_gather", "coordinates"), SHAPES, RULES))
    of_rank = ranks.run(exchanged, size, cases)
    for index, (exchange, shape, rule) in enumerate(cases):
        particles, score, axes = cloud(*shape)
        expected = stein_direction(particles, score, **rule._asdict())
        for found in (of_rank[rank][index] for rank in range(size)):
            own = expected.phi[slice(*found.rows)]
            assert (found.phi - own).norm() <= TOLERANCE * own.norm(), (exchange, shape, rule)
        first = of_rank[0][index]
        assert first.metrics == pytest.approx(summarize(expected, particles), rel=1e-6), (exchange, shape, rule)
        kernel = expected.kernel if rule.scope == "prompt" else expected.kernel.mean(0)
        torch.testing.assert_close(first.kernel, kernel, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(first.projection.float(), particles.flatten(1) @ axes.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_gathered_rows_have_the_bits_of_one_process() -> None:
    cases = [("all_gather", shape, RULES[0]) for shape in SHAPES]
    for of_rank in ranks.run(exchanged, 2, cases):
        for (_, shape, rule), found in zip(cases, of_rank, strict=True):
            particles, score, _ = cloud(*shape)
            assert torch.equal(found.phi, stein_direction(particles, score, **rule._asdict()).phi[slice(*found.rows)])


# --- what is on the wire --------------------------------------------------------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """Record each collective of tensors, its type, and the bytes that reach this rank from others."""
    seen: list[tuple[str, torch.dtype, int]] = []
    gather, trade, reduce = dist.all_gather, dist.all_to_all_single, dist.all_reduce

    def all_gather(parts: list[Tensor], local: Tensor, **options: Any) -> Any:
        seen.append(("all_gather", local.dtype, sum(part.nbytes for part in parts) - local.nbytes))
        return gather(parts, local, **options)

    def all_to_all_single(arrived: Tensor, packed: Tensor, received: list[int], sent: list[int], **options: Any) -> Any:
        own = received[dist.get_group_rank(options["group"], dist.get_rank())] * arrived.element_size()
        seen.append(("all_to_all", arrived.dtype, arrived.nbytes - own))
        return trade(arrived, packed, received, sent, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        seen.append(("all_reduce", tensor.dtype, tensor.nbytes))
        return reduce(tensor, **options)

    with monkeypatch.context() as patch:
        for replaced in (all_gather, all_to_all_single, all_reduce):
            patch.setattr(dist, replaced.__name__, replaced)
        yield seen


def traffic(world: World, shape: tuple[int, int, int], scope: str) -> dict[str, list[tuple[str, torch.dtype, int]]]:
    particles, score, axes = cloud(*shape)
    found = {}
    for exchange in ("all_gather", "coordinates"):
        mesh = world.mesh(shape[0], exchange=exchange)
        own, stein = mesh.rows(shape[0]), SteinExchange(mesh, *shape[:2], KernelOptions(scope=scope))
        with counted(pytest.MonkeyPatch()) as seen:
            stein.begin(particles[own])
            stein.direction(particles[own], score[own])
            found[exchange] = list(seen)
            seen.clear()
            stein.diagnostics(axes.clone)
            found[f"{exchange}, logged"] = list(seen)
    return found


@pytest.mark.parametrize("scope", ["prompt", "token"])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_a_rank_fall_with_the_number_of_ranks(size: int, scope: str) -> None:
    num_particles, num_positions, width = shape = (8, 12, 16)
    whole = 4 * num_particles * num_positions * width
    from_others = (size - 1) / size
    for found in ranks.run(traffic, size, shape, scope):
        assert found["all_gather"] == [("all_gather", torch.float32, whole * from_others)] * 2
        trades = [entry for entry in found["coordinates"] if entry[0] == "all_to_all"]
        # Particles and scores in, directions out; each is a gather's bytes divided by the ranks.
        assert trades == [("all_to_all", torch.float32, whole * from_others / size)] * 3
        sums = [("all_reduce", torch.float64, 8 * num_particles**2)] if scope == "prompt" else []
        assert [entry for entry in found["coordinates"] if entry[0] != "all_to_all"] == sums
        assert found["all_gather, logged"] == []
        assert {kind for kind, _, _ in found["coordinates, logged"]} == {"all_reduce"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, exchange: str, method: dict[str, Any] | None = None, **distribution: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "source": {"steps": 20, "checkpoint_every": 5, "batch_size": 2, "log_every": 5},
        "target": {"batch_size": 4, "steps": 2},
        "data": {"target_tasks": ["mood"]},
        "distribution": {"exchange": exchange, **distribution},
    }
    options = {"name": "bpt", "num_particles": 4, "length": 5, **(method or {})}
    return tiny_run.load(folder, tiny_run.settings(world, options, output=str(folder / "runs"), **sections))


def received(world: World, config: RunConfig, t5: Path) -> list[tuple[str, int]]:
    """Bytes that each collective of a step brings to this rank from the others, of a sum those of a ring, as they are planned."""
    mesh, found = world.mesh(4, exchange=config.distribution.exchange), []
    method = methods.load(config, ShapeBackbone(shape_of(str(t5))))
    method.begin_source([], mesh)
    trade, add, axis = Mesh.start_all_to_all, Mesh.sum_over_particles_, mesh.particle

    def traded(*args: Any) -> Any:
        found.append(("all-to-all", 4 * (sum(args[2]) - args[2][axis.index])))
        return trade(*args)

    def added(*args: Any) -> Any:
        found.append(("all-reduce", 2 * args[1].nbytes * (axis.size - 1) // axis.size))
        return add(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mesh, "start_all_to_all", traded)
        patch.setattr(Mesh, "sum_over_particles_", added)
        method.begin_step(mesh)
        method.particles.grad = torch.ones_like(method.particles)
        method.precondition_(mesh)
    return found


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_the_plan_counts_what_a_step_sends(scope: str, world: Path, tmp_path: Path) -> None:
    config = configured(world, tmp_path, "coordinates", {"scope": scope})
    source = next(stage for stage in estimate(config, 4).stages if stage.name == "source")
    planned = {each.name.split(" ")[0]: (each.calls, each.bytes) for each in source.collectives}
    of_rank = [defaultdict(list) for _ in range(4)]
    for sums, found in zip(of_rank, ranks.run(received, 4, config, world / "t5"), strict=True):
        for name, size in found:
            sums[name].append(size)
    most = {name: (len(sizes), sum(sizes)) for name, sizes in max(of_rank, key=lambda sums: sum(sums["all-to-all"])).items()}
    assert most == {name: numbers for name, numbers in planned.items() if name in ("all-to-all", "all-reduce")}


# --- whole runs -----------------------------------------------------------------------------------------------------------------


def trained(world: World, configs: list[RunConfig]) -> None:
    for config in configs:
        tiny_run.trained(config, world)


def end_of(config: RunConfig) -> dict[str, Tensor]:
    newest = checkpoint.latest(config.directory / "source" / "checkpoints", fingerprint=fingerprint(config), warn=pytest.fail)
    assert newest is not None
    return checkpoint.load(newest)[0]


def logged(config: RunConfig) -> list[dict[str, Any]]:
    records = with_snapshots(repeatable(iter_records(config.directory / "metrics.jsonl")), config.directory)
    return [dict(record) for record in records if record["stage"] == "source"]


def assert_close(found: RunConfig, expected: RunConfig) -> None:
    """Particles, optimizer state and what was logged, to the 1e-5 that is promised for every layout."""
    tensors = end_of(found)
    for name, tensor in end_of(expected).items():
        assert (tensors[name].double() - tensor.double()).norm() <= 1e-5 * tensor.double().norm(), name
    for own, other in zip(logged(found), logged(expected), strict=True):
        assert own["step"] == other["step"]
        assert own["metrics"] == pytest.approx(other["metrics"], rel=1e-4, abs=1e-6)
        for part in ("projection", "kernel"):
            snapshots = (torch.as_tensor(np.asarray(record["particles"][part])) for record in (own, other))
            torch.testing.assert_close(*snapshots, rtol=1e-4, atol=1e-5)


METHODS: list[dict[str, Any]] = [
    {},
    {"scope": "token", "kernel": "imq", "bandwidth": 2.0},
    {"num_particles": 20, "form": "repulsive_ensemble"},
    {"num_particles": 6},
]


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_ends_with_the_same_particles_whatever_is_exchanged(size: int, world: Path, tmp_path: Path) -> None:
    runs = {
        (index, exchange): configured(world, tmp_path / f"{index}-{exchange}", exchange, method)
        for index, method in enumerate(METHODS)
        for exchange in ("all_gather", "coordinates")
    }
    ranks.run(trained, size, list(runs.values()))
    for index in range(len(METHODS)):
        assert_close(runs[index, "coordinates"], runs[index, "all_gather"])


def test_a_run_resumes_with_another_exchange_on_another_number_of_ranks(world: Path, tmp_path: Path) -> None:
    whole = configured(world, tmp_path / "whole", "all_gather")
    ranks.run(trained, 1, [whole])
    for exchange, size, step in (("coordinates", 4, 7), ("all_gather", 2, 12), ("coordinates", 2, 17)):
        config = configured(world, tmp_path / "moved", exchange)
        fault = f"step.after_update,step={step},stage=source,raise"
        assert set(ranks.launch(partial(run_all, config), size, BPT_FAULT=fault)) == {70}
    config = configured(world, tmp_path / "moved", "coordinates")
    assert ranks.launch(partial(run_all, config), 4) == [0] * 4
    assert_close(config, whole)


def test_the_same_layout_has_the_same_bits_on_repetition_and_resume(world: Path, tmp_path: Path) -> None:
    configs = [configured(world, tmp_path / name, "coordinates") for name in ("once", "again", "killed")]
    ranks.run(trained, 2, configs[:2])
    assert set(ranks.launch(partial(run_all, configs[2]), 2, BPT_FAULT="step.before_update,step=13,stage=source,raise")) == {70}
    assert ranks.launch(partial(run_all, configs[2]), 2) == [0, 0]
    for other in configs[1:]:
        tiny_run.assert_same(end_of(other), end_of(configs[0]))


# --- refusals -------------------------------------------------------------------------------------------------------------------


def test_positions_are_dealt_without_gaps() -> None:
    for num_positions, num_ranks in ((5, 2), (5, 4), (100, 7), (3, 3), (1, 1)):
        parts = slices(num_positions, num_ranks)
        assert [place for part in parts for place in range(num_positions)[part]] == list(range(num_positions))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= 1


def test_more_ranks_than_positions_are_refused_before_anything_is_trained(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(world, tmp_path, "coordinates", {"length": 3})
    assert ranks.launch(partial(run_all, config), 4) == [ConfigError.exit_code] * 4
    said = capfd.readouterr().err
    assert "distribution.exchange: coordinates gives each of 4 ranks a slice of 3 prompt position(s); use all_gather" in said
    assert not (config.directory / "source" / "checkpoints").exists()
    with pytest.raises(ConfigError, match="each of 4 ranks a slice of 3 prompt"):
        estimate(config, 4)
    estimate(config, 2)


@pytest.mark.parametrize(
    ("method", "distribution", "words"),
    [
        ({}, {"exact": True}, "distribution.exchange: coordinates adds up as many slices as there are ranks, .*use all_gather"),
        ({"length": 3}, {"mesh": {"particle": 4, "data": 1}}, r"each of 4 ranks a slice of 3 prompt position\(s\); use all_gather"),
        (
            {"name": "vanilla_transfer"},
            {},
            "distribution.exchange: has no effect with method vanilla_transfer, .*remove it",
        ),
    ],
)
def test_settings_that_exclude_one_another_are_refused(
    method: dict[str, Any], distribution: dict[str, Any], words: str, world: Path, tmp_path: Path
) -> None:
    plain = tiny_run.settings(world, {"name": "bpt", "num_particles": 4, **method} if not method.get("name") else method)
    plain["distribution"] = {"exchange": "coordinates", **distribution}
    with pytest.raises(ConfigError, match=words):
        tiny_run.load(tmp_path, plain)
