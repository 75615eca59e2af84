"""Predictions and metrics against one text at a time through the stock T5, and scikit-learn's measures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_run
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import T5ForConditionalGeneration

from bpt_dist.backbones import loading
from bpt_dist.config import EvaluationConfig
from bpt_dist.data.prepare import TaskData, prepare
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.methods.base import Method, load
from bpt_dist.training.evaluation import Evaluated, choose_particle, evaluate, pair_agreement

WORDS = {"truth": ("true", "false"), "mood": ("good", "not good"), "colour": ("red", "blue", "green")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Method, list[TaskData]]:
    """A method that trained nothing yet, with three adapted particles, and four tasks."""
    plain = tiny_run.settings(world, {"name": "bpt", "num_particles": 3, "spread": 1.0}, evaluation={"predict": "ensemble"})
    config = tiny_run.load(tmp_path_factory.mktemp("config"), plain)
    backbone = loading.load(str(world / "t5"))
    tasks = prepare(
        ["truth", "mood", "colour", "count"], config.data, backbone.tokenizer, splits=("train", "validation", "test"), seed=0
    )
    method = load(config, backbone)
    method.begin_source([], Mesh())
    method.begin_target(method.end_source(Mesh()), [task.spec for task in tasks], [32] * 4, Mesh())
    with torch.no_grad():
        method.v.add_(torch.randn(method.v.shape, generator=torch.Generator().manual_seed(1)))  # each target has its own prompt
    return method, tasks


def run(
    made: tuple[Method, list[TaskData]], index: int, predict: str = "map", heartbeat: Any = lambda place: None, **settings: Any
) -> Evaluated:
    return evaluate(made[0], made[1], index, "test", predict, EvaluationConfig(**settings), World(), heartbeat)


def probabilities(made: tuple[Method, list[TaskData]], index: int, hypotheses: Sequence[int]) -> numpy.ndarray:
    """The predictive distribution over label words, one text, one word and one prompt at a time."""
    method, task = made[0], made[1][index]
    model = T5ForConditionalGeneration.from_pretrained(method.backbone.path).eval()
    tokens, rows = task.splits["test"].tokens, []
    for source in tokens.source_ids:
        of_hypothesis = []
        for hypothesis in hypotheses:
            prompt = method.target_prompts()[hypothesis, index].detach()
            embeds = torch.cat([prompt, model.shared(torch.from_numpy(source).long())])[None]
            logs = []
            for word in tokens.label_ids:
                labels = torch.from_numpy(word).long()[None]
                logs.append(-float(model(inputs_embeds=embeds, labels=labels).loss) * labels.shape[1])
            weights = numpy.exp(numpy.array(logs) - max(logs))
            of_hypothesis.append(weights / weights.sum())
        rows.append(numpy.mean(of_hypothesis, axis=0))
    return numpy.array(rows)


@pytest.mark.parametrize("predict", ["map", "ensemble"])
@pytest.mark.parametrize("index", [0, 1, 2])
@torch.no_grad()
def test_closed_labels_are_ranked_by_the_predictive_distribution(
    made: tuple[Method, list[TaskData]], index: int, predict: str
) -> None:
    task, found = made[1][index], run(made, index, predict)
    words = WORDS[task.spec.name]
    expected = probabilities(made, index, range(1) if predict == "map" else range(1, 4))
    numpy.testing.assert_allclose([row["probabilities"] for row in found.predictions], expected, rtol=1e-4)
    assert [row["prediction"] for row in found.predictions] == [words[choice] for choice in expected.argmax(1)]
    right = [words.index(example.target) for example in task.splits["test"].examples]
    assert found.metrics["accuracy"] == pytest.approx(100 * accuracy_score(right, expected.argmax(1)))
    assert found.metrics["nll"] == pytest.approx(log_loss(right, expected, labels=range(len(words))), rel=1e-4)
    if "f1" in found.metrics:
        assert found.metrics["f1"] == pytest.approx(100 * f1_score(right, expected.argmax(1)), rel=1e-6)
    assert found.decode == "rank"


@pytest.mark.parametrize("index", [0, 1, 2])
@torch.no_grad()
def test_agreement_counts_the_pairs_of_hypotheses_with_the_same_label(made: tuple[Method, list[TaskData]], index: int) -> None:
    labels = numpy.stack([probabilities(made, index, [hypothesis]).argmax(1) for hypothesis in (1, 2, 3)])
    same = [[float(labels[a, row] == labels[b, row]) for a, b in ((0, 1), (0, 2), (1, 2))] for row in range(labels.shape[1])]
    found = run(made, index, "ensemble")
    assert [row["agreement"] for row in found.predictions] == pytest.approx([sum(row) / 3 for row in same])
    assert found.metrics["prediction_agreement"] == pytest.approx(100 * numpy.mean(same))
    alone = run(made, index, "map")
    assert "prediction_agreement" not in alone.metrics
    assert not any("agreement" in row for row in alone.predictions)


@pytest.mark.parametrize(("index", "decode"), [(0, "rank"), (2, "rank"), (1, "generate")])
@torch.no_grad()
def test_best_predicts_with_the_adapted_particle_that_scores_best_in_validation(
    made: tuple[Method, list[TaskData]], index: int, decode: str
) -> None:
    method, tasks = made
    settings, alone = EvaluationConfig(decode=decode), {}
    for particle in range(3):  # each as the only one: what an ensemble of equal prompts predicts
        kept = method.particles.clone(), method.u.clone(), method.v.clone()
        for tensor in (method.particles, method.u, method.v):
            tensor[1:] = tensor[1 + particle].clone()
        for split in ("validation", "test"):
            alone[particle, split] = evaluate(method, tasks, index, split, "ensemble", settings, World(), lambda place: None)
        for tensor, old in zip((method.particles, method.u, method.v), kept, strict=True):
            tensor.copy_(old)
    headline = tasks[index].spec.headline
    scores = [alone[particle, "validation"].metrics[headline] for particle in range(3)]
    chosen = choose_particle(method, tasks, index, settings, World(), lambda place: None)
    assert chosen == scores.index(max(scores))
    found = evaluate(method, tasks, index, "test", "best", settings, World(), lambda place: None)
    assert [row["prediction"] for row in found.predictions] == [row["prediction"] for row in alone[chosen, "test"].predictions]
    assert found.metrics[headline] == alone[chosen, "test"].metrics[headline]


def test_four_hypotheses_of_which_two_agree_share_one_pair_in_six() -> None:
    votes = torch.eye(3)[[0, 0, 1, 2]][:, None]
    assert pair_agreement(votes).tolist() == pytest.approx([1 / 6])
    assert pair_agreement(votes[:1].expand(4, 5, 3)).tolist() == [1.0] * 5


def test_predictions_come_in_the_order_of_the_rows_and_say_what_is_right(made: tuple[Method, list[TaskData]]) -> None:
    examples, found = made[1][2].splits["test"].examples, run(made, 2)
    assert [row["row_id"] for row in found.predictions] == [example.row_id for example in examples]
    assert [row["correct"] for row in found.predictions] == [row["prediction"] == row["target"] for row in found.predictions]
    share = sum(row["correct"] for row in found.predictions) / len(examples)
    assert found.metrics["accuracy"] == pytest.approx(100 * share)
    json.dumps(found.predictions, allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
@pytest.mark.parametrize("index", [1, 3])
def test_the_batch_size_changes_speed_only(made: tuple[Method, list[TaskData]], index: int, batch_size: int) -> None:
    expected, found = run(made, index), run(made, index, batch_size=batch_size)
    assert [row["prediction"] for row in found.predictions] == [row["prediction"] for row in expected.predictions]
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4)


def test_every_rank_makes_as_many_passes_and_takes_its_turn(
    made: tuple[Method, list[TaskData]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partitioned T5 is gathered in every pass: one rank with one pass fewer would leave the others waiting."""
    shares: dict[int, list[Any]] = {}
    monkeypatch.setattr(World, "gather_objects", lambda self, found: shares.setdefault(self.rank, found) and [*shares.values()])
    passes = []
    for rank in reversed(range(4)):
        beats: list[str] = []
        try:
            found = evaluate(made[0], made[1], 2, "test", "map", EvaluationConfig(batch_size=1), World(rank, 4), beats.append)
        except KeyError:
            assert rank > 0, "only the last one has all rows"
        passes.append(len(beats))
    assert passes == [2, 2, 2, 2]  # six rows on four ranks
    assert sorted(len(share) for share in shares.values()) == [1, 1, 2, 2]
    expected = run(made, 2)
    assert [row["prediction"] for row in found.predictions] == [row["prediction"] for row in expected.predictions]


