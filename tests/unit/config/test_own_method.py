"""A method outside the package in a configuration: `method: {path: my_method.py}`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import own_method
import pytest
import yaml

from bpt_dist import config as configuration
from bpt_dist.config.own_method import OwnMethod, digest
from bpt_dist.config.schema import json_schema
from bpt_dist.errors import ConfigError

NAME = own_method.NAME


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return own_method.write(tmp_path / "mine")


def plain(method: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "backbone": "mini",
        "data": {"target_tasks": ["mini_rte"]},
        "target": {"steps": 3, "batch_size": 2, "lr": 0.3},
        **more,
    }


def load(folder: Path, data: dict[str, Any], *overrides: str) -> configuration.RunConfig:
    (folder / "run.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return configuration.load(folder / "run.yaml", overrides)


def refusal(folder: Path, data: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(folder, data, *overrides)
    return str(refused.value)


# --- how it is written ------------------------------------------------------------------------------------------------------------


def test_the_name_is_that_of_the_file_and_the_options_are_those_of_its_config(file: Path, tmp_path: Path) -> None:
    for section in ({"path": str(file), "bottleneck": 8}, {"bottleneck": 8, "path": str(file), "name": NAME}):
        found = load(tmp_path, plain(section)).method
        assert isinstance(found, OwnMethod)
        assert (found.name, found.path, found.bottleneck, found.length) == (NAME, file, 8, 100)  # type: ignore[attr-defined]
        assert type(found).RATE_IS_OF_PROMPTS
        assert found.__doc__ == "Options of residual prompt tuning."


def test_torch_is_not_imported_and_no_bytecode_is_written_beside_the_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain({"path": str(file)})))
    code = f"import sys; from bpt_dist import config; config.load(__import__('pathlib').Path({str(tmp_path / 'run.yaml')!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, env={**os.environ})
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_the_written_configuration_is_read_back(file: Path, tmp_path: Path) -> None:
    config = load(tmp_path, plain({"path": str(file), "bottleneck": 8}))
    (tmp_path / "again.yaml").write_text(configuration.resolved_yaml(config))
    assert configuration.load(tmp_path / "again.yaml") == config


def test_relative_paths_start_at_the_working_directory(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load(tmp_path, plain({"path": file.name})).method.name == NAME
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, plain({"path": f"~/{file.name}"})).method.path == file  # type: ignore[attr-defined]


def test_the_command_line_names_a_file_and_its_options(file: Path, tmp_path: Path) -> None:
    before = plain({"name": "bpt", "sigma": 1.0}, source={"steps": 2, "lr": 0.3})
    before["data"]["source_tasks"] = ["mini_nli"]
    config = load(tmp_path, before, "bottleneck=4", f"method.path={file}")
    assert (config.method.name, config.method.bottleneck) == (NAME, 4)  # type: ignore[attr-defined]
    assert config.data.source_tasks == ()
    # The file of the same method at another place: its options stay.
    moved = own_method.write(tmp_path / "elsewhere")
    config = load(tmp_path, plain({"path": str(file), "bottleneck": 4}), f"method.path={moved}")
    assert (config.method.path, config.method.bottleneck) == (moved, 4)  # type: ignore[attr-defined]
    assert load(tmp_path, plain({"path": str(file), "bottleneck": 4}), "method=prompt_tuning").method.name == "prompt_tuning"


def test_path_alone_is_the_backbones_where_the_method_has_none(file: Path, tmp_path: Path) -> None:
    assert load(tmp_path, plain("prompt_tuning"), "path=other").backbone.path == "other"
    assert "write one of backbone.path, method.path" in refusal(tmp_path, plain({"path": str(file)}), "path=other")


@pytest.mark.parametrize("step", [1, -1])
def test_a_name_and_a_file_that_differ_are_refused_in_any_order(file: Path, tmp_path: Path, step: int) -> None:
    text = refusal(tmp_path, plain("prompt_tuning"), *[f"method.path={file}", "method.name=bpt"][::step])
    assert text == f"command line: method.name: is 'bpt', and the file of method.path is {NAME}.py; remove the name"


def test_a_dictionary_and_arguments_name_it(file: Path) -> None:
    config = configuration.load_values(plain({"path": file, "bottleneck": 4}), {})
    assert (config.method.name, digest(config.method)) == (NAME, digest(config.method))
    for values in ({"method": {"bottleneck": 4, "path": file}}, {"method__path": file, "bottleneck": 4}):
        assert configuration.load_values(plain("lora"), values).method == config.method


def test_rows_hold_own_methods_beside_those_of_the_package(file: Path, tmp_path: Path) -> None:
    other = file.with_name("mine_too.py")
    other.write_text(file.read_text().replace(NAME, "mine_too"))
    rows = [
        {"method": "prompt_tuning"},
        {"method": {"path": str(file), "length": 5}},
        {"method": {"path": str(file)}, "label": "long"},
        {"method": {"path": str(other)}},
    ]
    config = load(tmp_path, plain({"name": "prompt_tuning", "length": 7}, seeds=[0, 1], rows=rows, tracking={"mlflow": False}))
    runs = configuration.expand(config)
    assert [run.name for run in runs[::2]] == ["prompt_tuning-s0", f"{NAME}-s0", "long-s0", "mine_too-s0"]
    assert [run.method.length for run in runs[::2]] == [7, 5, 100, 100]  # type: ignore[attr-defined]
    # And the reverse: a row of the package in a file of an own method.
    config = load(tmp_path, plain({"path": str(file), "length": 7}, rows=[{"method": {"length": 8}}, {"method": "prompt_tuning"}]))
    assert [(run.method.name, run.method.length) for run in configuration.expand(config)] == [  # type: ignore[attr-defined]
        (NAME, 8),
        ("prompt_tuning", 100),
    ]


# --- what a run is ----------------------------------------------------------------------------------------------------------------


def test_the_place_of_the_file_is_no_part_of_the_run_and_nothing_changes_for_other_methods(file: Path, tmp_path: Path) -> None:
    here = load(tmp_path, plain({"path": str(file)}))
    there = load(tmp_path, plain({"path": str(own_method.write(tmp_path / "elsewhere"))}))
    assert configuration.fingerprint(here) == configuration.fingerprint(there)
    assert configuration.changed_keys(here, there) == []
    assert "path" not in load(tmp_path, plain("prompt_tuning")).model_dump()["method"]


def test_the_content_is_that_of_the_time_when_the_configuration_was_read(file: Path, tmp_path: Path) -> None:
    before = load(tmp_path, plain({"path": str(file)}))
    first = digest(before.method)
    file.write_text(file.read_text() + "\n# changed\n")
    after = load(tmp_path, plain({"path": str(file)}))
    assert digest(before.method) == first
    assert digest(after.method) not in (first, None)
    assert digest(load(tmp_path, plain("prompt_tuning")).method) is None


# --- bad input --------------------------------------------------------------------------------------------------------------------

HEAD = "from bpt_dist.config import MethodConfig, PromptOptions\n"
FILES = {
    "no file": ("gone.py", None, r"no such file \(got '.*gone\.py'\); relative paths start at the working directory, /.+"),
    "no Python": ("mine.txt", HEAD, r"is no Python file \(got '.*mine\.txt'\); give a file NAME\.py"),
    "of the package": ("bpt.py", HEAD, r"'bpt' is a method of the package \(got '.*bpt\.py'\); rename the file"),
    "no identifier": ("my-method.py", HEAD, r"the file is named as its method, .* \(got 'my-method\.py'\); rename the file"),
    "capital": ("Mine.py", HEAD, r"the file is named as its method, .* \(got 'Mine\.py'\); rename the file"),
    "keyword": ("class.py", HEAD, r"the file is named as its method, .* \(got 'class\.py'\); rename the file"),
    "no Config": ("mine.py", HEAD, r".*mine\.py has no class Config\(MethodConfig\); every method file needs one"),
    "another Config": ("mine.py", "class Config:\n    pass\n", r".*mine\.py has no class Config\(MethodConfig\); .*"),
    "syntax": ("mine.py", HEAD + "\nclass Config(:\n", r".*mine\.py:3: is not Python \(invalid syntax\); correct the file"),
    "syntax found late": (
        "mine.py",
        HEAD + "class Config(MethodConfig):\n    name: str\n\nreturn 3\n",
        r".*mine\.py:5: is not Python \('return' outside function\); correct the file",
    ),
    "no text": ("mine.py", b"\xff\xfe", r".*mine\.py is not UTF-8 text; store it as UTF-8"),
    "zero byte": ("mine.py", b"a = 1\0", r".*mine\.py:\d+: is not Python \(.*null bytes.*\); correct the file"),
    "needs the rest": (
        "mine.py",
        HEAD + "WIDTH = 3\nclass Config(MethodConfig):\n    name: str\n    width: int = WIDTH\n",
        r".*mine\.py:5: class Config cannot be read without the rest of the file \(NameError: name 'WIDTH' is not defined\); "
        r"it may use bpt_dist\.config, math, pathlib, pydantic, re, typing",
    ),
    "own path": ("mine.py", HEAD + "class Config(MethodConfig):\n    path: str = 'x'\n", r".*has an option path, .* another name"),
    "other name": (
        "mine.py",
        HEAD + "class Config(MethodConfig):\n    name: str = 'yours'\n",
        r".*mine\.py: class Config names method 'yours', and the file is named 'mine'; rename one of them",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_bad_file_is_refused_in_one_line_at_its_place(what: str, tmp_path: Path) -> None:
    name, content, expected = FILES[what]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refusal(tmp_path, plain({"path": str(tmp_path / name)}))
    assert "\n" not in text
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/run\.yaml:2: method\.path: {expected}", text), text


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"lenght": 5}, "method.lenght: unknown key; did you mean length?"),
        ({"bottleneck": 0}, "method.bottleneck: should be greater than or equal to 1 (got 0)"),
        ({"name": "yours"}, f"method.name: is 'yours', and the file of method.path is {NAME}.py; remove the name"),
        ({"path": 3}, "method.path: should be the path of a Python file (got 3)"),
        ({"path": ["a.py"]}, "method.path: should be the path of a Python file (got ['a.py'])"),
    ],
)
def test_a_bad_section_is_refused_in_one_line(section: dict[str, Any], expected: str, file: Path, tmp_path: Path) -> None:
    text = refusal(tmp_path, plain({"path": str(file), **section}))
    assert re.sub(r"^\S+:\d+: ", "", text) == expected


def test_a_file_in_the_place_of_a_name_is_told_how(file: Path, tmp_path: Path) -> None:
    said = refusal(tmp_path, plain("mine.py"))
    assert said.endswith("method.name: no such method (got 'mine.py'); write method: {path: mine.py}")


def test_a_config_without_a_name_of_its_own_takes_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + 'class Config(PromptOptions):\n    """Mine."""\n')
    assert load(tmp_path, plain({"path": str(tmp_path / "mine.py")})).method.name == "mine"
    assert "did you mean length?" in refusal(tmp_path, plain({"path": str(tmp_path / "mine.py"), "lenght": 3}))


# --- editors ----------------------------------------------------------------------------------------------------------------------


def test_editors_accept_a_path_with_any_options_and_complain_about_what_is_none(file: Path) -> None:
    schema = json.loads(json.dumps(json_schema()))

    def valid(method: Any) -> bool:
        return jsonschema.Draft202012Validator(schema).is_valid(plain(method))

    assert valid({"path": "mine.py"})
    assert valid({"path": "mine.py", "name": "mine", "bottleneck": 3})
    assert valid({"name": "bpt", "num_particles": 3})
    assert not valid({"path": "mine.txt"})
    assert not valid({"path": 3})
    assert not valid({"path": "bpt.py", "name": "bpt"})
    assert not valid({"bottleneck": 3})
    assert not valid({"name": "mine"})
