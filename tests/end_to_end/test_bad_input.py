"""F3, F14, F15, F16, F18, F19: what a user can get wrong is said on one screen, before any training, and harms no run.

Each case does what `python launcher/train.py --config FILE ...` does, in a fork of this process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import peft  # noqa: F401 - imported before the forks
import pytest
import ranks
import tiny_run
import tiny_t5
import yaml

from bpt_dist.storage.files import read_json
from bpt_dist.storage.run_directory import RunDirectory

SCREEN = 25
REPOSITORY = Path(__file__).parents[2]
DOOR = runpy.run_path(str(REPOSITORY / "launcher" / "train.py"))["main"]


@dataclass
class Answer:
    """How a command ended."""

    code: int
    text: str


def command(folder: Path, plain: dict[str, Any] | None, *words: str, fault: str = "") -> Answer:
    """Run the command line in a fork and return its exit code and what it wrote to the terminal."""
    file, screen = folder / "run.yaml", folder / "screen"
    if plain is not None:
        file.write_text(yaml.safe_dump(plain))

    def main() -> int:
        with screen.open("wb") as terminal:
            os.dup2(terminal.fileno(), 1)
            os.dup2(terminal.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - pytest replaced them
        logging.getLogger().handlers.clear()
        code = DOOR(["--config", str(file), *words])
        sys.stderr.flush()
        sys.stdout.flush()
        return code

    (code,) = ranks.launch(main, BPT_FAULT=fault)
    return Answer(code, screen.read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_refused(answer: Answer, code: int, *parts: str) -> None:
    """Each part is a pattern: the place, the value, the remedy."""
    assert answer.code == code, answer.text
    said = [line for line in answer.text.splitlines() if not re.match(r"(source|target/\w+)  step \d+/\d+  loss", line)]
    assert len(said) <= SCREEN, answer.text
    assert "Traceback" not in answer.text
    for part in parts:
        assert re.search(part, answer.text), f"{part!r} is not in:\n{answer.text}"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return tiny_run.world(tmp_path / "world")


def plain(world: Path, method: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return tiny_run.settings(world, {"name": "bpt", **(method or {})}, **sections)


def nothing_was_trained(world: Path) -> bool:
    return not list((world / "runs").rglob("step-*")) and not any(
        file.stat().st_size for file in (world / "runs").rglob("metrics.jsonl")
    )


# --- the configuration ------------------------------------------------------------------------------------------------------------


def test_unknown_keys_and_wrong_types_are_all_named_at_once(world: Path, tmp_path: Path) -> None:
    settings = plain(world)
    settings["source"] |= {"lerning_rate": 0.1, "steps": "many"}
    settings["method"]["num_particles"] = 2.5
    answer = command(tmp_path, settings, "seed=x")
    assert_refused(
        answer, 2,
        r"run\.yaml:\d+: source\.lerning_rate: unknown key",
        r"run\.yaml:\d+: source\.steps: .*'many'",
        r"run\.yaml:\d+: method\.num_particles: .*2\.5",
        r"command line: seed: .*'x'",
    )  # fmt: skip
    assert not (world / "runs").exists()


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    assert_refused(command(tmp_path, None), 2, re.escape(str(tmp_path / "run.yaml")))


def test_an_unknown_option_is_refused_by_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launcher/train.py", "--config", "x.yaml", "--lr", "3"],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, "unrecognized arguments: --lr" in done.stderr) == (2, True)


# --- data -------------------------------------------------------------------------------------------------------------------------


BAD_ROWS = {
    "cut line": ('{"sentence": "the cat", "lab', r"train\.jsonl:33"),
    "unknown label": ('{"sentence": "the cat", "label": 7}', r"train\.jsonl:33: .*label"),
    "missing field": ('{"text": "the cat", "label": 0}', r"train\.jsonl:33: .*sentence"),
    "empty text": ('{"sentence": " ", "label": 0}', r"train\.jsonl:33: .*sentence"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(case: str, world: Path, tmp_path: Path) -> None:
    line, place = BAD_ROWS[case]
    with (world / "tasks" / "mood" / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    assert_refused(command(tmp_path, plain(world)), 65, place)
    assert nothing_was_trained(world)
    assert read_json(world / "runs" / "run" / "status.json")["state"] == "failed"


def test_a_hundred_bad_rows_still_fit_the_screen(world: Path, tmp_path: Path) -> None:
    (world / "tasks" / "mood" / "train.jsonl").write_text('{"sentence": "the cat", "label": 9}\n' * 100)
    assert_refused(command(tmp_path, plain(world)), 65, r"train\.jsonl:1: ", "90")


def test_an_unknown_task_is_refused_with_the_nearest_name(world: Path, tmp_path: Path) -> None:
    answer = command(tmp_path, plain(world, data={"target_tasks": ["moood"]}))
    assert answer.code in (2, 65)
    assert_refused(answer, answer.code, "'moood'", "mood")
    assert nothing_was_trained(world)


def test_data_that_is_not_there_says_what_to_put_where(world: Path, tmp_path: Path) -> None:
    shutil.rmtree(world / "tasks" / "mood")
    assert_refused(
        command(tmp_path, plain(world)), 65, r"task 'mood' reads train\.jsonl and validation\.jsonl", str(world / "tasks" / "mood")
    )


def test_a_bad_row_is_fixed_and_the_same_command_resumes(world: Path, tmp_path: Path) -> None:
    file = world / "tasks" / "mood" / "train.jsonl"
    good = file.read_text()
    file.write_text(good + "{\n")
    assert command(tmp_path, plain(world)).code == 65
    file.write_text(good)
    assert command(tmp_path, plain(world)).code == 0
    assert read_json(world / "runs" / "run" / "status.json")["state"] == "finished"


# --- backbone, prompts, posteriors ------------------------------------------------------------------------------------------------


def test_a_backbone_with_pickled_weights_only_is_refused(world: Path, tmp_path: Path) -> None:
    (world / "t5" / "model.safetensors").rename(world / "t5" / "pytorch_model.bin")
    assert_refused(
        command(tmp_path, plain(world)), 2, "backbone.path: " + re.escape(str(world / "t5")), r"never read", "save_pretrained"
    )
    assert nothing_was_trained(world)


@pytest.mark.parametrize("method", ["bpt", "prompt_tuning"])
def test_a_stored_prompt_of_another_width_is_refused_before_training(method: str, world: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "prompt.npy", numpy.zeros((3, 48), dtype=numpy.float32))
    options = {"name": method, "init": "file", "init_file": str(tmp_path / "prompt.npy")}
    answer = command(tmp_path, tiny_run.settings(world, options))
    assert_refused(
        answer, 2, re.escape(f"{tmp_path / 'prompt.npy'}: the prompt is 48 wide, the backbone 32"), "choose a backbone of width 48"
    )
    assert nothing_was_trained(world)


def swapped_pieces(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_weights(folder: Path) -> None:
    tiny_t5.make(folder, seed=9)


@pytest.mark.parametrize(("change", "what"), [(other_weights, "backbone"), (swapped_pieces, "tokenizer")])
def test_a_posterior_of_another_backbone_or_tokenizer_is_refused(
    change: Callable[[Path], None], what: str, world: Path, tmp_path: Path
) -> None:
    assert command(tmp_path, plain(world, name="giver")).code == 0
    before = hashes(world / "runs" / "giver")
    shutil.copytree(world / "t5", world / "other")
    change(world / "other")
    settings = plain(
        world, name="taker", backbone={"path": str(world / "other")}, source={"posterior": str(world / "runs" / "giver")}
    )
    assert_refused(
        command(tmp_path, settings), 2, rf"source\.posterior: .* made with another {what}", "set backbone.path to that one"
    )
    assert not list((world / "runs" / "taker").rglob("step-*"))
    assert hashes(world / "runs" / "giver") == before
    # The same backbone takes it, wherever it is stored.
    settings["backbone"]["path"] = str(shutil.copytree(world / "t5", world / "moved"))
    settings["name"] = "moved"
    assert command(tmp_path, settings).code == 0


@pytest.mark.parametrize(("change", "what"), [(other_weights, "backbone"), (swapped_pieces, "tokenizer")])
@pytest.mark.parametrize("moment", ["step.before_forward,stage=source,step=3", "stage.finished,stage=target/mood"])
def test_a_backbone_that_changed_under_a_run_is_refused_at_resume(
    moment: str, change: Callable[[Path], None], what: str, world: Path, tmp_path: Path
) -> None:
    """F16: same path, other content; the checkpoints belong to the old one."""
    assert command(tmp_path, plain(world), fault=f"{moment},kill").code == -9
    before = hashes(world / "runs" / "run" / "source")
    kept = shutil.copytree(world / "t5", world / "kept")
    change(world / "t5")
    answer = command(tmp_path, plain(world))
    assert_refused(
        answer,
        2,
        rf"backbone\.path: the {what} at {re.escape(str(world / 't5'))} changed since",
        "restore the original files to resume",
    )
    assert hashes(world / "runs" / "run" / "source") == before
    shutil.rmtree(world / "t5")
    shutil.copytree(kept, world / "t5")
    assert command(tmp_path, plain(world)).code == 0


# --- run directories --------------------------------------------------------------------------------------------------------------


def test_a_directory_that_is_no_run_is_not_touched(world: Path, tmp_path: Path) -> None:
    folder = world / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("irreplaceable")
    before = hashes(folder)
    assert_refused(
        command(tmp_path, plain(world)), 2, re.escape(str(folder)), r"is not a run but holds 'thesis\.tex'", "choose another name="
    )
    assert hashes(folder) == before


def test_a_run_that_is_alive_is_not_touched(world: Path, tmp_path: Path) -> None:
    folder = world / "runs" / "run"
    with RunDirectory.open("a: 1\n", "f", lambda old: [], folder):
        before = hashes(folder)
        answer = command(tmp_path, plain(world))
        assert_refused(answer, 2, re.escape(str(folder)), rf"pid {os.getpid()}")
        assert hashes(folder) == before


def test_a_run_with_another_configuration_is_not_touched(world: Path, tmp_path: Path) -> None:
    assert command(tmp_path, plain(world)).code == 0
    folder = world / "runs" / "run"
    before = hashes(folder)
    answer = command(tmp_path, plain(world), "source.lr=0.1", "num_particles=4")
    assert_refused(
        answer,
        2,
        re.escape(str(folder)),
        r"\bsource\.lr\b",
        r"\bmethod\.num_particles\b",
        "restore these values .* or choose another name=",
    )
    assert hashes(folder) == before
    assert_refused(command(tmp_path, plain(world), "--fresh"), 2, "--fresh needs an empty directory")
    assert hashes(folder) == before


def test_what_shapes_no_result_may_change_between_starts(world: Path, tmp_path: Path) -> None:
    assert command(tmp_path, plain(world), fault="stage.finished,stage=source,kill").code == -9
    changed = plain(world, source={"checkpoint_every": 1}, evaluation={"batch_size": 5}, distribution={"step_timeout": 60})
    assert command(tmp_path, changed).code == 0


def test_an_output_that_cannot_be_written_is_named(world: Path, tmp_path: Path) -> None:
    (world / "runs").write_text("a file where a folder should be")
    answer = command(tmp_path, plain(world))
    assert answer.code in (2, 74)
    assert_refused(answer, answer.code, re.escape(str(world / "runs")), "choose another")


# --- a full disk ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["ckpt.before_rename,step=4", "ckpt.before_rename,step=2", "status.before_write,state=finished"])
def test_a_full_disk_ends_with_74_loses_nothing_and_the_same_command_goes_on(fault: str, world: Path, tmp_path: Path) -> None:
    answer = command(tmp_path, plain(world), fault=f"{fault},enospc")
    folder = world / "runs" / "run"
    assert_refused(answer, 74, "No space left on device")
    assert read_json(folder / "status.json")["state"] == "failed"
    assert not list(folder.rglob("*.tmp-*"))
    assert command(tmp_path, plain(world)).code == 0
    straight = plain(world, output=str(world / "straight"))
    assert command(tmp_path, straight).code == 0
    for name in ("source/posterior/posterior.safetensors", "results.json", "target/mood/predictions.jsonl"):
        assert (folder / name).read_bytes() == (world / "straight" / "run" / name).read_bytes()


def test_a_full_disk_at_a_checkpoint_says_what_is_needed_and_what_to_do(world: Path, tmp_path: Path) -> None:
    answer = command(tmp_path, plain(world), fault="ckpt.before_rename,step=4,enospc")
    place = re.escape(str(world / "runs" / "run" / "source" / "checkpoints" / "step-00000004"))
    assert_refused(answer, 74, place, r"it needs \d+ bytes, \d+ are free", "free some space .* rerun the same command to resume")
