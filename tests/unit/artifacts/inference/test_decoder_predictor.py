"""Answers of the Predictor on decoder-only models: those of the run, whatever prompts share a batch; what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import exported
import pytest
import served
import tiny_decoder
import tiny_run
import torch

from bpt_dist.artifacts.inference.backbone import load_backbone
from bpt_dist.artifacts.inference.exports import Export, read_exports
from bpt_dist.artifacts.inference.predictor import Predictor, Question
from bpt_dist.artifacts.peft_export import CardFacts, export_prompt
from bpt_dist.backbones.candidates import Tree
from bpt_dist.commands.main import main
from bpt_dist.commands.serve.app import Service
from bpt_dist.errors import ConfigError

TASKS = ("mood", "count", "colour", "truth")
Trained = tuple[Path, Path]  # the world, and a run in it


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """BPT with its ensemble: a free-text task, and three whose label words are ranked."""
    world = tiny_decoder.world(tmp_path_factory.mktemp("world"), request.param)
    sections: dict[str, Any] = {"data": {"target_tasks": list(TASKS)}, "evaluation": {"predict": "ensemble"}}
    return world, tiny_run.trained(tiny_run.load(world, tiny_decoder.settings(world, {"name": "bpt"}, **sections)))


def answers(predictor: Predictor, rows: list[Any]) -> list[dict[str, Any]]:
    return [answer.as_json() for answer in predictor.predict(rows)]


@pytest.mark.parametrize("predict", ["map", "ensemble"])
def test_answers_are_the_predictions_of_the_run(trained: Trained, predict: str) -> None:
    world, run = trained
    found = read_exports(run, ensemble=predict == "ensemble")
    own = Predictor(load_backbone(found[0], device="cpu"), found)
    mixed = [row for rows in zip(*(exported.rows(world, task) for task in TASKS), strict=True) for row in rows]
    given = answers(own, mixed)
    for task in TASKS:
        exported.assert_equal([one for one in given if one["task"] == task], exported.predictions(run, task, predict))


def test_the_command_answers_as_the_run_predicted(trained: Trained, tmp_path: Path) -> None:
    world, run = trained
    rows, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in exported.rows(world, "mood")))
    assert main(["predict", str(run), "--rows", str(rows), "--out", str(out)]) == 0
    exported.assert_equal([json.loads(line) for line in out.read_text().splitlines()], exported.predictions(run, "mood"))


def prompts_of_several_lengths(trained: Trained, folder: Path) -> list[Export]:
    """Export random prompts, two of one length, for the tasks of a run: far from each other, so that a mix-up shows."""
    world, run = trained
    card = CardFacts(title="t", method="m", backbone_hash="", tokenizer_hash="", protocol="fixed")
    facts = {"d_model": 32, "num_layers": 3, "num_heads": 4, "task_type": "CAUSAL_LM"}
    made = []
    for number, (task, length) in enumerate(zip((*TASKS, "mood"), (7, 1, 7, 4, 7), strict=True)):
        record = read_exports(run / "target" / task / "adapter")[0].record
        prompt = 2 * torch.randn(length, 32, generator=torch.Generator().manual_seed(number))
        place = export_prompt(
            prompt, folder / str(number), base_model=str(world / "decoder"), revision=None, config_facts=facts, card=card,
            record=record,
        )  # fmt: skip
        made += read_exports(place, "other mood" if number == len(TASKS) else None)
    return made


@pytest.mark.parametrize("stock", [False, True], ids=["packed", "stock"])
def test_a_mixed_batch_is_answered_as_each_task_alone(trained: Trained, tmp_path: Path, stock: bool) -> None:
    world, run = trained
    exports = prompts_of_several_lengths(trained, tmp_path)
    exports += [dataclasses.replace(export, name=f"all of {export.name}") for export in read_exports(run, ensemble=True)]
    backbone = load_backbone(exports[0], device="cpu")
    if stock:
        backbone.use_stock_pass()
    rows = [{**row, "task": export.name} for export in exports for row in exported.rows(world, export.task.name)]
    rows = rows[::2] + rows[1::2]
    together = Predictor(backbone, exports).predict(rows)
    backbone.use_stock_pass()  # one row a pass, by transformers' modules
    for export in exports:
        alone = Predictor(backbone, [export], tokens_at_once=1)
        places = [place for place, row in enumerate(rows) if row["task"] == export.name]
        expected = alone.predict([rows[place] for place in places])
        exported.assert_equal([together[place].as_json() for place in places], [answer.as_json() for answer in expected])
    kinds = {tuple((answer.probabilities or {}).values()) for answer in together}
    assert len(kinds) > len(exports), "prompts and rows must matter, else the test shows nothing"


def test_texts_of_all_prompts_and_label_words_share_a_pass_and_each_prompt_is_read_once_for_all_passes(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, _ = trained
    ranked = [export for export in prompts_of_several_lengths(trained, tmp_path) if export.task.decode == "rank"]
    lists = {tuple(export.task.label_words) for export in ranked}
    backbone = load_backbone(ranked[0], device="cpu")
    predictor = Predictor(backbone, ranked)
    passes: list[int] = []
    forward = backbone.model.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(backbone.model.model, "forward", counted)
    rows = [{**row, "task": export.name} for export in ranked for row in exported.rows(world, export.task.name)[:3]]
    questions = [one for one in predictor._read(rows, predictor._prompts) if isinstance(one, Question)]
    for _ in range(2):
        assert all(answer.error is None for answer in predictor.predict(rows))
    assert len(lists) > 1, "lengths of prompts and label words differ, and the texts share one pass"
    of_prompts = sum(prompt.hypotheses.shape[1] for prompt in predictor._prompts.values())
    of_texts = sum(len(one.ids) for one in questions)
    of_words = sum(len(Tree.of(one.prompt.candidates.tolist(), 0).tokens) - 1 for one in questions)  # type: ignore[union-attr]
    assert passes == [of_prompts, of_texts + of_words, of_texts + of_words], "each prompt once, and no padding"
    passes.clear()
    Predictor(backbone, ranked, prefix_bytes=0).predict(rows)
    assert passes == [of_prompts + of_texts + of_words]


def test_the_server_counts_the_prompts_it_did_not_read_again(mood: tuple[Predictor, Export], trained: Trained) -> None:
    predictor, _ = mood
    rows = exported.rows(trained[0], "mood")[:3]
    with served.in_thread(Service(predictor)) as client:
        for _ in range(4):
            exported.assert_equal(client.predict(rows).value, exported.predictions(trained[1], "mood")[:3])
        assert client.metric('bpt_prompts_total{prefix="read"}') == 1
        assert client.metric('bpt_prompts_total{prefix="kept"}') == 3
        assert client.metric("bpt_prefix_bytes") == predictor.backbone.prefixes.bytes > 0  # type: ignore[union-attr]


def test_a_text_stops_at_the_limit_of_its_own_task(trained: Trained) -> None:
    (export,) = read_exports(trained[1] / "target" / "count" / "adapter")
    backbone = load_backbone(export, device="cpu")
    free = export.task.model_copy(update={"decode": "generate"})
    many = [
        dataclasses.replace(export, name=str(limit), task=free.model_copy(update={"max_new_tokens": limit})) for limit in (1, 2, 5)
    ]
    rows = [{**row, "task": one.name} for row in exported.rows(trained[0], "count")[:4] for one in many]
    together = Predictor(backbone, many).predict(rows)
    backbone.use_stock_pass()
    alone = Predictor(backbone, many, tokens_at_once=1).predict(rows)
    assert [answer.prediction for answer in together] == [answer.prediction for answer in alone]
    assert len({answer.prediction for answer in together}) > 2


@pytest.fixture
def mood(trained: Trained) -> tuple[Predictor, Export]:
    (export,) = read_exports(trained[1] / "target" / "mood" / "adapter")
    return Predictor(load_backbone(export, device="cpu"), [export]), export


def test_a_text_is_cut_at_its_end_without_an_end_token(mood: tuple[Predictor, Export]) -> None:
    predictor, export = mood
    text = "the cat sat on the mat"
    long, short = ({"sentence": words} for words in (text, "the cat"))
    (whole,) = predictor.predict([short])
    tokenizer, start = predictor.backbone.tokenizer, predictor.backbone.text_form.start
    num_kept = len(tokenizer("mood sentence: the cat", add_special_tokens=False).input_ids) + (start is not None)
    task = export.task.model_copy(update={"max_source_length": num_kept})
    (cut,) = Predictor(predictor.backbone, [dataclasses.replace(export, task=task)]).predict([long])
    assert cut.kept_tokens == num_kept
    assert cut.num_tokens is not None
    assert cut.num_tokens > num_kept
    assert cut.probabilities == pytest.approx(whole.probabilities, abs=1e-6)


def test_a_text_beyond_the_positions_is_named_and_no_other_row_is_lost(mood: tuple[Predictor, Export]) -> None:
    predictor, export = mood
    task = export.task.model_copy(update={"max_source_length": 1000})
    given = [{"sentence": "the cat"}, {"sentence": "the cat " * 300}, {"sentence": "the dog"}]
    first, long, last = Predictor(predictor.backbone, [dataclasses.replace(export, task=task)]).predict(given)
    assert first.error is last.error is None
    assert long.kind == "fields"
    assert "which with 3 prompt positions and" in str(long.error)
    assert "more than the 256 positions of the backbone; shorten it to" in str(long.error)


def test_texts_of_another_form_are_refused(mood: tuple[Predictor, Export]) -> None:
    predictor, export = mood
    form = export.record.text_form.model_copy(update={"start": 77})
    record = export.record.model_copy(update={"text_form": form})
    with pytest.raises(ConfigError, match=r"its texts are written with start token 77 and .*; give the tokenizer and config.json"):
        Predictor(predictor.backbone, [dataclasses.replace(export, record=record)])


def test_a_prompt_of_an_encoder_is_refused(mood: tuple[Predictor, Export], tmp_path: Path) -> None:
    predictor, export = mood
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((export.folder / name).read_bytes())
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**facts, "task_type": "SEQ_2_SEQ_LM"}))
    with pytest.raises(ConfigError, match="task_type is SEQ_2_SEQ_LM, so its prompt was trained for an encoder-decoder"):
        Predictor(predictor.backbone, [dataclasses.replace(export, folder=tmp_path)])
