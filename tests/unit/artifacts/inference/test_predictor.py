"""Answers of the Predictor: those of the run that exported the prompts, whatever shares a batch with a row."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exported
import pytest
import tiny_run
import torch

from bpt_dist.artifacts.inference.backbone import load_backbone
from bpt_dist.artifacts.inference.exports import Export, read_exports, refuse_duplicates
from bpt_dist.artifacts.inference.lines import encode
from bpt_dist.artifacts.inference.predictor import Answer, Predictor, Question
from bpt_dist.artifacts.peft_export import CardFacts, export_prompt
from bpt_dist.commands.main import main
from bpt_dist.errors import ConfigError

FOUR = {"target_tasks": ["mood", "count", "colour", "truth"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def trained(world: Path, method: dict[str, Any], **sections: Any) -> Path:
    return tiny_run.trained(tiny_run.load(world, tiny_run.settings(world, method, **sections)))


@pytest.fixture(scope="module")
def bpt(world: Path) -> Path:
    """BPT with its ensemble: a free-text task, and three whose label words are ranked."""
    return trained(
        world, {"name": "bpt", "sigma_relative": 1.0}, name="bpt", data=FOUR, evaluation={"predict": "ensemble"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def predictor(bpt: Path) -> Predictor:
    found = read_exports(bpt)
    return Predictor(load_backbone(found[0], device="cpu"), found)


def answers(predictor: Predictor, rows: list[Any]) -> list[dict[str, Any]]:
    return [answer.as_json() for answer in predictor.predict(rows)]


@pytest.mark.parametrize("predict", ["map", "ensemble"])
def test_answers_are_the_predictions_of_the_run(world: Path, bpt: Path, predictor: Predictor, predict: str) -> None:
    found = read_exports(bpt, ensemble=predict == "ensemble")
    own = Predictor(predictor.backbone, found)
    for task in FOUR["target_tasks"]:
        given = answers(own, exported.rows(world, task))
        exported.assert_equal(given, exported.predictions(bpt, task, predict))
        if predict == "ensemble" and task != "count":
            assert [one["agreement"] for one in given] == [one["agreement"] for one in exported.predictions(bpt, task, predict)]


@pytest.mark.parametrize("task", FOUR["target_tasks"])
def test_an_answer_has_the_label_of_the_rows(world: Path, bpt: Path, predictor: Predictor, task: str) -> None:
    rows = exported.rows(world, task)
    given = answers(predictor, rows)
    for row, answer, measured in zip(rows, given, exported.predictions(bpt, task), strict=True):
        if task == "count":  # free text: there are no classes
            assert "label" not in answer
            continue
        assert type(answer["label"]) is type(row["label"])
        assert (answer["label"] == row["label"]) == measured["correct"]
    if task != "count":
        assert list(given[0])[:4] == ["id", "task", "prediction", "label"]


def test_an_export_of_an_earlier_version_answers_with_words_alone(bpt: Path, predictor: Predictor) -> None:
    export = predictor.tasks["mood"]
    old = dataclasses.replace(export, name="old", task=export.task.model_copy(update={"labels": None}))
    answer, other = Predictor(predictor.backbone, [export, old]).predict(
        [{"task": name, "sentence": "a cat"} for name in ("mood", "old")]
    )
    assert (answer.prediction, answer.probabilities) == (other.prediction, other.probabilities)
    assert answer.label in (0, 1)
    assert other.label is None


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ({"name": "vanilla_transfer"}, {"name": "vanilla"}),
        ({"name": "bpt", "sigma_relative": 1.0}, {"name": "samples", "evaluation": {"predict": "ensemble", "num_samples": 3}}),
        ({"name": "mpt"}, {"name": "joint", "target": {"joint": True}}),
        ({"name": "prompt_tuning"}, {"name": "generated", "evaluation": {"decode": "generate"}}),
    ],
    ids=lambda value: value["name"],
)
def test_answers_of_other_methods_are_their_predictions(world: Path, method: dict[str, Any], sections: dict[str, Any]) -> None:
    run = trained(world, method, **sections)
    for predict in ("map", "ensemble") if "num_samples" in str(sections) else ("map",):
        found = read_exports(run, ensemble=predict == "ensemble")
        own = Predictor(load_backbone(found[0], device="cpu"), found)
        for task in ("mood", "count"):
            exported.assert_equal(answers(own, exported.rows(world, task)), exported.predictions(run, task, predict))


def prompts_of_all_lengths(world: Path, bpt: Path, folder: Path) -> list[Export]:
    """Export random prompts of 1 to 7 positions for the tasks of a run: far from each other, so that a mix-up shows."""
    made = []
    for number, length in enumerate((7, 1, 3, 5)):
        base = read_exports(bpt / "target" / FOUR["target_tasks"][number] / "adapter")[0]
        prompt = 3 * torch.randn(length, 32, generator=torch.Generator().manual_seed(number))
        card = CardFacts(title="t", method="m", backbone_hash="", tokenizer_hash="", protocol="fixed")
        facts = {"d_model": 32, "num_layers": 2, "num_heads": 4}
        place = export_prompt(
            prompt, folder / str(number), base_model=str(world / "t5"), revision=None, config_facts=facts, card=card,
            record=base.record,
        )  # fmt: skip
        made += read_exports(place)
    return made


@pytest.mark.parametrize("stock", [False, True], ids=["packed", "stock"])
def test_a_mixed_batch_is_answered_as_each_task_alone(world: Path, bpt: Path, tmp_path: Path, stock: bool) -> None:
    exports = prompts_of_all_lengths(world, bpt, tmp_path)
    exports += [dataclasses.replace(export, name=f"all of {export.name}") for export in read_exports(bpt, ensemble=True)]
    backbone = load_backbone(exports[0], device="cpu")
    if stock:
        backbone.use_stock_pass()
    mixed = Predictor(backbone, exports)
    rows = [{**row, "task": export.name} for export in exports for row in exported.rows(world, export.task.name)]
    rows = rows[::2] + rows[1::2]
    together = mixed.predict(rows)
    for export in exports:
        alone = Predictor(backbone, [export], tokens_at_once=1)  # one row a pass
        places = [place for place, row in enumerate(rows) if row["task"] == export.name]
        expected = alone.predict([rows[place] for place in places])
        exported.assert_equal([together[place].as_json() for place in places], [answer.as_json() for answer in expected])
    kinds = {tuple((answer.probabilities or {}).values()) for answer in together}
    assert len(kinds) > len(exports), "prompts and rows must matter, else the test shows nothing"


def test_the_fast_pass_answers_as_the_stock_one(world: Path, bpt: Path, tmp_path: Path) -> None:
    exports = prompts_of_all_lengths(world, bpt, tmp_path)
    backbone = load_backbone(exports[0], device="cpu")
    rows = [row for export in exports for row in exported.rows(world, export.task.name)]
    fast = answers(Predictor(backbone, exports), rows)
    backbone.use_stock_pass()
    exported.assert_equal(fast, answers(Predictor(backbone, exports), rows))


def test_the_map_prompt_and_the_best_particle_are_exported(world: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"data": {"target_tasks": ["mood", "count"]}, "evaluation": {"predict": "best"}}
    run = trained(world, {"name": "bpt", "lr_full": 0.5}, name="best", **sections)
    chosen, plain = read_exports(run, best=True), read_exports(run)
    assert {export.record.predict for export in chosen} == {"best"}
    best, own = (Predictor(load_backbone(found[0], device="cpu"), found) for found in (chosen, plain))
    for task in ("mood", "count"):
        exported.assert_equal(answers(best, exported.rows(world, task)), exported.predictions(run, task, "best"))
        exported.assert_equal(answers(own, exported.rows(world, task)), exported.predictions(run, task))
    pair = [predictor._prompts["mood"].hypotheses for predictor in (best, own)]
    assert not torch.equal(*pair), "the two prompts must differ, else the test shows nothing"
    assert main(["export", str(run), "--out", str(tmp_path / "exports")]) == 0
    for wanted in ({}, {"best": True}):
        in_folder, in_run = (read_exports(place, **wanted) for place in (tmp_path / "exports", run))
        assert [(one.name, one.record) for one in in_folder] == sorted((one.name, one.record) for one in in_run)
    with pytest.raises(ConfigError, match="has exported no ensemble; leave --ensemble out"):
        read_exports(run, ensemble=True)
    with pytest.raises(ConfigError, match="--best: contradicts --ensemble"):
        read_exports(run, ensemble=True, best=True)


def test_the_card_of_the_map_prompt_says_that_the_best_particle_was_measured(world: Path) -> None:
    run = trained(world, {"name": "bpt"}, name="measured", data={"target_tasks": ["mood"]}, evaluation={"predict": "best"})
    folder = run / "target" / "mood" / "adapter"
    (export,) = read_exports(run)
    assert (export.record.predict, export.record.evaluated) == ("map", "best")
    given = answers(Predictor(load_backbone(export, device="cpu"), [export]), exported.rows(world, "mood"))
    exported.assert_equal(given, exported.predictions(run, "mood"))
    page = (folder / "README.md").read_text()
    assert "also measured the adapted particle with the best validation score, which is an export of its own" in " ".join(
        page.split()
    )
    scores = [entry for entry in json.loads((run / "results.json").read_text()) if entry["predict"] == "map"]
    assert page.count("| mood |") == len(scores)


BAD = [
    (3, "row", "must be an object"),
    ({"task": "moood", "sentence": "the cat"}, "task", "'moood' is not known here; set `task` to one of"),
    ({"sentence": "the cat"}, "task", "names no task"),
    ({"task": "mood"}, "fields", "field 'sentence' is missing"),
    ({"task": "mood", "sentence": 7}, "fields", "'sentence' is 7; it must be a text"),
    ({"task": "truth", "premise": "the cat", "hypothesis": " "}, "fields", "field 'hypothesis' is empty"),
    ({"task": "mood", "fields": {"text": "the cat"}}, "fields", "task 'mood' reads sentence"),
]


def test_a_bad_row_is_answered_at_its_place_and_no_other_row_is_lost(world: Path, bpt: Path, predictor: Predictor) -> None:
    good = exported.rows(world, "mood")
    rows: list[Any] = []
    for row, (bad, _, _) in zip(good * 2, BAD, strict=False):
        rows += [row, bad]
    found = predictor.predict(rows)
    for answer, (_, kind, what) in zip(found[1::2], BAD, strict=True):
        assert answer.kind == kind
        assert what in (answer.error or "")
        assert answer.prediction is None
    expected = (exported.predictions(bpt, "mood") * 2)[: len(BAD)]
    exported.assert_equal([answer.as_json() for answer in found[::2]], expected)


def test_a_row_may_hold_its_columns_in_an_object_and_leave_out_the_only_task(world: Path, predictor: Predictor) -> None:
    only = Predictor(predictor.backbone, [predictor.tasks["mood"]])
    row = exported.rows(world, "mood")[0]
    (flat,) = answers(predictor, [row])
    assert flat["id"] == row["id"]
    assert answers(only, [{"sentence": row["sentence"], "id": row["id"]}]) == [flat]
    assert answers(predictor, [{"task": "mood", "id": row["id"], "fields": {"sentence": row["sentence"]}}]) == [flat]


def test_a_long_text_is_cut_as_in_training_and_the_answer_says_so(predictor: Predictor) -> None:
    export = predictor.tasks["mood"]
    task = export.task.model_copy(update={"max_source_length": 6})
    short = Predictor(predictor.backbone, [dataclasses.replace(export, task=task)])
    text = "the cat sat on the mat"  # behind `mood` and `sentence :`, and before the end token
    (cut,) = short.predict([{"sentence": text}])
    assert (cut.num_tokens, cut.kept_tokens) == (10, 6)
    assert cut.as_json()["truncated"] == {"tokens": 10, "kept": 6}
    (kept,) = short.predict([{"sentence": "the cat"}])
    assert kept.num_tokens is None
    assert kept.probabilities == pytest.approx(cut.probabilities, abs=1e-6)


def test_thousands_of_rows_are_never_held_at_once(world: Path, predictor: Predictor) -> None:
    ahead, read, answered = 0, 0, 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        rows = exported.rows(world, "mood")
        for number in range(10_000):
            read += 1
            yield rows[number % len(rows)]

    for _ in predictor.stream(endless(), window=64):
        ahead = max(ahead, read - answered)
        answered += 1
    assert (read, answered) == (10_000, 10_000)
    assert ahead <= 64


def test_prompts_come_and_go(world: Path, predictor: Predictor) -> None:
    own = Predictor(predictor.backbone)
    row = exported.rows(world, "mood")[0]
    assert own.predict([row])[0].error == "task 'mood' is not known here; set `task` to one of none yet"
    own.add(predictor.tasks["mood"])
    assert own.predict([row])[0].error is None
    with pytest.raises(ConfigError, match=r"has a prompt already, .*; give .* another name"):
        own.add(predictor.tasks["mood"])
    own.remove("mood")
    with pytest.raises(ConfigError, match="'mood': has no prompt here"):
        own.remove("mood")


def test_several_threads_get_their_own_answers(world: Path, predictor: Predictor) -> None:
    expected = {task: predictor.predict(exported.rows(world, task)) for task in FOUR["target_tasks"]}
    found: dict[str, list[list[Answer]]] = {task: [] for task in expected}

    def ask(task: str) -> None:
        for _ in range(5):
            found[task].append(predictor.predict(exported.rows(world, task)))

    threads = [threading.Thread(target=ask, args=(task,)) for task in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(given == expected[task] for task in expected for given in found[task])
    assert all(len(given) == 5 for given in found.values())


@pytest.mark.parametrize("what", ["backbone", "tokenizer"])
def test_a_prompt_of_something_else_is_refused(predictor: Predictor, what: str) -> None:
    export = predictor.tasks["mood"]
    record = export.record
    if what == "backbone":
        other = record.model_copy(update={"backbone": record.backbone.model_copy(update={"sha256": "0" * 64})})
    else:
        other = record.model_copy(update={"tokenizer_sha256": "0" * 64})
    with pytest.raises(ConfigError, match=rf"belongs to another {what} .*000000.*; give its own by --backbone PATH"):
        Predictor(predictor.backbone, [dataclasses.replace(export, record=other)])


def test_two_prompts_of_one_name_are_refused(bpt: Path) -> None:
    mood = bpt / "target" / "mood"
    both = [*read_exports(mood / "adapter"), *read_exports(mood / "ensemble")]
    with pytest.raises(ConfigError, match=r"task 'mood': has a prompt in .*adapter and another in .*ensemble; leave one out"):
        refuse_duplicates(both)
    refuse_duplicates([*read_exports(mood / "adapter"), *read_exports(mood / "ensemble", "all of mood")])


def test_a_folder_without_a_prompt_names_what_is_missing(bpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_exports(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no exported prompt"):
        read_exports(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ConfigError, match=r"old: has no task.json.*export its run again with `bpt-dist export RUN`"):
        read_exports(tmp_path)
    with pytest.raises(ConfigError, match="holds no soft prompt"):
        read_exports(bpt / "source" / "posterior")


@pytest.mark.parametrize("own", [float("inf"), "\ud800", [float("nan")], {"a": "\udfff"}], ids=range(4))
def test_an_id_that_no_answer_can_repeat_is_an_error_of_its_row(world: Path, predictor: Predictor, own: Any) -> None:
    row = exported.rows(world, "mood")[0]
    bad, good = predictor.predict([{**row, "id": own}, row])
    assert (bad.kind, bad.id, bad.prediction) == ("row", None, None)
    assert encode(1, bad)
    assert good.id == row["id"]


def test_reading_and_passes_are_the_two_halves_of_predicting(world: Path, predictor: Predictor) -> None:
    rows = [{"task": "none"}, *exported.rows(world, "mood"), 3, *exported.rows(world, "count")]
    read = predictor.read(rows)
    assert [place for place, one in enumerate(read) if isinstance(one, Answer)] == [0, 7]
    found: dict[int, Answer] = {}
    for of_pass in predictor.passes([one for one in read if isinstance(one, Question)]):
        assert not of_pass.keys() & found.keys()
        found |= of_pass
    assert [found.get(place) or read[place] for place in range(len(rows))] == predictor.predict(rows)
