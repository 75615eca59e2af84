"""BPT as it is trained: gradients of whole objectives in float64, and the checks that would expose a wrong BPT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_run
import torch
from records import repeatable
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from bpt_dist import train
from bpt_dist.config import RunConfig
from bpt_dist.storage.checkpoint import latest, load, read_tensors
from bpt_dist.storage.metrics_log import iter_records
from bpt_dist.training.stage import TrainingStage


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(world: Path, folder: Path, method: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return tiny_run.load(
        folder, tiny_run.settings(world, {"name": "bpt", **(method or {})}, output=str(folder / "runs"), **sections)
    )


# --- gradients of whole objectives against float64 -----------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    """T5's normalisation; transformers computes it in float32 even for a float64 model, too coarse for finite differences."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


class Loop:
    """An independent objective: the stock T5 in float64, one unpadded text and one particle at a time."""

    def __init__(self, stage: TrainingStage, reduction: str) -> None:
        self.model = (
            T5ForConditionalGeneration.from_pretrained(stage.method.backbone.path, dtype=torch.float64).eval().requires_grad_(False)
        )
        for block in self.model.modules():
            for name, module in block.named_children():
                if isinstance(module, T5LayerNorm):
                    setattr(block, name, RootMeanSquare(module.weight, module.variance_epsilon))
        self.rows = {
            f"{task.name}/{row}": (torch.from_numpy(source).long(), torch.from_numpy(target).long())
            for task in stage.batches.datasets
            for row, source, target in zip(task.row_ids, task.source_ids, task.target_ids, strict=True)
        }
        self.reduction = reduction

    def log_likelihood(self, prompt: Tensor, row: str) -> Tensor:
        source, target = self.rows[row]
        embeds = torch.cat([prompt, self.model.shared(source)])[None]
        start = torch.cat([torch.zeros(1, dtype=torch.long), target[:-1]])[None]
        logs = self.model(inputs_embeds=embeds, decoder_input_ids=start).logits[0].log_softmax(-1)
        total = sum(logs[place, label] for place, label in enumerate(target))
        return total / (len(target) if self.reduction == "token_mean" else 1)


def rows_of_step(stage: TrainingStage, step: int, particle: int | None = None) -> dict[str, list[str]]:
    """The rows a step reads, by task: which ones is the business of test_batches."""
    found: dict[str, list[str]] = {}
    for row in stage.batches.at(step, particle=particle).row_ids:
        found.setdefault(row.split("/")[0], []).append(row)
    return found


def assert_is_gradient(found: Tensor, objective: Any, at: Tensor) -> None:
    """Compare with autograd of `objective` at `at` in float64, itself checked by finite differences in random directions."""
    theta = at.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(objective(theta), theta)
    with torch.no_grad():
        for seed in range(2):
            direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            difference = (objective(theta + 1e-5 * direction) - objective(theta - 1e-5 * direction)) / 2e-5
            # ReLU has kinks and the attention's softmax is float32: this only guards against a wrong graph.
            assert float(difference) == pytest.approx(float((exact * direction).sum()), abs=1e-3 * float(exact.norm()))
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-5


