"""A user's task needs YAML only; what is wrong with the YAML is reported with file, key, value and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rendered import render_all

from bpt_dist.data import rows
from bpt_dist.errors import ConfigError
from bpt_dist.tasks.catalogue import TASKS, get
from bpt_dist.tasks.user_tasks import load_user_tasks

REVIEWS = """
reviews:
  summary: stars of a review
  folder: reviews
  fields: [title, body.text]
  label: stars
  label_words: {1: bad, 5: good}
  metrics: [macro_f1, accuracy]
  max_source_length: 64
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_user_tasks([written(tmp_path, text)])
    return str(error.value)


def test_a_users_own_task_loads_and_renders(tmp_path: Path, options: Any) -> None:
    spec = load_user_tasks([written(tmp_path, REVIEWS)])["reviews"]
    (tmp_path / "reviews").mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"title": "T", "body": {"text": "x"}, "stars": 1 + 4 * (i % 2)}) for i in range(10)]
        (tmp_path / "reviews" / f"{split}.jsonl").write_text("\n".join(lines))
    examples = render_all(spec, rows.load(spec, options())["test"])
    assert (examples[1].source, examples[1].target, examples[1].label) == ("reviews title: T body.text: x", "good", 1)
    assert (spec.headline, spec.max_source_length) == ("macro_f1", 64)


def test_free_text_and_scores_are_tasks_too(tmp_path: Path) -> None:
    text = """
answers: {folder: a, fields: {question: "ask:"}, target: answers.text, metrics: [squad_f1]}
rating: {hub: own/ratings, config: small, fields: [text], label: rating, score: [1, 5, 0.5], metrics: [pearson], split: halves}
"""
    tasks = load_user_tasks([written(tmp_path, text)])
    assert (tasks["answers"].kind, tasks["answers"].fields[0].label) == ("text", "ask:")
    assert tasks["rating"].label_words == ("1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0", "4.5", "5.0")
    assert (tasks["rating"].hub_name, tasks["rating"].hub_configs, tasks["rating"].splits.kind) == (
        "own/ratings",
        ("small",),
        "halves",
    )


def test_all_problems_come_at_once_with_file_key_and_remedy(tmp_path: Path) -> None:
    message = refusal(tmp_path, """
reviews: {folder: a, hub: b/c, field: [x], label: l, label_words: [yes, no], metrics: [acuracy], max_source_length: 1}
other: {folder: a, fields: [x], label: l, target: t, metrics: []}
""").splitlines()  # fmt: skip
    path = tmp_path / "tasks.yaml"
    for start in (
        f"{path}: reviews.field: unknown key; did you mean 'fields'?",
        f"{path}: reviews.folder: give either `folder` or `hub`",
        f"{path}: reviews.label_words: [True, False] must be texts; put quotes around",
        f"{path}: reviews.metrics: 'acuracy' does not fit this task; it can be accuracy, f1, macro_f1, matthews",
        f"{path}: reviews.max_source_length: 1 must be a number of tokens from 2 to 4096",
        f"{path}: other.label: give either `label` (classes or scores) or `target`",
        f"{path}: other.metrics: list one or more of",
    ):
        assert any(line.startswith(start) for line in message), start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[title, body.text]", "['x.__class__[0]']"), "must be the name of a column"),
        (("[title, body.text]", "['{x.__class__}']"), "must be the name of a column"),
        (("[title, body.text]", "[]"), "list the columns"),
        (("[title, body.text]", "{a: 1}"), "must be the name of a column"),
        (("{1: bad, 5: good}", "{1: bad, 5: bad}"), "must differ from each other"),
        (("{1: bad, 5: good}", "[bad]"), "at least two classes"),
        (("{1: bad, 5: good}", "{1: bad, 5: ' good'}"), "must be texts"),
        (("{1: bad, 5: good}", "{1.5: bad, 5: good}"), "texts or whole numbers"),
        (("[macro_f1, accuracy]", "[pearson]"), "'pearson' does not fit this task"),
        (("[macro_f1, accuracy]", "[multirc_em]"), "'multirc_em' does not fit this task"),
        (("[macro_f1, accuracy]", "accuracy"), "list one or more of"),
        (("reviews:\n", "../x:\n"), "task names are lower-case letters"),
        (("folder: reviews", "folder: 3"), "3 must be a text"),
        (("label: stars", "label: 3"), "3 must be the name of a column"),
        (("max_source_length: 64", "split: thirds"), "'thirds' must be official, halves or carve"),
        (("max_source_length: 64", "score: [5, 1, 1]"), "[low, high, step]"),
        (("max_source_length: 64", "score: x"), "[low, high, step]"),
        (("max_source_length: 64", "unlabelled: keep"), "unlabelled: 'keep' must be drop or refuse"),
        (("max_source_length: 64", "unlabelled: null"), "unlabelled: None must be drop or refuse"),
        (("max_source_length: 64", "empty_text: skip"), "empty_text: 'skip' must be keep or drop or refuse"),
    ],
)
def test_what_is_wrong_is_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in REVIEWS
    assert message in refusal(tmp_path, REVIEWS.replace(*change))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
