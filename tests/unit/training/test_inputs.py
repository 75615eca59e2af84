"""What a run reads is pinned by content: equal on all ranks, unchanged on a resume, named in the results, free to move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from bpt_dist import train
from bpt_dist.artifacts.results import collect
from bpt_dist.backbones.attention import ATTENTIONS
from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import Axis, Mesh, World
from bpt_dist.errors import ConfigError, Stopped
from bpt_dist.storage.checkpoint import read_tensors, write_tensors_atomic
from bpt_dist.storage.files import read_json
from bpt_dist.training.inputs import pin_inputs, read_inputs
from bpt_dist.training.sharding import placement

WIDTH = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def posterior(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a posterior that a finished run has left."""
    folder = tmp_path_factory.mktemp("source")
    plain = tiny_run.settings(world, {"name": "bpt"}, output=str(folder), target={"steps": 1, "eval_every": 1})
    return tiny_run.trained(tiny_run.load(folder, plain)) / "source" / "posterior"


def configured(world: Path, folder: Path, method: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    plain = tiny_run.settings(world, method or {"name": "prompt_tuning"}, output=str(folder / "runs"), **sections)
    plain["data"].pop("source_tasks", None)
    return tiny_run.load(folder, plain)


def adapting(world: Path, folder: Path, posterior: Path) -> RunConfig:
    """A run that adapts from a copy of `posterior` in its own folder."""
    shutil.copytree(posterior, folder / "posterior")
    plain = tiny_run.settings(world, {"name": "bpt"}, output=str(folder / "runs"))
    plain["source"] = {"posterior": str(folder / "posterior")}
    return tiny_run.load(folder, plain)


def stopped(config: RunConfig) -> None:
    """Start a run and stop it in its first target stage."""
    with pytest.raises(Stopped), tiny_run.session(config) as run:
        run.watchdog.request_stop("test")
        train.train(run)


def shift(posterior: Path) -> None:
    """Put other particles where a posterior is."""
    file = posterior / "posterior.safetensors"
    tensors = {name: tensor + 1 for name, tensor in read_tensors(file)[0].items()}
    write_tensors_atomic(file, tensors)


# --- from start to resume ---------------------------------------------------------------------------------------------------------


def test_another_posterior_under_the_same_path_is_refused_on_resume(world: Path, tmp_path: Path, posterior: Path) -> None:
    config = adapting(world, tmp_path, posterior)
    stopped(config)
    pinned = read_json(config.directory / "inputs.json")
    shift(tmp_path / "posterior")
    now = read_inputs(config)["source.posterior"]
    with pytest.raises(ConfigError) as refused:
        tiny_run.trained(config)
    text = str(refused.value)
    assert text.startswith("source.posterior: changed since ")
    assert f"(hash {pinned['source.posterior'][:12]} -> {now[:12]}); restore the original to resume" in text
    assert read_json(config.directory / "inputs.json") == pinned


def test_a_posterior_may_move_and_results_say_which_it_was(
    world: Path, tmp_path: Path, posterior: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = adapting(world, tmp_path, posterior)
    stopped(config)
    moved = shutil.move(tmp_path / "posterior", tmp_path / "elsewhere")
    caplog.set_level("INFO")
    run = tiny_run.trained(config.model_copy(update={"source": config.source.model_copy(update={"posterior": Path(moved)})}))
    assert f"source.posterior: {tmp_path / 'posterior'} -> {moved}" in caplog.text
    inputs = read_json(run / "inputs.json")
    assert read_json(run / "target" / "mood" / "result.json")["inputs"] == inputs
    assert {json.dumps(result.inputs) for result in collect([run]).results} == {json.dumps(inputs)}


def test_a_posterior_cannot_take_the_place_of_a_source_stage(world: Path, tmp_path: Path, posterior: Path) -> None:
    plain = tiny_run.settings(world, {"name": "bpt"}, output=str(tmp_path / "runs"))
    config = tiny_run.load(tmp_path, plain)
    stopped(config)
    given = config.source.model_copy(update={"posterior": posterior})
    with pytest.raises(ConfigError, match=r"source\.posterior: None -> "):
        tiny_run.trained(config.model_copy(update={"source": given}))


def replace_prompt(folder: Path) -> None:
    np.save(folder / "prompt.npy", np.ones((3, WIDTH), np.float32))


def replace_metric(folder: Path) -> None:
    file = folder / "tasks" / "tasks.yaml"
    file.write_text(file.read_text().replace("[good, not good], metrics: [accuracy]", "[good, not good], metrics: [macro_f1]"))


def replace_summary(folder: Path) -> None:
    file = folder / "tasks" / "tasks.yaml"
    file.write_text(file.read_text().replace("mood: {folder", "mood: {summary: how it feels, folder"))


def replace_unused_task(folder: Path) -> None:
    file = folder / "tasks" / "tasks.yaml"
    file.write_text(
        file.read_text().replace('["true", "false"], metrics: [accuracy, f1]', '["true", "false"], metrics: [accuracy]')
    )


@pytest.mark.parametrize(
    ("replace", "what"),
    [
        (replace_prompt, "method.init_file"),
        (replace_metric, "data.task_files: mood"),
        (replace_summary, None),
        (replace_unused_task, None),
    ],
)
def test_every_input_that_shapes_the_result_is_compared(
    replace: Callable[[Path], None], what: str | None, world: Path, tmp_path: Path
) -> None:
    tiny_run.write_tasks(tmp_path / "tasks")
    np.save(tmp_path / "prompt.npy", np.zeros((3, WIDTH), np.float32))
    method = {"name": "prompt_tuning", "init": "file", "init_file": str(tmp_path / "prompt.npy")}
    config = configured(world, tmp_path, method, data={"task_files": [str(tmp_path / "tasks" / "tasks.yaml")]})
    stopped(config)
    replace(tmp_path)
    if what is None:
        tiny_run.trained(config)
        return
    with pytest.raises(ConfigError, match=f"^{what}: changed since .* -> .*; restore the original to resume"):
        tiny_run.trained(config)


def test_what_changes_speed_only_may_change_and_is_logged(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(world, tmp_path)
    file = tmp_path / "zero.json"
    sharded = config.model_copy(update={"distribution": config.distribution.model_copy(update={"zero_config": file})})
    with tiny_run.session(config) as run:
        caplog.set_level("INFO")
        for text in ("{}", '{"zero_optimization": {}}'):
            file.write_text(text)
            pinned = pin_inputs(run.directory, sharded, World())
            assert read_json(config.directory / "inputs.json") == pinned
        assert "distribution.zero_config: changed (hash " in caplog.text
        raise_stop(run)


def raise_stop(run: Any) -> None:
    """Leave a run without training it."""
    run.directory.status("stopped")


def test_a_run_of_an_earlier_version_resumes_and_its_inputs_are_pinned_from_then_on(
    world: Path, tmp_path: Path, posterior: Path
) -> None:
    config = adapting(world, tmp_path, posterior)
    stopped(config)
    (config.directory / "inputs.json").unlink()
    run = tiny_run.trained(config)
    assert read_json(run / "inputs.json") == read_inputs(config)


# What the versions that pinned the column of the ids wrote for `mood` and `count`, whose task file names none; at commit 517506e.
OLD_HASHES = {
    "data.task_files: mood": "a36ff42f10244f6b9b3fd9df08010b31b94a52cfc2daddd0c219cbd09a4ad848",
    "data.task_files: count": "6457cd46fcd6d5c3243cc26bb102bdc888f8c6057e5a7e8f7710bd5579445725",
}


def name_the_ids(folder: Path) -> None:
    file = folder / "tasks" / "tasks.yaml"
    file.write_text(file.read_text().replace("mood: {folder", "mood: {id: number, folder"))


@pytest.mark.parametrize("named", [False, True])
def test_a_task_pinned_with_its_column_of_ids_is_the_same_task(world: Path, tmp_path: Path, named: bool) -> None:
    tiny_run.write_tasks(tmp_path / "tasks")
    config = configured(world, tmp_path, data={"task_files": [str(tmp_path / "tasks" / "tasks.yaml")]})
    stopped(config)
    pinned = config.directory / "inputs.json"
    assert read_json(pinned).keys() == OLD_HASHES.keys()
    pinned.write_text(json.dumps(OLD_HASHES))
    if named:
        name_the_ids(tmp_path)  # ids are only checked
    tiny_run.trained(config)
    assert read_json(pinned) == read_inputs(config)


def test_a_task_pinned_with_its_column_of_ids_may_not_change_otherwise(world: Path, tmp_path: Path) -> None:
    tiny_run.write_tasks(tmp_path / "tasks")
    config = configured(world, tmp_path, data={"task_files": [str(tmp_path / "tasks" / "tasks.yaml")]})
    stopped(config)
    (config.directory / "inputs.json").write_text(json.dumps(OLD_HASHES))
    replace_metric(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.task_files: mood: changed since "):
        tiny_run.trained(config)
    assert read_json(config.directory / "inputs.json") == OLD_HASHES


# --- between ranks ----------------------------------------------------------------------------------------------------------------


class TwoRanks(World):
    """Rank 0 of two, where rank 1 has read what `other` makes of rank 0's answer."""

    other: Callable[[Any], Any]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, type(self).other(value)]

    def broadcast(self, value: Any) -> Any:
        return value


def with_other(other: Callable[[Any], Any]) -> World:
    return type("Two", (TwoRanks,), {"other": staticmethod(other)})(size=2, hosts=("node-a", "node-b"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda own: {**own, "source.posterior": "0" * 64}, r"^source\.posterior: differs between rank 0 on node-a \(hash "
         r"[0-9a-f]{12}\) and rank 1 on node-b \(000000000000\); copy the same files to all hosts$"),
        (lambda own: {**own, "distribution.zero_config": "1" * 64}, r"^distribution\.zero_config: differs .*\(hash absent\)"),
        (lambda own: ConfigError("source.posterior: no posterior.safetensors"), "^rank 1 on node-b: source.posterior: no post"),
    ],
)  # fmt: skip
def test_ranks_that_read_something_else_are_named(
    other: Callable[[Any], Any], message: str, world: Path, tmp_path: Path, posterior: Path
) -> None:
    config = adapting(world, tmp_path, posterior)
    with tiny_run.session(config) as run:
        with pytest.raises(ConfigError, match=message):
            pin_inputs(run.directory, config, with_other(other))
        raise_stop(run)


def test_replicas_that_start_from_other_tensors_are_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_run.stage_of(monkeypatch, configured(world, tmp_path)) as stage:
        (prompt,) = [name for name, _ in stage.method.named_parameters()]
        stage.mesh = Mesh(with_other(lambda own: (*own[:3], {**own[3], prompt: "0" * 64})), data=Axis(0, 2))
        with pytest.raises(
            ConfigError, match=rf"^target/mood step 0: {prompt} differs between rank 0 on node-a and rank 1 on node-b"
        ):
            stage.restore()
        stage.mesh = Mesh(with_other(lambda own: (*own[:2], 1, {prompt: "0" * 64})), data=Axis(0, 2))
        stage.restore()


# --- what was chosen by rule -----------------------------------------------------------------------------------------------------


def test_attention_is_chosen_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(world, tmp_path)
    probes: list[str] = []

    def probe(kind: str) -> None:
        monkeypatch.setattr(placement, "default_attention", lambda *_: probes.append(kind) or kind)

    probe("eager")
    stopped(config)
    assert read_json(config.directory / "run.json")["choices"] == {"attention": "eager"}
    probe("sdpa")  # as another version or device would choose
    with tiny_run.session(config) as run:
        assert run.backbone.attention == "eager"
        assert run.backbone.packed.encoder.attention is ATTENTIONS["eager"]
        run.watchdog.request_stop("test")
        with pytest.raises(Stopped):
            train.train(run)
    assert probes == ["eager"]
