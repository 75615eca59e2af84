"""The YAML reader: nothing is executed, expanded or read twice; what YAML 1.1 misreads is read as written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bpt_dist.config import strict_yaml
from bpt_dist.config.strict_yaml import parse_value
from bpt_dist.errors import ConfigError

PAYLOADS = {
    "python object": ("name: !!python/object/apply:os.system ['touch HIT']", "tag"),
    "python name": ("name: !!python/name:os.system", "tag"),
    "own tag": ("name: !function tasks.make", "tag"),
    "tag on a mapping": ("data: !!omap [a: 1]", "tag"),
    "anchor": ("name: &a run", "anchor"),
    "alias": ("name: &a run\noutput: *a", "alias"),
    "alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]", "alias"),
    "merge key": ("data: {<<: {root: x}}", "not a word"),
    "duplicate key": ("seed: 1\nseed: 2", "given twice, first in line 1"),
    "nested duplicate key": ("data:\n  root: a\n  root: b", "given twice"),
    "number as key": ("1: 2", "not a word"),
    "list as key": ("? [a, b]\n: 1", "not a word"),
    "environment": ("name: ${oc.env:HOME}", "resolver"),
    "nested resolver": ("name: ${a.${oc.env:HOME}}", "resolver"),
    "two documents": ("name: a\n---\nname: b", "not valid YAML"),
    "not a mapping": ("- name", "holds no keys"),
    "empty": ("", "holds no keys"),
    "unclosed": ("data: [a, b", "not valid YAML"),
    "tab": ("data:\n\tname: x", "not valid YAML"),
    "control character": ("name: a\x07", "not valid YAML"),
    "deep": ("a: " + "[" * 500, "nested deeper"),
    "large": ("name: " + "x" * 65536, "larger than 64 kB"),
}


def problems(path: Path) -> str:
    try:
        return "\n".join(f"{problem.dotted}: {problem.text}" for problem in strict_yaml.read(path).problems)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_files_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, words = PAYLOADS[payload]
    path = tmp_path / "payload.yaml"
    path.write_text(text)
    start = time.process_time()
    assert words in problems(path)
    assert time.process_time() - start < 2
    assert not (tmp_path / "HIT").exists()


def test_all_forbidden_forms_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "several.yaml"
    path.write_text("name: &a run\nseed: !!int 1\nseed: 2\noutput: *a\n")
    document = strict_yaml.read(path)
    assert sorted(problem.line or 0 for problem in document.problems) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a b.yaml", "a;b.yaml", "$(x).yaml", "a'b.yaml", "ä.yaml", "a#b?.yaml", "50%.yaml", "[x].yaml"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    """No shell reads it here; the command line of a job on several hosts has its own rule (`launcher/train.py`)."""
    (tmp_path / name).write_text("name: x\n")
    assert strict_yaml.read(tmp_path / name).data == {"name": "x"}


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "missing.yaml", "."):
        with pytest.raises(ConfigError, match="no such configuration file"):
            strict_yaml.read(tmp_path / name)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        strict_yaml.read(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("1.5e3", 1500.0), (".5", 0.5), ("3.", 3.0), ("-0.1", -0.1), ("+2", 2),
        ("010", "010"), ("1:30", "1:30"), ("0x10", "0x10"), ("2024-01-01", "2024-01-01"), ("5k", "5k"), ("e5", "e5"),
        ("null", None), ("~", None), ("", None), ("true", True), ("no", False), ("'no'", "no"), ("n", "n"), ("=", "="),
        ("[a,b]", ["a", "b"]), ("[]", []), ("1.0.0", "1.0.0"), ("-", None),
    ],
)  # fmt: skip
def test_values_are_read_as_people_mean_them(text: str, value: object) -> None:
    if text == "-":
        assert parse_value(text) == [None]
    else:
        read = parse_value(text)
        assert read == value
        assert type(read) is type(value)