PAYLOADS = (
    ("code", "a: !!python/object/apply:os.system ['touch HACKED']", "anchors, aliases and tags"),
    ("function", "a: !function x.y", "anchors, aliases and tags"),
    ("standard tag", "a: !!str b", "anchors, aliases and tags"),
    ("alias bomb", BOMB, "anchors, aliases and tags"),
    ("merge key", "a: &x {folder: y}\nb:\n  <<: *x\n", "anchors, aliases and tags"),
    ("duplicate task", REVIEWS + REVIEWS, "line 11: 'reviews' is there twice, first in line 2"),
    ("duplicate key", REVIEWS + "  folder: other\n", "line 10: 'folder' is there twice, first in line 4"),
    ("duplicate key in one line", "a: {folder: x, folder: y}", "line 1: a key is there twice"),
    ("keys that mean the same", "a: {label_words: {1: x, 0x1: y}}", "line 1: a key is there twice"),
    ("too large", "#" * 70_000, "70,000 bytes; a task file has 64,000 at most"),
    ("deep nesting", "[" * 30_000, "nested deeper than 8 levels"),
    ("two documents", "a: {}\n---\nb: {}\n", "not valid YAML"),
    ("not UTF-8", "a: \udcff", "not valid YAML"),
    ("control character", "a: \x07", "not valid YAML"),
    ("list", "[1, 2]", "a task file is a mapping"),
    ("nothing", "", "a task file is a mapping"),
    ("list as key", "[a]: {}", "not valid YAML"),
)


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in PAYLOADS], ids=[case[0] for case in PAYLOADS])
def test_hostile_yaml_is_refused_quickly_and_runs_nothing(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tasks.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    start = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_user_tasks([path])
    assert time.process_time() - start < 2
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_and_a_name_defined_twice_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_user_tasks([tmp_path / "none.yaml"])
    path = written(tmp_path, REVIEWS)
    with pytest.raises(ConfigError, match="an earlier task file defines this name"):
        load_user_tasks([path, path])


def test_unknown_names_get_the_nearest_and_own_tasks_come_first(tmp_path: Path) -> None:
    own = load_user_tasks([written(tmp_path, REVIEWS.replace("reviews:", "rte:"))])
    assert get("rte", own) is own["rte"]
    assert get("rte") is get("rte", {}) is TASKS["rte"]
    with pytest.raises(ConfigError, match="unknown task 'boolqq'; did you mean 'boolq'"):
        get("boolqq", own)
    with pytest.raises(ConfigError, match="`bpt-dist tasks` lists them"):
        get("zzzzzz")


def test_looking_up_a_task_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'sklearn', 'scipy'}"
    code = f"import sys, bpt_dist.tasks.catalogue as t; t.get('rte'); print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
