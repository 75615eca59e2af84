"""`bpt-dist predict`: lines in, lines out; what cannot be used is named on one screen with exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exported
import pytest
import tiny_run
import tiny_t5

from bpt_dist.commands.main import main

PROGRAM = "import sys; from bpt_dist.commands.main import main; sys.exit(main())"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    return tiny_run.trained(tiny_run.load(world, tiny_run.settings(world, {"name": "vanilla_transfer"})))


@pytest.fixture
def adapter(run: Path) -> str:
    return str(run / "target" / "mood" / "adapter")


def file_of(folder: Path, lines: Sequence[Any], *, end: str = "\n") -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + end.encode() for line in lines))
    return path


def predict(rows: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    out = rows.with_name("answers.jsonl")
    code = main(["predict", *words, "--rows", str(rows), "--out", str(out)])
    return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_rows_of_several_tasks_are_answered_in_order(world: Path, run: Path, tmp_path: Path) -> None:
    mood, count = (exported.rows(world, task) for task in ("mood", "count"))
    mixed = [row for pair in zip(mood, count, strict=True) for row in pair]
    code, found = predict(file_of(tmp_path, mixed), str(run))
    assert code == 0
    assert [answer["row"] for answer in found] == list(range(1, 13))
    assert [answer["id"] for answer in found] == [row["id"] for row in mixed]
    exported.assert_equal(found[::2], exported.predictions(run, "mood"))
    exported.assert_equal(found[1::2], exported.predictions(run, "count"))
    assert set(found[0]["probabilities"]) == {"good", "not good"}


def test_prompts_by_name_and_folders_of_exports(world: Path, run: Path, tmp_path: Path, adapter: str) -> None:
    rows = [{"task": "feeling", "sentence": row["sentence"]} for row in exported.rows(world, "mood")]
    code, found = predict(file_of(tmp_path, rows), "--prompt", f"feeling={adapter}", str(run / "target" / "count" / "adapter"))
    assert code == 0
    exported.assert_equal(found, exported.predictions(run, "mood"))
    main(["export", str(run), "--out", str(tmp_path / "exports")])
    code, found = predict(file_of(tmp_path, exported.rows(world, "count")), str(tmp_path / "exports"))
    assert code == 0
    exported.assert_equal(found, exported.predictions(run, "count"))


def test_from_standard_input_to_standard_output(world: Path, adapter: str) -> None:
    rows = "".join(json.dumps({"sentence": row["sentence"]}) + "\n" for row in exported.rows(world, "mood"))
    words = [sys.executable, "-c", PROGRAM, "predict", adapter]
    done = subprocess.run(words, input=rows, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    exported.assert_equal(
        [json.loads(line) for line in done.stdout.splitlines()], exported.predictions(Path(adapter).parents[2], "mood")
    )


def test_bad_lines_are_answered_at_their_places(
    world: Path, run: Path, tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"sentence": row["sentence"]} for row in exported.rows(world, "mood")]
    bad = [b"{", b"[1]", b'{"sentence": "\xff"}', b"", {"sentence": ["the"]}, {"task": "other", "sentence": "the"}]
    lines = [line for pair in zip(good, bad, strict=True) for line in pair]
    code, found = predict(file_of(tmp_path, lines), adapter)
    screen = capsys.readouterr().err
    assert code == 2
    assert "6 of 12 rows have no answer; fix them and predict them again:\n  row 2: not a whole JSON object" in screen
    assert screen.count("\n") <= 12
    assert [answer["error"]["kind"] for answer in found[1::2]] == ["line", "line", "line", "line", "fields", "task"]
    exported.assert_equal(found[::2], exported.predictions(run, "mood"))


HOSTILE: list[tuple[bytes, str, str]] = [
    (b"{", "line", "not a whole JSON object"),
    (b"[1]", "line", "a row must be a JSON object"),
    (b"null", "line", "a row must be a JSON object"),
    (b'"text"', "line", "a row must be a JSON object"),
    (b"", "line", "the line is empty"),
    (b"   ", "line", "the line is empty"),
    (b'{"sentence": "\xff"}', "line", "is not UTF-8"),
    (b'\xef\xbb\xbf{"sentence": "a"}', "line", "byte-order mark"),
    (b'{"sentence": NaN}', "line", "NaN is not JSON"),
    (b'{"sentence": -Infinity}', "line", "-Infinity is not JSON"),
    (b'{"sentence": "a", "sentence": "b"}', "line", "is in the row twice"),
    (b'{"sentence": "a"}{"sentence": "b"}', "line", "not a whole JSON object"),
    (b'{"sentence": "a", "id": ' + b"9" * 5000 + b"}", "line", ""),
    (b"[" * 100_000, "line", "nested too deeply"),
    (b'{"sentence": "' + b"a" * 1_000_001 + b'"}', "line", "longer than 1,000,000 bytes"),
    (b'{"sentence": "a", "id": 1e999}', "row", "`id` holds"),
    (rb'{"sentence": "a", "id": "\ud800"}', "row", "`id` holds"),
    (b"{}", "fields", "field 'sentence' is missing"),
    (b'{"sentence": null}', "fields", "field 'sentence' is missing"),
    (b'{"sentence": ""}', "fields", "field 'sentence' is empty"),
    (rb'{"sentence": " \t\n"}', "fields", "field 'sentence' is empty"),
    (b'{"sentence": 3}', "fields", "it must be a text"),
    (b'{"sentence": 1e999}', "fields", "it must be a text"),
    (b'{"sentence": true}', "fields", "it must be a text"),
    (b'{"sentence": {"a": 1}}', "fields", "it must be a text"),
    (rb'{"sentence": "\udc80"}', "fields", "half a surrogate pair"),
    (b'{"fields": {"sentence": []}}', "fields", "it must be a text"),
    (b'{"fields": {}, "sentence": "a"}', "fields", "field 'sentence' is missing"),
    (b'{"task": "other", "sentence": "a"}', "task", "task 'other' is not known here"),
    (rb'{"task": "\ud800", "sentence": "a"}', "task", "is not known here"),
    (b'{"task": 3, "sentence": "a"}', "task", "task '3' is not known here"),
    (b'{"task": ["mood"], "sentence": "a"}', "task", "is not known here"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("window", ["512", "2"])
def test_no_hostile_line_takes_another_row_with_it(
    end: str, window: str, run: Path, tmp_path: Path, adapter: str, world: Path
) -> None:
    good = [{"sentence": row["sentence"]} for row in exported.rows(world, "mood")]
    lines: list[Any] = []
    for number, (bad, _, _) in enumerate(HOSTILE):
        lines += [good[number % len(good)], bad]
    code, found = predict(file_of(tmp_path, [*lines, good[0]], end=end), adapter, "--window", window)
    assert code == 2
    assert [answer["row"] for answer in found] == list(range(1, 2 * len(HOSTILE) + 2))
    expected = exported.predictions(run, "mood")
    right = [expected[number % len(good)] for number in range(len(HOSTILE))]
    exported.assert_equal(found[::2], [*right, expected[0]])
    for (bad, kind, message), answer in zip(HOSTILE, found[1::2], strict=True):
        assert answer["error"]["kind"] == kind, (bad[:60], answer)
        assert message in answer["error"]["message"], (bad[:60], answer)
        assert "\n" not in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 400


@pytest.mark.parametrize("text", ["the " * 20_000, "\u2028the\x00 cat\x1b[2J", "\U0001f600" * 50, "</s> the <pad>"])
def test_texts_of_any_length_and_signs_are_answered(text: str, tmp_path: Path, adapter: str) -> None:
    code, found = predict(file_of(tmp_path, [{"sentence": "the cat"}, {"sentence": text}, {"sentence": "the cat"}]), adapter)
    assert code == 0
    assert found[0]["probabilities"] == pytest.approx(found[2]["probabilities"], abs=1e-5)
    assert ("truncated" in found[1]) == (len(text) > 10_000)


PEAK = """
import resource, sys
from bpt_dist.commands.main import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
sys.exit(code)
"""


def peak_megabytes(adapter: str, num_rows: int, out: Path) -> int:
    """Return the peak memory of a process that answers so many rows of 5 kB each from a pipe."""
    line = json.dumps({"sentence": "the cat sat", "unused": "x" * 5000}).encode() + b"\n"
    words = [sys.executable, "-c", PEAK, "predict", adapter, "--out", str(out)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    for _ in range(num_rows // 100):
        process.stdin.write(line * 100)
    _, screen = process.communicate()
    assert process.returncode == 0, screen.decode()
    with out.open("rb") as answers:
        assert sum(1 for _ in answers) == num_rows
    return int(screen.split()[-1])


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, adapter: str) -> None:
    few, many = (peak_megabytes(adapter, number, tmp_path / "answers.jsonl") for number in (2_000, 20_000))
    assert many - few < 30, "the rows alone are 90 MB more"


def test_a_byte_order_mark_and_windows_line_ends_are_read(world: Path, run: Path, tmp_path: Path, adapter: str) -> None:
    lines = [json.dumps(row).encode() for row in exported.rows(world, "mood")]
    code, found = predict(file_of(tmp_path, [b"\xef\xbb\xbf" + lines[0], *lines[1:]], end="\r\n"), adapter)
    assert code == 0
    exported.assert_equal(found, exported.predictions(run, "mood"))


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["predict", *words]) == 2
    screen = capsys.readouterr().err
    assert screen.count("\n") <= 12
    return screen


def test_what_cannot_be_used_is_refused_before_anything_is_answered(
    world: Path, run: Path, tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(file_of(tmp_path, exported.rows(world, "mood")))
    assert "no prompt is given" in refusal(capsys, "--rows", rows)
    assert "is not NAME=FOLDER" in refusal(capsys, "--prompt", "mood", "--rows", rows)
    assert "has prompts for count, mood" in refusal(capsys, "--prompt", f"mood={run}", "--rows", rows)
    assert "has a prompt in" in refusal(
        capsys, str(run), "--prompt", f"mood={run / 'target' / 'count' / 'adapter'}", "--rows", rows
    )
    assert "none.jsonl: cannot be read" in refusal(capsys, adapter, "--rows", str(tmp_path / "none.jsonl"))
    assert "is the file of the rows" in refusal(capsys, adapter, "--rows", rows, "--out", rows)
    assert "can keep nothing; leave it out" in refusal(capsys, adapter, "--rows", rows, "--prefix-cache", "64")
    (tmp_path / "empty").touch()
    assert "has no rows; write one JSON object a line" in refusal(capsys, adapter, "--rows", str(tmp_path / "empty"))
    other = tiny_t5.make(tmp_path / "other", seed=1)
    assert "belongs to another backbone" in refusal(capsys, adapter, "--rows", rows, "--backbone", str(other))
    assert "--backbone PATH" in refusal(capsys, adapter, "--rows", rows, "--backbone", str(tmp_path / "nowhere"))
    old = shutil.copytree(adapter, tmp_path / "old")
    (old / "task.json").unlink()
    assert "has no task.json" in refusal(capsys, str(old), "--rows", rows)


def test_the_examples_of_the_page_do_what_it_says(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "predicting.md").read_text()
    monkeypatch.chdir(tmp_path)
    rows, answers = (block.splitlines() for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    words, *_ = re.findall(r"^bpt-dist (predict .*)$", page, re.MULTILINE)
    assert main(words.replace("runs/NAME", str(run)).split()) == 2
    found = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in answers]
    assert [list(line) for line in found] == [list(line) for line in shown]
    assert found[0]["probabilities"].keys() == shown[0]["probabilities"].keys()
    assert found[1] == shown[1]
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    capsys.readouterr()
    exec(compile(program.replace("runs/NAME", str(run)), "page", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{found[0]['label']} {found[0]['prediction']} {{'good': ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_lines(world: Path, tmp_path: Path, adapter: str, number: int) -> None:
    row, out = json.dumps({"sentence": exported.rows(world, "mood")[0]["sentence"]}) + "\n", tmp_path / "out.jsonl"
    words = [sys.executable, "-c", PROGRAM, "predict", adapter, "--out", str(out), "--window", "3"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdin is not None
    process.stdin.write(row * 10)
    process.stdin.flush()
    deadline = time.monotonic() + 200
    while (not out.exists() or out.read_text().count("\n") < 9) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, screen = process.communicate(timeout=200)
    assert process.returncode == 75, screen
    assert "stopped on request after 9 rows; give the rows from 10 on to continue" in screen
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == list(range(1, 10))
