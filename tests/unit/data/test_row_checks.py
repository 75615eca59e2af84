"""F15: a bad row is named as file:line: field before anything is trained, and good rows pass whatever their line ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpt_dist.data import rows
from bpt_dist.errors import DataError
from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.spec import TaskSpec
from bpt_dist.tasks.user_tasks import load_user_tasks

GOOD: dict[str, dict[str, Any]] = {
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 900},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 900},
    "squad": {"id": "x", "context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": [0]}},
    "record": {"passage": "p", "query": "@placeholder", "entities": ["e"], "answers": ["e"]},
    "multirc": {"paragraph": "p", "question": "q", "answer": "a", "idx": {"question": 1}, "label": 1},
    "wsc": {"text": "Mark told him .", "span1_text": "Mark", "span1_index": 0, "span2_text": "him", "span2_index": 2, "label": 1},
    "openbookqa": {"id": "x", "question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "winogrande": {"sentence": "the _ ran", "option1": "a", "option2": "b", "answer": "1"},
}  # fmt: skip


def line(task: str, **changes: Any) -> bytes:
    return json.dumps({**GOOD[task], **changes}).encode()


def without(task: str, field: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD[task].items() if key != field}).encode()


CHOICES = {"text": ["a", "b"], "label": ["A"]}
SIX = {"text": list("abcdef"), "label": list("ABCDEF")}
BAD_ROWS: tuple[tuple[str, str, bytes, str], ...] = (
    ("cut line", "rte", line("rte")[:40], "not a whole JSON object"),
    ("two objects", "rte", line("rte") + line("rte"), "not a whole JSON object"),
    ("not an object", "rte", b"[1, 2]", "must be a JSON object"),
    ("a bare text", "rte", b'"text"', "must be a JSON object"),
    ("empty line", "rte", b"   ", "the line is empty"),
    ("NaN literal", "stsb", line("stsb", label=float("nan")), "NaN is not JSON"),
    ("Infinity literal", "stsb", line("stsb", label=float("inf")), "Infinity is not JSON"),
    ("number that overflows", "stsb", line("stsb").replace(b"2.5", b"1e999"), "field 'label' is Infinity"),
    ("byte-order mark", "rte", b"\xef\xbb\xbf" + line("rte"), "byte-order mark"),
    ("UTF-16", "rte", line("rte").decode().encode("utf-16-le"), "not a whole JSON object"),
    ("Latin-1", "rte", line("rte").replace(b"rains", b"caf\xe9"), "byte 22 of the line is not UTF-8 (0xe9)"),
    ("cut UTF-8 sequence", "rte", line("rte").replace(b"rains", b"\xe2\x82"), "is not UTF-8"),
    ("half a surrogate pair", "rte", line("rte", sentence1="\ud800"), "field 'sentence1' has half a surrogate pair"),
    ("2 MB line", "rte", line("rte", sentence1="x" * 2_000_000), "longer than 1,000,000 bytes"),
    ("nested too deeply", "rte", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    ("field twice", "rte", line("rte")[:-1] + b', "label": 1}', "field 'label' is in the row twice"),
    ("duplicate id", "rte", line("rte", idx=0), "field 'idx' is 0, as in line 1"),
    ("missing text", "rte", without("rte", "sentence2"), "field 'sentence2' is missing"),
    ("null text", "rte", line("rte", sentence2=None), "field 'sentence2' is missing"),
    ("empty text", "rte", line("rte", sentence1=""), "field 'sentence1' is empty"),
    ("blank text", "rte", line("rte", sentence1=" \t\u00a0"), "field 'sentence1' is empty"),
    ("number for text", "rte", line("rte", sentence1=7), "field 'sentence1' is 7; it must be a text"),
    ("list for text", "rte", line("rte", sentence1=["a"]), "it must be a text"),
    ("missing label", "rte", without("rte", "label"), "field 'label' is missing"),
    ("unknown label", "rte", line("rte", label=3), "field 'label' is 3; task 'rte' has labels 0 (entailment), 1 (not_entailment)"),
    ("unlabelled", "rte", line("rte", label=-1), "field 'label' is -1"),
    ("label as text", "rte", line("rte", label="0"), "field 'label' is \"0\""),
    ("label as bool", "rte", line("rte", label=True), "field 'label' is true"),
    ("label as float", "rte", line("rte", label=1.0), "field 'label' is 1.0"),
    ("label as list", "rte", line("rte", label=[0]), "field 'label' is [0]"),
    ("score out of range", "stsb", line("stsb", label=5.2), "field 'label' is 5.2; it must be a number from 0 to 5"),
    ("score as text", "stsb", line("stsb", label="2.5"), "it must be a number"),
    ("score as bool", "stsb", line("stsb", label=True), "it must be a number"),
    ("no answer", "squad", line("squad", answers={"text": [], "answer_start": []}), "field 'answers.text' is []"),
    ("empty answer", "squad", line("squad", answers={"text": [" "], "answer_start": [0]}), "field 'answers.text'"),
    ("answers without places", "squad", line("squad", answers={"text": ["c"]}), "field 'answers.answer_start' is missing"),
    ("duplicate text id", "squad", line("squad", id="0"), "field 'id' is \"0\", as in line 1"),
    ("entities not a list", "record", line("record", entities="e"), "field 'entities' is \"e\""),
    ("answers not texts", "record", line("record", answers=[1]), "field 'answers' is [1]"),
    ("no question number", "multirc", line("multirc", idx=3), "field 'idx.question' is missing"),
    ("word number as text", "wsc", line("wsc", span1_index="0"), "field 'span1_index' is \"0\""),
    ("negative word number", "wsc", line("wsc", span2_index=-1), "field 'span2_index' is -1"),
    ("empty span", "wsc", line("wsc", span1_text=""), "field 'span1_text' is empty"),
    ("choices of unequal length", "openbookqa", line("openbookqa", choices=CHOICES), "field 'choices' is"),
    ("too many choices", "openbookqa", line("openbookqa", choices=SIX), "field 'choices' has 6 choices"),
    ("key of no choice", "openbookqa", line("openbookqa", answerKey="E"), "field 'answerKey' is \"E\"; the choices"),
    ("answer as number", "winogrande", line("winogrande", answer=1), "field 'answer' is 1"),
    ("answer unlabelled", "winogrande", line("winogrande", answer=""), "field 'answer' is \"\""),
)  # fmt: skip


def folder_of(task: str, tmp_path: Path, number: int, bad: bytes) -> TaskSpec:
    spec = TASKS[task]
    lines = []
    for i in range(20):
        row = dict(GOOD[task])
        if spec.id_column is not None:
            row[spec.id_column] = i if isinstance(row[spec.id_column], int) else str(i)
        lines.append(json.dumps(row).encode())
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    if number == 1:
        lines[0] = bad
    else:
        lines[number - 1 :] = [bad]
    (tmp_path / "validation.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return spec.with_folder(tmp_path)


@pytest.mark.parametrize(("task", "bad", "message"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_a_bad_row_is_named_with_file_line_and_field(task: str, bad: bytes, message: str, tmp_path: Path, options: Any) -> None:
    number = 1 if b"\xef\xbb\xbf" in bad else 7
    spec = folder_of(task, tmp_path, number, bad)
    with pytest.raises(DataError) as error:
        rows.load(spec, options())
    assert error.value.exit_code == 65
    assert f"{tmp_path}/validation.jsonl:{number}: " in str(error.value)
    assert message in str(error.value)
    assert "\x1b" not in str(error.value)


def test_forty_bad_rows_are_all_counted_and_the_first_ten_named(rte: TaskSpec, rte_folder: Path, options: Any) -> None:
    (rte_folder / "train.jsonl").write_bytes(b"".join(line("rte", label=9, idx=i) + b"\n" for i in range(40)))
    with pytest.raises(DataError) as error:
        rows.load(rte, options())
    named = [f"train.jsonl:{number}: field 'label' is 9" for number in range(1, 41)]
    assert all(name in str(error.value) for name in named[:10])
    assert not any(name in str(error.value) for name in named[10:])
    assert "40 problems" in str(error.value)
    assert "and 30 more" in str(error.value)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["final newline", "no final newline"])
def test_line_ends_do_not_matter(rte: TaskSpec, rte_folder: Path, options: Any, end: bytes, last: bool) -> None:
    expected = rows.load(rte, options())
    for path in rte_folder.glob("*.jsonl"):
        path.write_bytes(end.join(path.read_bytes().splitlines()) + end * last)
    assert rows.load(rte, options()) == expected


def test_line_separators_inside_a_text_are_text(rte: TaskSpec, rte_folder: Path, options: Any) -> None:
    row = {**GOOD["rte"], "sentence1": "one\u2028two\u0085three"}
    with (rte_folder / "validation.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    splits = rows.load(rte, options())
    texts = {row["sentence1"] for row in (*splits["validation"], *splits["test"])}
    assert "one\u2028two\u0085three" in texts


def test_dates_stay_text(tmp_path: Path, options: Any) -> None:
    """`datasets` turns a column of such texts into timestamps, which is why local files are not read through it."""
    for split in ("train", "validation"):
        lines = [json.dumps({"sentence": "2020-01-01", "label": i % 2, "idx": i}) for i in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    splits = rows.load(TASKS["sst2"].with_folder(tmp_path), options())
    assert {row["sentence"] for row in splits["train"]} == {"2020-01-01"}


def test_columns_no_task_uses_may_be_of_any_type(rte: TaskSpec, rte_folder: Path, options: Any) -> None:
    lines = [json.dumps({**GOOD["rte"], "idx": i, "note": i if i % 2 else str(i)}) for i in range(20)]
    (rte_folder / "train.jsonl").write_text("\n".join(lines))
    assert len(rows.load(rte, options())["train"]) == 20


@pytest.mark.parametrize("named", [True, False])
def test_ids_are_compared_only_where_the_task_file_names_them(tmp_path: Path, options: Any, named: bool) -> None:
    """A column `id` may name a document of several rows."""
    (tmp_path / "reviews").mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"id": f"doc{n // 2}", "text": f"text {n}", "label": n % 2}) for n in range(8)]
        (tmp_path / "reviews" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    text = "reviews: {folder: reviews, fields: [text], label: label, label_words: [bad, good], metrics: [accuracy]"
    (tmp_path / "tasks.yaml").write_text(text + (", id: id}" if named else "}"))
    task = load_user_tasks([tmp_path / "tasks.yaml"])["reviews"]
    if not named:
        assert len(rows.load(task, options())["train"]) == 8
        return
    with pytest.raises(DataError, match=r"train\.jsonl:2: field 'id' is .doc0., as in line 1") as error:
        rows.load(task, options())
    assert "remove `id: id` from the task file where the column is no id of the rows" in str(error.value)
