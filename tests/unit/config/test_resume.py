"""Which configurations are the same run: keys that may change, inputs that may move, records of earlier versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bpt_dist import config
from bpt_dist.config.keys import fields_by_key, leaves
from bpt_dist.config.own_method import OwnMethod

SINGLE = """\
name: single
method: {name: bpt, sigma: 1.0}
data: {source_tasks: [mini_nli, mini_span], target_tasks: [mini_rte]}
source: {steps: 40, lr: 1e-1}
target: {steps: 40}
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_text(text: str, *words: str) -> config.RunConfig:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return config.load(path, words)

    return load_text


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """What writes a run's `config.yaml` and returns the file."""

    def write(run: config.RunConfig) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(config.resolved_yaml(run))
        return file

    return write


def other(value: Any) -> Any:
    """A different value; it need not be a valid one."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "something else"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_key_is_either_part_of_the_fingerprint_or_changeable(load: Any) -> None:
    run = load(SINGLE)
    mark, with_paths = config.fingerprint(run), config.fingerprint(run, with_paths=True)
    for key, value in leaves(run.model_dump(mode="json")).items():
        section, _, last = key.rpartition(".")
        if section:
            part = getattr(run, section).model_copy(update={last: other(value)})
            changed = run.model_copy(update={section: part})
        else:
            changed = run.model_copy(update={last: other(value)})
        # A path may change, but whether there is a posterior may not.
        may_change = key in config.CHANGEABLE or (key in config.MOVABLE and key != "source.posterior")
        assert config.changed_keys(run, changed) == ([] if may_change else [key])
        assert (config.fingerprint(changed) == mark) == may_change
        assert (config.fingerprint(changed, with_paths=True) == with_paths) == (key in config.CHANGEABLE)


def test_changeable_keys_exist(load: Any) -> None:
    options = (type(load(SINGLE).method), OwnMethod)
    assert {key for each in options for key in fields_by_key(each)} >= config.CHANGEABLE | config.MOVABLE
    assert not config.CHANGEABLE & config.MOVABLE


def test_another_method_changes_its_own_keys(load: Any) -> None:
    before, after = load(SINGLE), load(SINGLE, "method=vanilla_transfer", "target.lr=0.3")
    changed = config.changed_keys(before, after)
    assert {"method.name", "method.sigma", "target.lr"} <= set(changed)
    assert changed == sorted(changed)


def test_a_fingerprint_does_not_depend_on_how_it_was_written(load: Any) -> None:
    spelled = SINGLE.replace("1e-1", "0.1").replace("method: {name: bpt, sigma: 1.0}", "method: {sigma: 1, name: bpt}")
    assert config.fingerprint(load(SINGLE)) == config.fingerprint(load(spelled, "output=elsewhere"))


# --- runs of earlier versions ---------------------------------------------------------------------------------------------


def first_fingerprint(run: config.RunConfig) -> str:
    """The fingerprint as the first version wrote it: every key but the changeable ones, paths included."""
    shaping = {key: value for key, value in leaves(run.model_dump(mode="json")).items() if key not in config.CHANGEABLE}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_a_run_of_the_first_version_resumes_where_its_files_are_and_after_they_moved(load: Any, store: Any) -> None:
    weighted = SINGLE.replace("lr: 1e-1", "lr: 1e-5, task_weights: {mini_nli: 2.0}")
    run = load(weighted, "data.root=here")
    record = {"fingerprint": first_fingerprint(run)}
    assert record["fingerprint"] != config.fingerprint(run)
    file = store(run)
    assert config.is_same_run(record, file, run)
    moved = load(weighted, "data.root=there", "backbone=t5-small")
    assert config.is_same_run(record, file, moved)
    assert config.moved_inputs(file, moved) == ["backbone.path: mini -> t5-small", "data.root: here -> there"]
    assert config.changes(file, moved) == []
    # The resume has written the new places down; its record knows both fingerprints.
    assert config.is_same_run(record | {"resume_fingerprint": config.fingerprint(moved)}, store(moved), run)


def test_a_run_with_a_changed_key_is_another_run(load: Any, store: Any) -> None:
    run, other = load(SINGLE), load(SINGLE, "target.steps=41", "data.root=there")
    for record in ({"fingerprint": first_fingerprint(run)}, {"fingerprint": config.fingerprint(run)}):
        assert not config.is_same_run(record, store(run), other)
    assert config.changes(store(run), other) == ["target.steps: 40 -> 41"]


@pytest.mark.parametrize("of_version", [first_fingerprint, config.fingerprint])
def test_a_configuration_edited_in_the_run_directory_does_not_make_another_run_the_same(
    of_version: Any, load: Any, store: Any
) -> None:
    run, edited = load(SINGLE), load(SINGLE, "target.steps=41")
    assert not config.is_same_run({"fingerprint": of_version(run)}, store(edited), edited)


def test_a_run_of_a_version_without_a_key_resumes_under_its_default(load: Any, store: Any) -> None:
    run = load(SINGLE)
    file = store(run)
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "shared_texts" not in line))
    plain = {key: value for key, value in leaves(run.model_dump(mode="json")).items() if key != "source.shared_texts"}
    shaping = {key: value for key, value in plain.items() if key not in config.CHANGEABLE}
    record = {"fingerprint": hashlib.sha256(json.dumps(shaping, sort_keys=True, separators=(",", ":")).encode()).hexdigest()}
    assert config.is_same_run(record, file, run)
    assert not config.is_same_run(record, file, load(SINGLE, "source.shared_texts=false"))
    assert config.changes(file, load(SINGLE, "source.shared_texts=false")) == ["source.shared_texts: True -> False"]


def test_task_files_that_moved_away_do_not_hide_what_was_stored(load: Any, store: Any, tmp_path: Path) -> None:
    tasks = "mood: {folder: mood, fields: [text], label: label, label_words: [good, bad], metrics: [accuracy]}"
    for name in ("here.yaml", "there.yaml"):
        (tmp_path / name).write_text(tasks)
    run, moved = (load(SINGLE, f"data.task_files=[{tmp_path / name}]") for name in ("here.yaml", "there.yaml"))
    file = store(run)
    (tmp_path / "here.yaml").unlink()
    assert config.is_same_run({"fingerprint": first_fingerprint(run)}, file, moved)
    assert config.is_same_run({"fingerprint": config.fingerprint(run)}, file, moved)


@pytest.mark.parametrize("text", [None, "", "{", "- a list"])
def test_a_stored_configuration_that_cannot_be_read_is_no_match(text: str | None, load: Any, tmp_path: Path) -> None:
    run, file = load(SINGLE), tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    assert not config.is_same_run({"fingerprint": "0" * 64}, file, run)
    assert config.is_same_run({"fingerprint": config.fingerprint(run)}, file, run)
    assert config.moved_inputs(file, run) == []