def test_free_text_is_generated_as_the_stock_model_does(made: tuple[Method, list[TaskData]]) -> None:
    method, task, found = made[0], made[1][3], run(made, 3)
    model = T5ForConditionalGeneration.from_pretrained(method.backbone.path).eval()
    prompt = method.target_prompts()[0, 3].detach()
    for source, row in zip(task.splits["test"].tokens.source_ids, found.predictions, strict=True):
        embeds = torch.cat([prompt, model.shared(torch.from_numpy(source).long()).detach()])[None]
        tokens = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
        assert row["prediction"] == method.backbone.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert found.decode == "generate"
    assert "nll" not in found.metrics


@torch.no_grad()
@pytest.mark.parametrize("index", [3, 1])
def test_an_ensemble_generates_from_the_mean_of_the_next_token_distributions(
    made: tuple[Method, list[TaskData]], index: int
) -> None:
    method, task = made[0], made[1][index]
    found = run(made, index, "ensemble", decode="generate", batch_size=4)
    alone = run(made, index, "map", decode="generate", batch_size=4)
    model = T5ForConditionalGeneration.from_pretrained(method.backbone.path).eval()
    prompts, limit = method.target_prompts()[1:, index].detach(), {3: 4, 1: 3}[index]
    expected = []
    for source in task.splits["test"].tokens.source_ids:
        tokens = [0]
        while len(tokens) <= limit and tokens[-1] != 1:
            embeds = [torch.cat([prompt, model.shared(torch.from_numpy(source).long())])[None] for prompt in prompts]
            logits = [model(inputs_embeds=one, decoder_input_ids=torch.tensor([tokens])).logits[0, -1] for one in embeds]
            tokens.append(int(torch.stack(logits).double().softmax(-1).mean(0).argmax()))
        expected.append(method.backbone.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    assert [row["prediction"] for row in found.predictions] == expected
    assert [row["prediction"] for row in alone.predictions] != expected


def test_how_a_task_is_decoded(made: tuple[Method, list[TaskData]]) -> None:
    closed, free = made[1][0], made[1][3]
    assert closed.spec.decoding("fixed") == "rank"
    assert closed.spec.decoding("fixed", "generate") == "generate"
    assert free.spec.decoding("fixed") == free.spec.decoding("fixed", "rank") == "generate"
    assert closed.spec.decoding("attempt") == "generate"


def test_generation_is_bounded_by_the_longest_label_or_the_setting(made: tuple[Method, list[TaskData]]) -> None:
    limits, method = [], made[0]
    original = method.generate
    method.generate = lambda batch, limit, predict: limits.append(limit) or original(batch, limit)  # type: ignore[method-assign]
    try:
        run(made, 1, decode="generate", batch_size=10)
        run(made, 3, batch_size=10)
        run(made, 3, batch_size=10, max_new_tokens=2)
    finally:
        del method.generate
    assert limits == [3, 4, 2]  # `not good </s>`, the task's max_target_length, the setting


def test_a_certain_mistake_has_a_finite_loss(made: tuple[Method, list[TaskData]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probability can round to 0, and JSON has no infinity."""
    method = made[0]
    certain = torch.tensor([[[0.0, -1e6, -1e6]]])
    monkeypatch.setattr(type(method), "rank", lambda self, batch, candidates, predict: certain.expand(1, len(batch), -1))
    found = run(made, 2)
    assert math.isfinite(found.metrics["nll"])
    assert found.metrics["nll"] > 400  # two thirds of -log(smallest double), 708 nats
