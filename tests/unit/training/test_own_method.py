"""A method outside the package through whole runs: trained, resumed where the file moved, refused where it changed, read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import own_method
import pytest
import tiny_run
from typer.testing import CliRunner

import bpt_dist
from bpt_dist import config as configuration
from bpt_dist.artifacts.results import collect
from bpt_dist.artifacts.weights import read_facts
from bpt_dist.commands.main import app
from bpt_dist.commands.table.command import mixture_notes
from bpt_dist.config import RunConfig
from bpt_dist.config.method_source import METHODS
from bpt_dist.config.own_method import digest
from bpt_dist.errors import ConfigError, Stopped
from bpt_dist.storage.files import read_json

NAME = own_method.NAME


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def settings(world: Path, folder: Path, file: Path, **options: Any) -> dict[str, Any]:
    plain = tiny_run.settings(world, {"name": "prompt_tuning"}, output=str(folder / "runs"))
    return {**plain, "method": {"path": str(file), "length": 3, "bottleneck": 4, **options}}


def configured(world: Path, folder: Path, file: Path) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    return tiny_run.load(folder, settings(world, folder, file))


def stopped(config: RunConfig) -> None:
    with pytest.raises(Stopped), tiny_run.session(config) as run:
        run.watchdog.request_stop("test")
        from bpt_dist import train

        train.train(run)


def scores(run: Path) -> list[tuple[str, str, float]]:
    return [(entry["task"], entry["metric"], entry["value"]) for entry in read_json(run / "results.json")]  # type: ignore[index]


def ran(*words: object) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


# --- a run ------------------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_its_results_name_the_method_and_carry_the_hash_of_its_file(world: Path, tmp_path: Path) -> None:
    file = own_method.write(tmp_path / "mine")
    config = configured(world, tmp_path, file)
    run = tiny_run.trained(config)
    assert read_json(run / "inputs.json")["method.path"] == digest(config.method)
    (found,) = {(result.method, result.inputs["method.path"]) for result in collect([run]).results}
    assert found == (NAME, digest(config.method))
    # The network beside the prompt was trained, too: 3 positions and two matrices of 4 columns.
    assert {result.trainable_parameters for result in collect([run]).results} == {3 * 32 + 2 * 4 * 32}
    assert NAME in ran("table", run.parent).replace("\\", "")


def test_it_is_the_same_method_as_the_same_file_inside_the_package_would_be(world: Path, tmp_path: Path) -> None:
    """A copy of prompt tuning under another name gives the bits of prompt tuning."""
    copy, text = tmp_path / "my_prompts.py", (METHODS / "prompt_tuning.py").read_text()
    copy.write_text(text.replace('Literal["prompt_tuning"] = "prompt_tuning"', "str"))
    plain = settings(world, tmp_path, copy)
    del plain["method"]["bottleneck"]
    ours = tiny_run.trained(tiny_run.load(tmp_path, plain))
    plain |= {"name": "theirs", "method": {"name": "prompt_tuning", "length": 3}}
    theirs = tiny_run.trained(tiny_run.load(tmp_path, plain))
    for task in ("mood", "count"):
        prompt = f"target/{task}/adapter/adapter_model.safetensors"
        assert (ours / prompt).read_bytes() == (theirs / prompt).read_bytes()
    assert scores(ours) == scores(theirs)


def test_a_stopped_run_goes_on_with_the_file_at_another_place(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = scores(tiny_run.trained(configured(world, tmp_path / "whole", own_method.write(tmp_path / "first"))))
    file = own_method.write(tmp_path / "mine")
    stopped(configured(world, tmp_path, file))
    moved = shutil.move(file, tmp_path / file.name)
    caplog.set_level("INFO")
    run = tiny_run.trained(configured(world, tmp_path, Path(moved)))
    assert f"method.path: {file} -> {moved}" in caplog.text
    assert scores(run) == whole


def test_a_stopped_run_does_not_go_on_with_another_content(world: Path, tmp_path: Path) -> None:
    file = own_method.write(tmp_path / "mine")
    stopped(configured(world, tmp_path, file))
    kept = (tmp_path / "runs" / "run" / "method" / file.name).read_text()
    file.write_text(file.read_text().replace("torch.relu", "torch.tanh"))
    with pytest.raises(ConfigError, match=r"^method\.path: changed since .*; restore the original to resume, or choose "):
        tiny_run.trained(configured(world, tmp_path, file))
    assert (tmp_path / "runs" / "run" / "method" / file.name).read_text() == kept == own_method.snippet()
    file.write_text(kept)
    tiny_run.trained(configured(world, tmp_path, file))


def test_a_finished_run_is_read_with_the_file_it_keeps(world: Path, tmp_path: Path) -> None:
    file = own_method.write(tmp_path / "mine", exported=False)
    run = tiny_run.trained(configured(world, tmp_path, file))
    expected = {name: value for task, name, value in scores(run) if task == "mood"}
    file.unlink()
    for stored in (run, run / "target" / "mood" / "weights"):
        assert json.loads(ran("eval", stored, "--task", "mood", "--json"))["metrics"] == expected
    ran("table", run.parent, "--costs")
    assert bpt_dist.Run.open(run).config.method.name == NAME
    ran("export", run, "--task", "mood", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "mood" / "weights.json").is_file()


def test_stored_tensors_are_read_with_the_file_they_were_trained_with_only(world: Path, tmp_path: Path) -> None:
    file = own_method.write(tmp_path / "mine", exported=False)
    config = configured(world, tmp_path, file)
    run = tiny_run.trained(config)
    weights = run / "target" / "mood" / "weights"
    assert read_facts(weights)["method_file_hash"] == digest(config.method)
    assert "path" not in read_facts(weights)["options"]
    words = ["eval", str(weights), "--task", "mood", "-c", str(run / "config.yaml")]
    file.write_text(file.read_text().replace("torch.relu", "torch.tanh"))
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).startswith(f"method.path: is not the file that {weights} was trained with (hash ")
    refused = CliRunner().invoke(app, [*words, "method=prompt_tuning"])
    assert str(refused.exception).endswith(f"a file outside the package; name that file, method.path={NAME}.py")
    again = own_method.write(tmp_path / "again", exported=False)
    ran(*words, f"method.path={again}")


def test_exported_prompts_need_the_file_no_more(world: Path, tmp_path: Path) -> None:
    file = own_method.write(tmp_path / "mine")
    run = tiny_run.trained(configured(world, tmp_path, file))
    file.unlink()
    out = tmp_path / "out"
    ran("export", run, "--task", "mood", "--out", out)
    shutil.rmtree(run / "method")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "sentence": "the cat sat not"}) + "\n")
    answers = ran("predict", out, "--rows", tmp_path / "rows.jsonl")
    assert json.loads(answers.splitlines()[0])["prediction"] in ("good", "not good")


# --- commands and library ---------------------------------------------------------------------------------------------------------


def test_a_table_is_trained_and_shows_the_method_by_its_name_or_label(world: Path, tmp_path: Path) -> None:
    plain = settings(world, tmp_path, own_method.write(tmp_path / "mine"))
    plain |= {"seeds": [0], "rows": [{}, {"method": {"bottleneck": 8}, "label": "wide"}, {"method": "prompt_tuning"}]}
    (tmp_path / "table.yaml").write_text(json.dumps(plain))
    runs = bpt_dist.train(tmp_path / "table.yaml")
    assert [run.name for run in runs] == [f"{NAME}-s0", "wide-s0", "prompt_tuning-s0"]
    shown = ran("table", tmp_path / "runs" / "run").replace("\\", "")  # of Markdown
    assert all(f"| {label} |" in shown for label in (f"{NAME} [{NAME}]", f"{NAME} [wide]", "PT"))


def test_the_rows_of_a_table_may_have_files_of_their_own_but_the_runs_of_one_file_had_one_content(
    world: Path, tmp_path: Path
) -> None:
    first, second = own_method.write(tmp_path / "mine"), tmp_path / "mine" / "another.py"
    second.write_text(first.read_text().replace(NAME, "another"))
    plain = {**settings(world, tmp_path, first), "seeds": [0, 1, 2], "rows": [{}, {"method": {"path": str(second), "length": 3}}]}
    plain |= {"data": {**plain["data"], "target_tasks": ["mood"]}, "target": {"steps": 1, "batch_size": 2, "lr": 0.3}}
    runs = configuration.expand(tiny_run.load(tmp_path, plain))
    for run in runs[:-1]:
        tiny_run.trained(run)
    assert mixture_notes(runs[:-1]) == []
    second.write_text(second.read_text().replace("torch.relu", "torch.tanh"))
    tiny_run.trained(configuration.expand(tiny_run.load(tmp_path, plain))[-1])
    (note,) = mixture_notes(runs)
    assert note.startswith("Not comparable: another-s2 had another content of method.path than the other runs; ")


def test_the_plan_counts_its_tensors(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(world, tmp_path, own_method.write(tmp_path / "mine"))))
    plan = json.loads(ran("plan", "-c", tmp_path / "run.yaml", "--json"))
    assert NAME in json.dumps(plan)
    assert str(3 * 32 + 2 * 4 * 32) in json.dumps(plan)


def test_the_library_trains_it_and_reads_the_file_again_at_every_call(world: Path, tmp_path: Path) -> None:
    file = own_method.write(tmp_path / "mine")
    plain = settings(world, tmp_path, file)
    del plain["method"]
    first = bpt_dist.train(plain, name="first", method={"path": file, "length": 3, "bottleneck": 4})
    file.write_text(file.read_text().replace("for P = 100", "for P=100"))
    second = bpt_dist.train(plain, name="second", method={"path": file, "length": 3, "bottleneck": 4})
    hashes = [read_json(run.folder / "inputs.json")["method.path"] for run in (first, second)]
    assert hashes[0] != hashes[1]
    assert scores(first.folder) == scores(second.folder)


# --- refused when it is imported --------------------------------------------------------------------------------------------------

CLASSES = own_method.snippet().partition("class ResidualPrompt")[0]
BROKEN = {
    "none": (CLASSES, "{file}: has none, and a method is one class that derives from Method; keep one"),
    "two": (
        own_method.snippet() + "\n\nclass Second(ResidualPrompt):\n    pass\n",
        "{file}: has 2 (ResidualPrompt, Second), and a method is one class that derives from Method; keep one",
    ),
    "no target": (
        CLASSES + "class Mine(Method):\n    pass\n",
        "{file}: Mine has no begin_target, which every method needs; add it",
    ),
    "import": (
        "import missing_module_of_mine\n" + own_method.snippet().replace("from __future__ import annotations\n", ""),
        "{file}:1: cannot be imported (ModuleNotFoundError: No module named 'missing_module_of_mine'); correct the file",
    ),
    "exit": (own_method.snippet() + "\nraise SystemExit(0)\n", "cannot be imported (SystemExit: 0); correct the file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_method_is_refused_in_one_line_at_its_place(what: str, world: Path, tmp_path: Path) -> None:
    text, expected = BROKEN[what]
    file = tmp_path / f"{NAME}.py"
    file.write_text(text)
    config = configured(world, tmp_path, file)
    with pytest.raises(ConfigError) as refused:
        tiny_run.trained(config)
    said = str(refused.value)
    assert said.startswith("method.path: ")
    assert expected.format(file=file) in said
    assert "\n" not in said
    assert refused.value.exit_code == 2
