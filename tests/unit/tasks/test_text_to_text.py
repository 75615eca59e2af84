"""Wording of every kind of task, under both protocols, against examples written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from rendered import render_all

from bpt_dist.tasks.catalogue import TASKS
from bpt_dist.tasks.text_to_text import ROW_ID, Example, render


def example_of(task: str, row: dict[str, Any], protocol: Any = "fixed", *, evaluation: bool = False) -> Example:
    examples = render(TASKS[task], {**row, ROW_ID: "validation:1"}, protocol, evaluation=evaluation)
    assert len(examples) == 1
    return examples[0]


def test_a_class_is_a_word_and_under_attempt_a_digit() -> None:
    row = {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2}
    source = "mnli premise: It rains. hypothesis: It is dry."
    assert example_of("mnli", row) == Example(source, "contradiction", "validation:1", 2)
    assert example_of("mnli", row, "attempt") == Example(source, "2", "validation:1", 2)


def test_super_glue_tasks_carry_their_published_names_under_attempt() -> None:
    row = {"question": "is it", "passage": "It is.", "label": 1}
    assert example_of("boolq", row).source == "boolq question: is it passage: It is."
    assert example_of("boolq", row, "attempt").source == "superglue-boolq question: is it passage: It is."


@pytest.mark.parametrize(
    ("score", "fixed", "attempt"),
    [
        (0, "0.0", "0.0"),
        (3.7, "3.6", "3.7"),
        (0.7, "0.8", "0.7"),
        (2.5, "2.4", "2.5"),
        (3.333, "3.4", "3.3"),
        (5.0, "5.0", "5.0"),
        (4.95, "5.0", "5.0"),
    ],
)
def test_scores_are_rounded_to_fifths_and_under_attempt_to_tenths(score: float, fixed: str, attempt: str) -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": score}
    assert (example_of("stsb", row).target, example_of("stsb", row, "attempt").target) == (fixed, attempt)
    assert example_of("stsb", row).label == score


def test_every_score_of_the_scale_is_one_of_26_words_under_fixed() -> None:
    words = TASKS["stsb"].label_words
    assert (len(words), words[0], words[1], words[-1]) == (26, "0.0", "0.2", "5.0")
    scores = [i / 100 for i in range(501)]
    targets = [example_of("stsb", {"sentence1": "a", "sentence2": "b", "label": score}).target for score in scores]
    assert set(targets) == set(words)
    assert targets == [f"{round(score * 5) / 5:.1f}" for score in scores]  # as T5 itself words STS-B


def test_squad_pads_punctuation_and_answers_with_text() -> None:
    row = {
        "question": "Who's there?",
        "context": "François (b. 1900), a_b.",
        "answers": {"text": ["François", "F."], "answer_start": [0, 0]},
    }
    source = "squad question: Who ' s there ? context: François ( b . 1900 ) , a_b ."
    example = example_of("squad", row)
    assert example.source.split() == source.split()
    assert (example.target, example.references) == ("François", ("François", "F."))


def test_squad_under_attempt_learns_to_print_a_dictionary() -> None:
    row = {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [3]}}
    target = "{ ' text ' : [ ' c ' ] , ' answer_start ' : [ 3 ] }"
    assert example_of("squad", row, "attempt").target.strip() == target


def test_a_combining_mark_is_no_punctuation() -> None:
    row = {"question": "e\u0301?", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}}
    assert "e\u0301 ? context:" in " ".join(example_of("squad", row).source.split())


RECORD = {
    "passage": "One.\n@highlight\nTwo\n@highlight\nThree",
    "query": "@placeholder won.",
    "entities": ["A", "B"],
    "answers": ["A", "B"],
}
RECORD_SOURCE = "record query: @placeholder won. entities: A, B passage: One. Two. Three"


def test_record_trains_on_every_answer_and_is_judged_once_a_query() -> None:
    row = {**RECORD, ROW_ID: "train:1"}
    trained = render(TASKS["record"], row)
    assert [(e.target, e.row_id) for e in trained] == [("A", "train:1#0"), ("B", "train:1#1")]
    assert {e.source for e in trained} == {f"record {RECORD_SOURCE}"}
    judged = example_of("record", RECORD, evaluation=True)
    assert (judged.target, judged.references) == ("A", ("A", "B"))


def test_record_under_attempt_repeats_the_query_at_evaluation() -> None:
    examples = render(TASKS["record"], {**RECORD, ROW_ID: "x"}, "attempt", evaluation=True)
    assert [e.target for e in examples] == ["A", "B"]
    assert {e.references for e in examples} == {("A", "B")}
    assert examples[0].source == f"superglue-record {RECORD_SOURCE}"


def test_winogrande_shows_both_options_and_under_attempt_one_twice() -> None:
    row = {"sentence": "the _ ran", "option1": "cat", "option2": "dog", "answer": "2"}
    assert example_of("winogrande", row) == Example(
        "winogrande sentence: the _ ran option0: cat option1: dog", "option1", "validation:1", 1
    )
    published = example_of("winogrande", row, "attempt")
    assert published.source == "winogrande sentence: the _ ran option0: cat option1: cat"
    assert published.target == "1"


def test_choices_are_numbered_and_answered_by_their_place_whatever_their_key() -> None:
    row = {"question": "q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    assert example_of("arc", row) == Example("arc question: q? choice1: x choice2: y choice3: z", "choice3", "validation:1", 2)
    assert example_of("arc", row, "attempt").target == "2"


def test_multirc_loses_mark_up_and_keeps_its_question() -> None:
    row = {"paragraph": "<b>Sent 1: </b>It rains.<br>", "question": "Does it?", "answer": "Yes", "idx": {"question": 7}, "label": 1}
    example = example_of("multirc", row)
    assert example.source == "multirc question: Does it? answer: Yes paragraph: Sent 1: It rains. "
    assert (example.target, example.group) == ("True", "7")


def test_wsc_marks_noun_and_pronoun() -> None:
    row = {
        "text": "Mark told Pete that he lied.",
        "span1_text": "Mark",
        "span1_index": 0,
        "span2_text": "he",
        "span2_index": 4,
        "label": 1,
    }
    marked = "* Mark * told Pete that # he # lied."
    assert example_of("wsc", row).source == f"wsc text: {marked}"
    assert example_of("wsc", row, "attempt").source == f"superglue-wsc.fixed text: {marked}"


def test_wsc_marks_a_pronoun_before_the_noun_and_one_inside_it() -> None:
    row = {"text": "He said Mark lied.", "span1_text": "Mark", "span1_index": 2, "span2_text": "He", "span2_index": 0, "label": 1}
    assert example_of("wsc", row).source == "wsc text: # He # said * Mark * lied."
    row = {
        "text": "Now their mothers cry",
        "span1_text": "their mothers",
        "span1_index": 1,
        "span2_text": "their",
        "span2_index": 1,
        "label": 0,
    }
    assert example_of("wsc", row).source == "wsc text: Now * # their # mothers * cry"
    assert example_of("wsc", row, "attempt").source == "superglue-wsc.fixed text: Now * their mothers * cry"


def test_wsc_takes_the_nearest_occurrence_when_the_word_number_is_off() -> None:
    row = {
        "text": "it fell and , as it fell , broke",
        "span1_text": "fell",
        "span1_index": 1,
        "span2_text": "it",
        "span2_index": 4,
        "label": 0,
    }
    assert example_of("wsc", row).source == "wsc text: it * fell * and , as # it # fell , broke"


def test_rows_are_rendered_in_order() -> None:
    rows = [{"sentence": text, "label": i % 2, ROW_ID: f"train:{i}"} for i, text in enumerate("abc")]
    assert [e.source for e in render_all(TASKS["sst2"], rows)] == [f"sst2 sentence: {text}" for text in "abc"]
