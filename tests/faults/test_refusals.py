"""F14, F15, F16, F19: what a user got wrong is refused with its place, before anything is trained; nothing changes silently."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_t5
import yaml
from fault_figures import measured, record_figure
from server import REPOSITORY, Start
from trials import Trials

from bpt_dist import config as configuration
from bpt_dist.config import DataConfig
from bpt_dist.config.keys import leaves
from bpt_dist.data import rows
from bpt_dist.errors import ConfigError, DataError
from bpt_dist.storage.files import read_json
from bpt_dist.tasks.user_tasks import load_user_tasks

# --- F14: the configuration ---


def typo(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 1)
    return rng.choice(
        [word[:at] + word[at + 1 :], word[:at] + word[at + 1] + word[at] + word[at + 2 :], word[:at] + "x" + word[at:]]
    )


def mutated(plain: dict[str, Any], kind: str, rng: random.Random) -> tuple[str, str, str]:
    """Return (text of the file, the key the refusal must name, the right name where it is a typo)."""
    changed = copy.deepcopy(plain)
    section, key = rng.choice(
        [(s, k) for s in ("method", "data", "source", "target", "evaluation") for k in changed[s] if len(k) > 3]
    )
    if kind == "typo":
        wrong = typo(key, rng)
        changed[section][wrong] = changed[section].pop(key)
        return yaml.safe_dump(changed), f"{section}.{wrong}", key
    if kind == "type":
        changed[section][key] = {"a": 1}
        return yaml.safe_dump(changed), f"{section}.{key}", ""
    if kind == "unit":
        changed["target"]["lr"] = "3 per step"
        return yaml.safe_dump(changed), "target.lr", ""
    if kind == "missing":
        del changed["method"]
        return yaml.safe_dump(changed), "method", ""
    text = yaml.safe_dump(changed)
    if kind == "duplicate":
        return text + "seed: 1\nseed: 2\n", "seed", ""
    return text + "notes: !!python/object/apply:os.getcwd []\n", "notes", ""


def test_mutated_configurations_are_refused(trials: Trials, tmp_path: Path) -> None:
    rng, plain = random.Random(14), trials.job().plain
    kinds = ("typo", "type", "unit", "missing", "duplicate", "tag")
    refused = typos = understood = 0
    for number in range(60):
        kind = kinds[number % 6] if number >= 30 else "typo" if number % 2 else "type"
        text, key, right = mutated(plain, kind, rng)
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError) as refusal:
            configuration.load(file)
        said = str(refusal.value)
        assert re.search(rf"{re.escape(str(file))}:\d+: ", said), said
        assert key.split(".")[-1] in said, (key, said)
        refused += refusal.value.exit_code == 2
        typos += bool(right)
        understood += bool(right) and f"did you mean {right}" in said
    record_figure("F14", "mutated configurations", trials=60, passed=refused, typos=typos, typos_understood=understood)
    assert refused == 60
    assert understood >= 0.9 * typos


def test_a_refusal_takes_a_moment_and_no_torch(trials: Trials, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**trials.job().plain, "sourse": {}}))
    program = (
        "import runpy, sys; door = runpy.run_path(sys.argv[1])['main']; code = door(['--config', sys.argv[2]]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    worst = 0.0
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, REPOSITORY / "launcher" / "train.py", file], check=False, capture_output=True, text=True
        )
        worst = max(worst, time.monotonic() - began)
        assert done.returncode == 2, done.stderr
    record_figure("F14", "time of a whole process", trials=3, passed=3, worst_seconds=round(worst, 2))
    assert worst <= 4  # 2 s on a quiet machine


# --- F15: rows ---

GOOD = {"sentence": "the cat", "label": 0}
BAD_ROWS: dict[str, bytes] = {
    "cut line": b'{"sentence": "the cat", "lab',
    "not an object": b'["the cat", 0]',
    "a number": b"7",
    "a text": b'"the cat"',
    "null": b"null",
    "two objects": b'{"sentence": "a", "label": 0} {"sentence": "b", "label": 0}',
    "single quotes": b"{'sentence': 'the cat', 'label': 0}",
    "trailing comma": b'{"sentence": "the cat", "label": 0,}',
    "unquoted key": b'{sentence: "the cat", "label": 0}',
    "comment": b'// {"sentence": "the cat", "label": 0}',
    "unknown label": b'{"sentence": "the cat", "label": 7}',
    "negative label": b'{"sentence": "the cat", "label": -1}',
    "label as a fraction": b'{"sentence": "the cat", "label": 0.5}',
    "label as a word": b'{"sentence": "the cat", "label": "good-ish"}',
    "label null": b'{"sentence": "the cat", "label": null}',
    "label true": b'{"sentence": "the cat", "label": true}',
    "label in a list": b'{"sentence": "the cat", "label": [0]}',
    "label missing": b'{"sentence": "the cat"}',
    "field missing": b'{"text": "the cat", "label": 0}',
    "field null": b'{"sentence": null, "label": 0}',
    "field a number": b'{"sentence": 5, "label": 0}',
    "field a list": b'{"sentence": ["the cat"], "label": 0}',
    "field an object": b'{"sentence": {"a": "the cat"}, "label": 0}',
    "empty text": b'{"sentence": "", "label": 0}',
    "blank text": b'{"sentence": "  ", "label": 0}',
    "tabs only": b'{"sentence": "\\t\\n", "label": 0}',
    "NaN label": b'{"sentence": "the cat", "label": NaN}',
    "infinite label": b'{"sentence": "the cat", "label": Infinity}',
    "NaN elsewhere": b'{"sentence": "the cat", "label": 0, "weight": NaN}',
    "BOM": b'\xef\xbb\xbf{"sentence": "the cat", "label": 0}',
    "invalid UTF-8": b'{"sentence": "the \xff cat", "label": 0}',
    "UTF-16": '{"sentence": "the cat", "label": 0}'.encode("utf-16-le"),
    "half a character": b'{"sentence": "the \xc3", "label": 0}',
    "lone surrogate": b'{"sentence": "the \\ud800 cat", "label": 0}',
    "line of 2 MB": json.dumps({"sentence": "cat " * 500_000, "label": 0}).encode(),
    "duplicate key": b'{"sentence": "the cat", "label": 0, "label": 1}',
    "duplicate id": b'{"id": "train3", "sentence": "the cat", "label": 0}',
    "raw control character": b'{"sentence": "the \x01 cat", "label": 0}',
    "NUL": b'{"sentence": "the cat", "label": 0}\x00',
    "deep nesting": b'{"sentence": "the cat", "label": 0, "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
}


def mood(trials: Trials, folder: Path) -> tuple[Any, Path]:
    shutil.copytree(trials.world / "tasks", folder)
    spec = load_user_tasks([folder / "tasks.yaml"])["mood"]
    return dataclasses.replace(spec, id_column="id"), folder / "mood" / "train.jsonl"


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line(case: str, trials: Trials, tmp_path: Path) -> None:
    with measured("F15", "bad rows", case):
        spec, file = mood(trials, tmp_path / "tasks")
        with file.open("ab") as lines:
            lines.write(BAD_ROWS[case] + b"\n")
        with pytest.raises(DataError, match=re.escape(f"{file}:33")) as refusal:
            rows.load(spec, DataConfig())
        assert refusal.value.exit_code == 65


GOOD_ROWS = {
    "CRLF": b'{"sentence": "the cat", "label": 0}\r\n',
    "no newline at the end": b'{"sentence": "the cat", "label": 0}',
    "end token in the text": b'{"sentence": "the </s> cat <pad> <extra_id_0>", "label": 0}\n',
    "escape character": b'{"sentence": "the \\u001b[31m cat", "label": 0}\n',
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_a_harmless_row_is_accepted(case: str, trials: Trials, tmp_path: Path) -> None:
    with measured("F15", "odd but harmless rows", case):
        spec, file = mood(trials, tmp_path / "tasks")
        with file.open("ab") as lines:
            lines.write(GOOD_ROWS[case])
        assert len(rows.load(spec, DataConfig())["train"]) == 33


# --- F16: backbone and tokenizer ---


def swapped_pieces(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def swapped_label_words(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["w120"] = vocabulary["w120"], vocabulary["good"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def other_size(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_t5.make(folder, layers=3)


@pytest.mark.parametrize("moment", ["at resume", "at adaptation"])
@pytest.mark.parametrize(
    ("change", "what"), [(swapped_pieces, "tokenizer"), (swapped_label_words, "tokenizer"), (other_size, "backbone")]
)
def test_another_backbone_or_tokenizer_is_refused(
    change: Callable[[Path], None], what: str, moment: str, trials: Trials, tmp_path: Path
) -> None:
    with measured("F16", moment, change.__name__):
        mine = shutil.copytree(trials.world / "t5", tmp_path / "t5")
        if moment == "at resume":
            job = trials.job(backbone={"path": str(mine)})
            job.start("stage.finished,stage=source,kill")
            change(mine)
        else:
            change(mine)
            job = trials.job(backbone={"path": str(mine)}, source={"posterior": str(trials.reference())})
        ended = trials.server.start(Start(job.config))
        assert ended.codes == [2], ended.screen
        assert (f"the {what} at" if moment == "at resume" else f"another {what}") in ended.screen
        assert not list(job.directory.glob("target/*/checkpoints"))


# --- F19: changed configuration, data, code ---


def changed_value(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    return 7


def test_every_field_is_classified(trials: Trials) -> None:
    """A field shapes the result, and is in the fingerprint, or is listed as changeable."""
    config = configuration.load(trials.job().config)
    before = leaves(config.model_dump(mode="json"))
    # Inputs may move, for their contents are compared; only whether there is a posterior shapes the result.
    may_change = configuration.CHANGEABLE | configuration.MOVABLE - {"source.posterior"}
    changeable = sorted(key for key in before if key in may_change)
    silent = []
    for key in before:
        tree = config.model_dump(mode="json")
        section = tree
        *path, last = key.split(".")
        for name in path:
            section = section[name]
        section[last] = changed_value(section[last])
        # Not validated, and said to be odd when it is written out: what a field would accept is another question.
        other = config.model_construct(**tree)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            shapes = configuration.fingerprint(other) != configuration.fingerprint(config)
        if shapes == (key in may_change):
            silent.append(key)
    record_figure(
        "F19", "fields of the configuration", trials=len(before), passed=len(before) - len(silent), changeable=len(changeable)
    )
    assert silent == []


CHANGES: dict[str, tuple[str, Any]] = {
    "seed": ("seed", 5),
    "learning rate": ("source.lr", 0.2),
    "steps": ("target.steps", 5),
    "batch size": ("source.batch_size", 3),
    "particles": ("method.num_particles", 3),
    "tasks": ("data.target_tasks", ["mood"]),
    "exact": ("distribution.exact", True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_key_is_named_and_refused(case: str, trials: Trials) -> None:
    key, value = CHANGES[case]
    with measured("F19", "resume with a changed key", key):
        job = trials.job()
        job.start("stage.finished,stage=source,kill")
        section, _, last = key.rpartition(".")
        (job.plain.setdefault(section, {}) if section else job.plain)[last] = value
        job.write()
        ended = trials.server.start(Start(job.config))
        assert ended.codes == [2], ended.screen
        assert f"  {key}" in ended.screen
        assert "restore these values" in ended.screen


def test_other_rows_are_refused_at_resume(trials: Trials, tmp_path: Path) -> None:
    with measured("F19", "resume with changed rows", "one word of one row"):
        shutil.copytree(trials.world / "tasks", tmp_path / "tasks")
        job = trials.job(data={"task_files": [str(tmp_path / "tasks" / "tasks.yaml")]})
        job.start("stage.finished,stage=source,kill")
        file = tmp_path / "tasks" / "truth" / "train.jsonl"
        kept = file.read_text()
        file.write_text(kept.replace("cat", "dog", 1))
        ended = trials.server.start(Start(job.config))
        assert ended.codes == [65], ended.screen
        assert "data: the rows of source/truth/train (stage, task and split) changed since" in ended.screen
        assert re.search(r"was started \(hash [0-9a-f]+ -> [0-9a-f]+\); restore the original files", ended.screen)
        file.write_text(kept)
        job.finish()


def test_another_version_of_the_code_is_recorded_and_said(trials: Trials) -> None:
    with measured("F19", "resume with other code", "git commit"):
        job = trials.job()
        job.start("stage.finished,stage=source,kill")
        record = read_json(job.directory / "run.json")
        record["openings"][0]["git"] = {"commit": "0" * 40, "dirty": False}
        (job.directory / "run.json").write_text(json.dumps(record))
        ended = job.start()
        assert ended.codes == [0]
        assert "resuming with another git" in ended.screen
        openings = read_json(job.directory / "run.json")["openings"]
        assert openings[0]["git"] != openings[-1]["git"]


def test_a_posterior_is_taken_by_the_backbone_it_was_made_with(trials: Trials) -> None:
    job = trials.job(source={"posterior": str(trials.reference())})
    job.finish()
    assert read_json(job.directory / "status.json")["state"] == "finished"
    assert not (job.directory / "source").exists()  # taken, not trained again
