"""The program of a model card, executed as it is: PEFT and transformers alone give the predictions of the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import exported
import pytest
import tiny_decoder
import tiny_run
from typer.testing import CliRunner

from bpt_dist.artifacts.card_code import PLACE
from bpt_dist.commands.main import app

TASKS = ("mood", "count", "truth")
ANSWER_ALL = """
rows = json.loads({rows!r})
print("ANSWERS", json.dumps([answer(row, row["task"]) for row in rows]))
"""


def answers_of_card(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the last program of a card in a fresh process that cannot import this package."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    program = blocks[-1].replace(PLACE, str(folder)) + ANSWER_ALL.format(rows=json.dumps(rows))
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['bpt_dist'] = None\n" + program],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.rpartition("ANSWERS ")[2])
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


SECTIONS: dict[str, Any] = {
    "data": {"target_tasks": list(TASKS)}, "evaluation": {"predict": "ensemble"}, "target": {"joint": True}
}  # fmt: skip


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    return tiny_run.trained(tiny_run.load(world, tiny_run.settings(world, {"name": "bpt"}, **SECTIONS)))


@pytest.fixture(scope="module")
def decoder_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.world(tmp_path_factory.mktemp("decoder_world"), "gemma3_text")


@pytest.fixture(scope="module")
def decoder_run(decoder_world: Path) -> Path:
    return tiny_run.trained(tiny_run.load(decoder_world, tiny_decoder.settings(decoder_world, {"name": "bpt"}, **SECTIONS)))


@pytest.mark.parametrize("predict", ["map", "ensemble"])
@pytest.mark.parametrize("task", ["mood", "count"])
def test_the_card_of_a_prompt_answers_as_the_run_predicted(world: Path, run: Path, task: str, predict: str) -> None:
    folder = run / "target" / task / ("adapter" if predict == "map" else "ensemble")
    found = answers_of_card(folder, exported.rows(world, task))
    exported.assert_equal(found, exported.predictions(run, task, predict))


def test_the_card_of_a_joint_export_answers_for_every_task(world: Path, run: Path) -> None:
    written = CliRunner().invoke(app, ["export", str(run), "--particles"])
    assert written.exit_code == 0, written.output
    record = json.loads((run / "export" / "joint" / "task.json").read_text())
    assert [(task["name"], task["task_id"]) for task in record["tasks"]] == [(name, n) for n, name in enumerate(TASKS)]
    rows = [row for task in TASKS for row in exported.rows(world, task)]
    expected = [entry for task in TASKS for entry in exported.predictions(run, task)]
    exported.assert_equal(answers_of_card(run / "export" / "joint", rows), expected)
    particles = json.loads((run / "export" / "particles" / "task.json").read_text())
    assert (particles["predict"], particles["prompts"]) == ("ensemble", ["particles/00", "particles/01"])
    assert [task["name"] for task in particles["tasks"]] == ["colour", "truth"], "the source tasks"


def test_the_card_of_a_low_rank_change_answers_as_the_run_predicted(world: Path) -> None:
    run = tiny_run.trained(tiny_run.load(world, tiny_run.settings(world, {"name": "lora", "rank": 2}, name="lora")))
    found = answers_of_card(run / "target" / "mood" / "adapter", exported.rows(world, "mood"))
    exported.assert_equal(found, exported.predictions(run, "mood"))


def test_an_export_of_an_earlier_version_gets_its_record_by_exporting_again(world: Path) -> None:
    settings = tiny_run.settings(world, {"name": "prompt_tuning"}, name="old", data={"target_tasks": ["mood"]})
    folder = tiny_run.trained(tiny_run.load(world, settings)) / "target" / "mood" / "adapter"
    before = (folder / "task.json").read_text()
    (folder / "task.json").unlink()
    written = CliRunner().invoke(app, ["export", str(folder.parents[2])])
    assert written.exit_code == 0, written.output
    assert (folder / "task.json").read_text() == before


@pytest.mark.parametrize(("task", "predict"), [("mood", "map"), ("count", "ensemble")])
def test_the_card_of_a_decoder_only_model_answers_as_the_run_predicted(
    decoder_world: Path, decoder_run: Path, task: str, predict: str
) -> None:
    """Text and answer are one sequence, with a start token before it and a blank between."""
    folder = decoder_run / "target" / task / ("adapter" if predict == "map" else "ensemble")
    record = json.loads((folder / "task.json").read_text())
    assert record["text_form"] == {"kind": "continuation", "start": 0, "before_answer": " "}
    assert record["backbone"]["kind"] == "decoder-only"
    page = (folder / "README.md").read_text()
    assert "AutoModelForCausalLM" in page
    assert "Seq2Seq" not in page
    found = answers_of_card(folder, exported.rows(decoder_world, task))
    exported.assert_equal(found, exported.predictions(decoder_run, task, predict))


def test_the_card_of_a_joint_export_of_a_decoder_only_model_answers_for_every_task(decoder_world: Path, decoder_run: Path) -> None:
    written = CliRunner().invoke(app, ["export", str(decoder_run)])
    assert written.exit_code == 0, written.output
    rows = [row for task in TASKS for row in exported.rows(decoder_world, task)]
    expected = [entry for task in TASKS for entry in exported.predictions(decoder_run, task)]
    exported.assert_equal(answers_of_card(decoder_run / "export" / "joint", rows), expected)


def test_the_card_of_a_low_rank_change_of_a_decoder_only_model_answers_as_the_run_predicted(decoder_world: Path) -> None:
    settings = tiny_decoder.settings(decoder_world, {"name": "lora", "rank": 2}, name="lora")
    run = tiny_run.trained(tiny_run.load(decoder_world, settings))
    found = answers_of_card(run / "target" / "mood" / "adapter", exported.rows(decoder_world, "mood"))
    exported.assert_equal(found, exported.predictions(run, "mood"))


def test_a_record_of_a_decoder_only_model_is_made_again(decoder_world: Path) -> None:
    settings = tiny_decoder.settings(decoder_world, {"name": "prompt_tuning"}, name="old", data={"target_tasks": ["mood"]})
    folder = tiny_run.trained(tiny_run.load(decoder_world, settings)) / "target" / "mood" / "adapter"
    before = (folder / "task.json").read_text()
    (folder / "task.json").unlink()
    written = CliRunner().invoke(app, ["export", str(folder.parents[2])])
    assert written.exit_code == 0, written.output
    assert (folder / "task.json").read_text() == before
