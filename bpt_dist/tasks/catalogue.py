"""The 21 tasks of the published comparison (GLUE's four source tasks are also targets), with their hub homes.

Fields, their order and labels follow the ATTEMPT/MPT/DePT family; AG News, OpenBookQA and ARC have no published
template there and are defined here. ARC is Easy and Challenge together, ANLI is rounds 1 to 3 together.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from bpt_dist.errors import ConfigError
from bpt_dist.tasks.spec import SplitRule, TaskSpec, TextField, score_words

HALVES = SplitRule(kind="halves")
CARVE = SplitRule(kind="carve")
NLI = ("entailment", "neutral", "contradiction")
ACCEPTABLE = ("unacceptable", "acceptable")
TRUE_FALSE = ("False", "True")
_MNLI_SPLITS = SplitRule(kind="official", validation=("validation_mismatched",), test=("validation_matched",))
_ANLI_SPLITS = SplitRule(
    kind="official",
    train=("train_r1", "train_r2", "train_r3"),
    validation=("dev_r1", "dev_r2", "dev_r3"),
    test=("test_r1", "test_r2", "test_r3"),
)
_OFFICIAL = SplitRule(kind="official", test=("test",))
_SAME = ("not_equivalent", "equivalent")
_TWICE = ("not_duplicate", "duplicate")
_TWO_WAY = ("entailment", "not_entailment")


def _fields(*columns: str) -> tuple[TextField, ...]:
    """Return fields labelled by their own column name: 'premise' is printed as 'premise: …'."""
    return tuple(TextField(label=f"{column}:", column=column) for column in columns)


def _glue(name: str, summary: str, columns: str, words: tuple[str, ...], *, metrics: str, splits: SplitRule) -> TaskSpec:
    return TaskSpec(
        name=name, summary=summary, kind="classification", metrics=tuple(metrics.split()),
        fields=_fields(*columns.split()), label_words=words, label_values=tuple(range(len(words))),
        hub_name="nyu-mll/glue", hub_configs=(name,), local_name="glue", splits=splits, id_column="idx",
    )  # fmt: skip


def _super_glue(name: str, config: str, summary: str, words: tuple[str, ...], metrics: str, **more: object) -> TaskSpec:
    return TaskSpec(
        name=name, summary=summary, kind="classification", metrics=tuple(metrics.split()), label_words=words,
        label_values=tuple(range(len(words))), hub_name="aps/super_glue", hub_configs=(config,),
        local_name="super_glue", splits=HALVES, published_name=f"superglue-{config}", **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _choice(name: str, summary: str, hub: str, question: str, num_choices: int, **more: object) -> TaskSpec:
    words = tuple(f"choice{index + 1}" for index in range(num_choices))
    return TaskSpec(
        name=name, summary=summary, kind="choice", form="choices", metrics=("accuracy",), label_words=words,
        fields=(TextField(label="question:", column=question),), target_column="answerKey", hub_name=hub,
        local_name=hub.split("/")[1], id_column="id", **more,  # type: ignore[arg-type]
    )  # fmt: skip


_TASKS = (
    _glue("mnli", "entailment in many genres, 3 classes", "premise hypothesis", NLI, metrics="accuracy", splits=_MNLI_SPLITS),
    _glue("qnli", "does the sentence answer the question", "question sentence", _TWO_WAY, metrics="accuracy", splits=CARVE),
    _glue("qqp", "are two questions duplicates", "question1 question2", _TWICE, metrics="accuracy f1", splits=CARVE),
    _glue("sst2", "sentiment of film reviews", "sentence", ("negative", "positive"), metrics="accuracy", splits=CARVE),
    _glue("mrpc", "are two news sentences paraphrases", "sentence1 sentence2", _SAME, metrics="accuracy f1", splits=HALVES),
    _glue("rte", "entailment, 2 classes", "sentence1 sentence2", _TWO_WAY, metrics="accuracy", splits=HALVES),
    _glue("cola", "grammatical acceptability", "sentence", ACCEPTABLE, metrics="matthews accuracy", splits=HALVES),
    TaskSpec(
        name="stsb", summary="similarity of two sentences, 0 to 5", kind="regression", metrics=("pearson", "spearman"),
        fields=_fields("sentence1", "sentence2"), label_words=score_words(0.0, 5.0, 0.2), score_range=(0.0, 5.0, 0.2),
        hub_name="nyu-mll/glue", hub_configs=("stsb",), local_name="glue", splits=HALVES, id_column="idx",
    ),
    _super_glue("boolq", "boolq", "yes/no question about a passage", TRUE_FALSE, "accuracy",
                fields=_fields("question", "passage")),
    # Tables print accuracy for CB, so it is the headline; the published code selected by macro-F1.
    _super_glue("cb", "cb", "is an embedded clause entailed, 3 classes", ("entailment", "contradiction", "neutral"),
                "accuracy macro_f1", fields=_fields("premise", "hypothesis")),
    _super_glue("multirc", "multirc", "is this answer to the question right", TRUE_FALSE, "multirc_f1a multirc_em",
                fields=_fields("question", "answer", "paragraph"), form="multirc", group_column="idx.question",
                max_source_length=348),
    _super_glue("wic", "wic", "same sense of a word in two sentences", TRUE_FALSE, "accuracy",
                fields=_fields("sentence1", "sentence2", "word")),
    _super_glue("wsc", "wsc.fixed", "does the #pronoun# mean the *noun*", TRUE_FALSE, "accuracy",
                fields=_fields("text"), form="wsc"),
    TaskSpec(
        name="record", summary="which entity fills the gap of a news query", kind="text", form="record",
        metrics=("record_f1", "record_em"), target_column="answers", hub_name="aps/super_glue",
        fields=(TextField(label="query:", column="query"), TextField(label="passage:", column="passage")),
        hub_configs=("record",), local_name="super_glue", splits=CARVE, published_name="superglue-record",
    ),
    TaskSpec(
        name="squad", summary="answer a question with words of the passage", kind="text", form="squad",
        metrics=("squad_em", "squad_f1"), fields=_fields("question", "context"), target_column="answers.text",
        hub_name="rajpurkar/squad", hub_configs=("plain_text",), local_name="squad", splits=CARVE, id_column="id",
    ),
    TaskSpec(
        name="ag_news", summary="topic of a news item, 4 classes", kind="classification", metrics=("accuracy",),
        fields=(TextField(label="sentence:", column="text"),), label_words=("World", "Sports", "Business", "Sci/Tech"),
        label_values=(0, 1, 2, 3), hub_name="fancyzhx/ag_news", local_name="ag_news",
        splits=SplitRule(kind="carve", test=("test",)),
    ),
    _choice("commonsense_qa", "common-sense question, 5 choices", "tau/commonsense_qa", "question", 5, splits=CARVE),
    _choice("openbookqa", "science question, 4 choices", "allenai/openbookqa", "question_stem", 4, splits=_OFFICIAL,
            hub_configs=("main",)),
    _choice("arc", "school science question, Easy and Challenge", "allenai/ai2_arc", "question", 5, splits=_OFFICIAL,
            hub_configs=("ARC-Easy", "ARC-Challenge")),
    TaskSpec(
        name="anli", summary="adversarial entailment, rounds 1 to 3", kind="classification", metrics=("accuracy",),
        fields=_fields("premise", "hypothesis"), label_words=NLI, label_values=(0, 1, 2), hub_name="facebook/anli",
        hub_configs=("plain_text",), local_name="anli", splits=_ANLI_SPLITS, id_column="uid",
    ),
    TaskSpec(
        name="winogrande", summary="which option fills the gap", kind="classification", form="options",
        metrics=("accuracy",),
        fields=(
            TextField(label="sentence:", column="sentence"),
            TextField(label="option0:", column="option1"),
            TextField(label="option1:", column="option2"),
        ),
        target_column="answer", label_words=("option0", "option1"), label_values=("1", "2"),
        hub_name="allenai/winogrande", hub_configs=("winogrande_xl",), local_name="winogrande", splits=CARVE,
    ),
)  # fmt: skip
TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _TASKS}
SOURCE_6 = ("mnli", "qnli", "qqp", "sst2", "squad", "record")
SOURCE_12 = (*SOURCE_6, "ag_news", "commonsense_qa", "openbookqa", "arc", "anli", "winogrande")
GLUE_8 = ("mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola")
SUPER_GLUE_5 = ("multirc", "boolq", "wic", "wsc", "cb")


def get(name: str, user_tasks: Mapping[str, TaskSpec] | None = None) -> TaskSpec:
    """Return the task of that name; the user's tasks come first, so a file can replace a published task.

    Raises ConfigError with the nearest name.
    """
    tasks = {**TASKS, **(user_tasks or {})}
    if name in tasks:
        return tasks[name]
    near = difflib.get_close_matches(name, tasks, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`bpt-dist tasks` lists them"
    raise ConfigError(f"unknown task {name!r}; {hint} (your own tasks come from data.task_files)")