SOURCES = {
    "plain": ({}, {}),
    "weighted and scaled": ({}, {"task_weights": {"truth": 3.0}, "likelihood_scale": 0.5}),
    "whole posterior, summed over tokens": ({"reduction": "token_sum"}, {"likelihood_scale": "dataset"}),
    "one task of three a step": ({}, {"tasks_per_step": 1, "task_weights": {"colour": 2.0}}),
    "annealed": ({}, {"annealing": "linear", "annealing_steps": 4}),
    "own texts for each particle": ({}, {"shared_texts": False}),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_gradient_of_the_source_objective(case: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, source = SOURCES[case]
    data = {"source_tasks": ["colour", "truth", "mood"], "max_train_rows": 20}
    config, step = configured(world, tmp_path, data=data, source=source, **top), 1
    with tiny_run.stage_of(monkeypatch, config) as stage:
        stage.step = step
        train.accumulate_gradients(stage)
        loop, (particles,) = Loop(stage, config.reduction), stage.method.parameters()
        scale = {"dataset": 20.0}.get(str(config.source.likelihood_scale), config.source.likelihood_scale)
        gamma = step / 4 if config.source.annealing == "linear" else 1.0
        shared = config.source.shared_texts
        rows = [rows_of_step(stage, step, None if shared else m) for m in range(2)]
        assert shared == (rows[0] == rows[1])
        kappa = config.source.tasks_per_step or 3
        assert len(rows[0]) == kappa

        def objective(theta: Tensor) -> Tensor:
            """Minus gamma c K/kappa sum_k w_k 1/B sum_b l, summed over particles: each of them sees its own part only."""
            total = torch.zeros((), dtype=torch.float64)
            for m, of_task in enumerate(rows):
                for task, picked in of_task.items():
                    weight = (config.source.task_weights or {}).get(task, 1.0) * gamma * scale * 3 / kappa
                    total = total - weight * sum(loop.log_likelihood(theta[m], row) for row in picked) / len(picked)
            return total

        assert_is_gradient(particles.grad, objective, particles)


TARGETS = {
    "gaussian": {"sigma": 0.4},
    "gaussian, relative": {"sigma_relative": 0.5, "rank": 2},
    "mixture": {"sigma": 0.7, "prior": "mixture", "spread": 0.3},
    "no prior, no factors": {"prior": "none", "rank": 0},
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("case", TARGETS)
def test_the_gradient_of_the_target_objective(
    case: str, joint: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, TARGETS[case], target={"joint": joint}, data={"max_train_rows": 20})
    with tiny_run.stage_of(monkeypatch, config, number=1) as stage:
        parameters = dict(stage.method.named_parameters())
        with torch.no_grad():  # away from the start, where the penalty and half of the factors' gradients are zero
            for seed, parameter in enumerate(parameters.values()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        train.accumulate_gradients(stage)
        loop, rows = Loop(stage, config.reduction), rows_of_step(stage, 0)
        source, _ = read_tensors(stage.directory.path("source", "posterior") / "posterior.safetensors")
        mean, cloud = source["mean"].double(), source["particles"].double()
        sigma = config.method.sigma or (config.method.sigma_relative or 0) * float(mean.square().mean().sqrt())

        def prompt(values: dict[str, Tensor], k: int) -> Tensor:
            full = values["particles"][0]
            if config.method.rank == 0:
                return full
            return full * sum(torch.outer(values["u"][0, k, r], values["v"][0, k, r]) for r in range(config.method.rank))

        def objective(**values: Tensor) -> Tensor:
            """J/|D| as objective.py has it: batch mean of -l, and the prior divided by |D|; joint targets are averaged."""
            total = torch.zeros((), dtype=torch.float64)
            for k, (_, picked) in enumerate(rows.items()):
                theta = prompt(values, k)
                total = total - sum(loop.log_likelihood(theta, row) for row in picked) / len(picked)
                if config.method.prior == "gaussian":
                    total = total + ((theta - mean) ** 2).sum() / (2 * sigma**2) / 20
                if config.method.prior == "mixture":
                    densities = [torch.exp(-((theta - each) ** 2).sum() / (2 * sigma**2)) for each in cloud]
                    total = total - torch.log(sum(densities) / len(densities)) / 20
            return total / len(rows)

        assert len(rows) == (2 if joint else 1)
        fixed = {name: parameter.detach().double() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            assert_is_gradient(parameter.grad, lambda value, name=name: objective(**{**fixed, name: value}), parameter)


SAMPLINGS = [("all", None), ("proportional", None), ("proportional", 12), ("temperature", None), ("stochastic", None)]


@pytest.mark.parametrize(("sampling", "cap"), SAMPLINGS)
def test_joint_targets_have_the_prior_of_their_share_of_the_texts(
    sampling: str, cap: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever draws the texts, likelihood and prior of a target weigh alike: its objective is J_k/|D_k| times one number."""
    world = tiny_run.world(tmp_path)
    file = world / "tasks" / "mood" / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))  # beside 32 rows of the other target
    joint = {"joint": True, "sampling": sampling, **({"sampling_cap": cap} if cap else {})}
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path, {"sigma": 0.5}, target=joint), number=1) as stage:
        likelihood = torch.zeros(2, dtype=torch.float64)
        for step in range(2000):
            batch = stage.batches.at(step)
            likelihood += torch.bincount(batch.task_index, batch.weight.double(), minlength=2) / 2000
        method, prior = stage.method, []
        for k, num_examples in enumerate((4, 32)):
            with torch.no_grad():  # only target k is away from the mean
                method.u.fill_(1)
                method.u[:, k] = 2
                theta, mean = method.target_prompts()[0, k].double(), method.starts[0].double()
                prior.append(float(method.penalty()) / float((theta - mean).square().sum() / (2 * 0.5**2) / num_examples))
    assert prior == pytest.approx(likelihood.tolist(), abs=0.03)
    assert sum(prior) == pytest.approx(1)


def test_the_gradient_reaches_only_particles_own_score(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own loss averages over the M x N sequences of a pass; a score must not shrink as M grows."""
    found = {}
    for num_particles in (2, 4):
        config = configured(world, tmp_path, {"num_particles": num_particles, "spread": 0.0}, name=f"m{num_particles}")
        with tiny_run.stage_of(monkeypatch, config) as stage:
            train.accumulate_gradients(stage)
            (found[num_particles],) = [parameter.grad for parameter in stage.method.parameters()]
    for gradient in (*found[2], *found[4]):
        torch.testing.assert_close(gradient, found[2][0], rtol=1e-4, atol=1e-6)


# --- the checks that would expose a wrong BPT ------------------------------------------------------------------------------


def bits(run: Path) -> dict[str, Any]:
    """Everything a run leaves, but for what names the method and where the run is."""
    results = [
        {key: value for key, value in entry.items() if key not in ("method", "run")}
        for entry in json.loads((run / "results.json").read_text())
    ]
    metrics = [
        (
            record["stage"],
            record["step"],
            {name: value for name, value in record["metrics"].items() if not name.startswith("svgd/")},
        )
        for record in repeatable(iter_records(run / "metrics.jsonl"))
    ]
    files = sorted([*run.rglob("*.safetensors"), *run.rglob("predictions*.jsonl")])
    return {"results": results, "metrics": metrics} | {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_one_particle_without_prior_and_factors_is_vanilla_transfer_bit_for_bit(world: Path, tmp_path: Path) -> None:
    bpt = {"num_particles": 1, "prior": "none", "rank": 0, "lr_full": 0.2}
    clipped = {"clip": 0.1, "weight_decay": 1e-5, "warmup": 0.5}
    ours = tiny_run.trained(configured(world, tmp_path, bpt, name="ours", source=clipped, target=clipped))
    vanilla = {"name": "vanilla_transfer"}
    theirs = tiny_run.trained(configured(world, tmp_path, vanilla, name="theirs", source=clipped, target={**clipped, "lr": 0.2}))
    found, expected = bits(ours), bits(theirs)
    assert sum(name.endswith(".safetensors") for name in expected) == 9  # posterior, six checkpoints, two adapters
    assert found == expected


def particles_of(run: Path, step: int) -> Tensor:
    folder = run / "source" / "checkpoints" / f"step-{step:08d}"
    return read_tensors(folder / "state.safetensors")[0]["trained/particles/value"]


def test_identical_particles_stay_identical(world: Path, tmp_path: Path) -> None:
    source = {"steps": 4, "clip": 1.0}
    run = tiny_run.trained(
        configured(world, tmp_path, {"num_particles": 3, "spread": 0.0}, source=source, target={"steps": 1, "eval_every": 1})
    )
    particles = particles_of(run, 4)
    assert torch.equal(particles[1], particles[0])
    assert torch.equal(particles[2], particles[0])
    records = list(iter_records(run / "metrics.jsonl"))
    for record in records[:4]:
        assert record["metrics"]["svgd/distance_max"] == record["metrics"]["svgd/repulsive_norm"] == 0.0
        assert record["metrics"]["svgd/spread"] < 1e-6  # a mean of three equal float32 numbers is rounded


@pytest.mark.parametrize("form", ["svgd", "repulsive_ensemble"])
def test_permuted_particles_take_permuted_paths(form: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, ends = torch.tensor([2, 0, 1]), {}
    for name, permuted in (("straight", False), ("permuted", True)):
        config = configured(world, tmp_path, {"num_particles": 3, "spread": 0.3, "form": form}, name=name, source={"clip": 1.0})
        with tiny_run.stage_of(monkeypatch, config) as stage:
            particles = next(iter(stage.method.parameters()))
            if permuted:
                with torch.no_grad():
                    particles.copy_(particles[order])
            train.run_stage(stage)
            ends[name] = particles.detach().clone()
    moved = float((ends["straight"] - ends["straight"].mean(0)).norm())
    assert moved > 0.1
    # The rows of phi are summed in the order of the particles: equal but for rounding.
    torch.testing.assert_close(ends["permuted"], ends["straight"][order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "scope"), [("rbf", "prompt"), ("imq", "prompt"), ("rbf", "token")])
def test_logged_diagnostics_are_those_of_the_checkpointed_particles(kernel: str, scope: str, world: Path, tmp_path: Path) -> None:
    options = {"num_particles": 4, "spread": 0.2, "kernel": kernel, "scope": scope}
    run = tiny_run.trained(
        configured(world, tmp_path, options, source={"steps": 4, "checkpoint_every": 1}, target={"steps": 1, "eval_every": 1})
    )
    records = list(iter_records(run / "metrics.jsonl"))
    (logged,) = [record["metrics"] for record in records if record["stage"] == "source" and record["step"] == 4]
    cloud = particles_of(run, 3).double().numpy()  # step 4 logs what it started from
    pairs = [(i, j) for i in range(4) for j in range(i)]
    positions = [slice(None)] if scope == "prompt" else [slice(p, p + 1) for p in range(3)]
    widths, weights = [], []
    for place in positions:
        squared = [float(((cloud[i, place] - cloud[j, place]) ** 2).sum()) for i, j in pairs]
        widths.append(float(numpy.median(squared)) / math.log(5))
        weights += [math.exp(-d / widths[-1]) if kernel == "rbf" else (1 + d / widths[-1]) ** -0.5 for d in squared]
    distances = [math.dist(cloud[i].ravel(), cloud[j].ravel()) for i, j in pairs]
    mean = cloud.mean(0)
    expected = {
        "bandwidth": numpy.mean(widths),
        "kernel_off_diagonal": numpy.mean(weights),
        "distance_min": min(distances),
        "distance_median": numpy.median(distances),
        "distance_max": max(distances),
        "spread": ((cloud - mean) ** 2).mean() ** 0.5,
        "norm_of_mean": numpy.linalg.norm(mean),
        "mean_norm": numpy.mean([numpy.linalg.norm(particle) for particle in cloud]),
    }
    assert {name: logged[f"svgd/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert {"svgd/driving_norm", "svgd/repulsive_norm"} <= logged.keys()
    assert logged["svgd/repulsive_norm"] > 0


def test_logged_losses_are_means_over_texts_and_particles(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(world, tmp_path, source={"task_weights": {"truth": 5.0}})
    with tiny_run.stage_of(monkeypatch, config) as stage:
        loop, particles = Loop(stage, config.reduction), next(iter(stage.method.parameters())).detach().double()
        expected = {
            task: -float(numpy.mean([float(loop.log_likelihood(each, row)) for each in particles for row in rows]))
            for task, rows in rows_of_step(stage, 0).items()
        }
        losses = train.accumulate_gradients(stage)
        losses.read()
        found = dict(zip(stage.task_names, [s / c for s, c in zip(losses.sums, losses.counts, strict=True)], strict=True))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_posterior_is_the_last_particles_and_their_mean(world: Path, tmp_path: Path) -> None:
    run = tiny_run.trained(configured(world, tmp_path, {"num_particles": 3}, target={"steps": 1, "eval_every": 1}))
    stored, _ = read_tensors(run / "source" / "posterior" / "posterior.safetensors")
    assert torch.equal(stored["particles"], particles_of(run, 4))
    torch.testing.assert_close(stored["mean"].double(), particles_of(run, 4).double().mean(0), rtol=1e-6, atol=1e-7)


# --- the target stage ------------------------------------------------------------------------------------------------------


def test_a_target_starts_at_the_mean_and_own_rates_move_its_parts(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, {"lr_full": 0.25, "lr_low_rank": 0.5}, target={"schedule": "constant"})
    with tiny_run.stage_of(monkeypatch, config, number=1) as stage:
        source, _ = read_tensors(stage.directory.path("source", "posterior") / "posterior.safetensors")
        assert torch.equal(stage.method.prompts()["mood"], source["mean"])
        assert stage.method.penalty().item() == 0.0
        before = stage.method.snapshot()
        train.accumulate_gradients(stage)
        stage.optimizer.step(0)
        moved = {
            name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in stage.method.named_parameters()
        }
    # The first step of Adam moves every coordinate by the learning rate.
    assert moved == pytest.approx({"particles": 0.25, "u": 0.5, "v": 0.5}, rel=1e-3)


def test_particles_that_share_no_kernel_are_vanilla_prompts(world: Path, tmp_path: Path) -> None:
    """The row `independent` of configs/evidence/equal_compute.yaml: each particle follows its own score alone."""
    apart = {"particle_init": "independent", "form": "repulsive_ensemble", "bandwidth": 1e-9, "prior": "none", "rank": 0}
    clipped = {"clip": 0.05, "warmup": 0.25, "weight_decay": 0.01}
    bpt = tiny_run.settings(world, {"name": "bpt", **apart}, output=str(tmp_path / "bpt"), source=clipped)
    vanilla = tiny_run.settings(world, {"name": "vanilla_transfer"}, output=str(tmp_path / "vanilla"), source=clipped)
    found = []
    for folder, plain in ((tmp_path / "bpt", bpt), (tmp_path / "vanilla", vanilla)):
        folder.mkdir()
        run = tiny_run.trained(tiny_run.load(folder, plain))
        found.append(read_tensors(run / "source" / "posterior" / "posterior.safetensors")[0])
    particles, prompt = found[0]["particles"], found[1]["mean"]
    assert torch.allclose(particles[0], prompt, atol=1e-6)
    assert (particles[1] - prompt).abs().max() > 0.1


@pytest.mark.parametrize(("num_samples", "ensemble"), [(None, 2), (3, 1)], ids=["adapted", "sampled"])
def test_each_prediction_counts_the_numbers_it_uses(world: Path, tmp_path: Path, num_samples: int | None, ensemble: int) -> None:
    """Two particles are adapted beside the MAP prompt; samples around it are not trained."""
    config = configured(world, tmp_path, evaluation={"predict": "ensemble", "num_samples": num_samples})
    entries = json.loads((tiny_run.trained(config) / "results.json").read_text())
    counts = {entry["predict"]: entry["trainable_parameters"] for entry in entries}
    one = 3 * 32 + 3 + 32
    assert counts == {"map": one, "ensemble": ensemble * one}


def test_joint_targets_share_the_full_matrix_and_own_their_factors(world: Path, tmp_path: Path) -> None:
    run = tiny_run.trained(configured(world, tmp_path, target={"joint": True}))
    entries = json.loads((run / "results.json").read_text())
    assert {entry["task"] for entry in entries} == {"mood", "count"}
    assert {entry["trainable_parameters"] for entry in entries} == {(3 * 32 + 2 * (3 + 32)) // 2}
    found = latest(run / "target" / "joint" / "checkpoints", fingerprint=None, warn=print)
    assert found is not None
    state, _ = load(found)
    best = {name.removeprefix("best/"): tensor for name, tensor in state.items() if name.startswith("best/")}
    for k, task in enumerate(("mood", "count")):
        exported, _ = read_tensors(run / "target" / task / "adapter" / "adapter_model.safetensors")
        expected = best["particles"][0] * torch.outer(best["u"][0, k, 0], best["v"][0, k, 0])
        torch.testing.assert_close(exported["prompt_embeddings"], expected)


def test_an_ensemble_adapts_every_particle_towards_its_own_start(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(world, tmp_path, {"sigma": 1.0, "num_particles": 3}, evaluation={"predict": "ensemble"})
    with tiny_run.stage_of(monkeypatch, config, number=1) as stage:
        method = stage.method
        source, _ = read_tensors(stage.directory.path("source", "posterior") / "posterior.safetensors")
        starts = torch.cat([source["mean"][None], source["particles"]])
        assert isinstance(method.particles, nn.Parameter)
        assert torch.equal(method.particles.detach(), starts)
        assert method.penalty().item() == 0.0
        batch = stage.batches.at(0)
        embeds = method.backbone.model.shared(batch.source_ids)
        assert torch.equal(method.prediction_inputs(embeds, batch, "map")[:, 0, :3], starts[:1])
        assert torch.equal(method.prediction_inputs(embeds, batch, "ensemble")[:, 0, :3], starts[1:])


def test_samples_of_the_ensemble_have_the_covariance_of_the_particles(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"predict": "ensemble", "num_samples": 4000}
    config = configured(world, tmp_path, {"num_particles": 4, "spread": 0.5}, evaluation=evaluation)
    with tiny_run.stage_of(monkeypatch, config, number=1) as stage:
        method, batch = stage.method, stage.batches.at(0).select([0])
        source, _ = read_tensors(stage.directory.path("source", "posterior") / "posterior.safetensors")
        embeds = method.backbone.model.shared(batch.source_ids)
        samples = method.prediction_inputs(embeds, batch, "ensemble")[:, 0, :3].detach().flatten(1)
    axes = torch.randn(96, 5, generator=torch.Generator().manual_seed(0))  # the law is checked along five random directions
    expected = numpy.cov((source["particles"].flatten(1) @ axes).T.numpy())
    found = numpy.cov((samples @ axes).T.numpy())
    numpy.testing.assert_allclose(found, expected, rtol=0.15, atol=0.1 * abs(expected).max())
    numpy.testing.assert_allclose(samples.mean(0), source["mean"].flatten(), atol=5 * float(samples.std(0).max()) / 4000**0.5)


# --- what a pass builds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "sections"),
    [(0, {"source": {"pass_size": 6}}), (0, {"source": {"shared_texts": False}}), (0, {"distribution": {"exact": True}}),
     (1, {"target": {"pass_size": 4}})],
)  # fmt: skip
def test_a_pass_builds_the_inputs_of_its_particles_only(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, sections: dict[str, Any]
) -> None:
    """Inputs of all particles of a rank in every pass made the work of a step the square of their number."""
    sections = {"evaluation": {"predict": "ensemble"}, **sections}
    config = configured(world, tmp_path, {"num_particles": 12}, **sections)
    with tiny_run.stage_of(monkeypatch, config, stage) as found:
        built: list[int] = []
        method, prepared = found.method, found.method.input_embeds
        monkeypatch.setattr(method, "input_embeds", lambda *args: [built.append(len(it := prepared(*args))), it][1])
        read = [len(range(*unit.particles.indices(found.num_particles))) for unit in found.work(0)]
        train.accumulate_gradients(found)
        assert built == read
        assert max(built) < 12


def test_a_prediction_of_the_map_prompt_builds_no_particle(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(world, tmp_path, {"num_particles": 4}, evaluation={"predict": "ensemble"})
    with tiny_run.stage_of(monkeypatch, config, 1) as found:
        method, made = found.method, []
        monkeypatch.setattr(
            method, "target_prompts", lambda rows, make=method.target_prompts: [made.append(len(it := make(rows))), it][1]
        )
        for predict in ("map", "ensemble"):
            method.rank(found.batches.at(0), torch.tensor([[5, 1]]), predict)
        assert made == [1, 4]
