"""Loading, overriding, expanding and comparing configurations that are right."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from bpt_dist import config
from bpt_dist.config import overrides
from bpt_dist.config.keys import fields_by_key
from bpt_dist.errors import ConfigError

SINGLE = """\
name: single
method: {name: bpt, sigma: 1.0}
data: {source_tasks: [mini_nli, mini_span], target_tasks: [mini_rte]}
source: {steps: 40, lr: 1e-1}
target: {steps: 40}
"""
ROWS = (
    SINGLE
    + """\
rows:
- method: {name: prompt_tuning, length: 10}
  target: {lr: 0.3, steps: 20}
- method: vanilla_transfer
  target: {lr: 0.3}
- label: own
seeds: [0, 7]
"""
)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_text(text: str, *words: str) -> config.RunConfig:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return config.load(path, words)

    return load_text


def refused(load: Any, text: str, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *words)
    return str(caught.value)


# --- values ------------------------------------------------------------------------------------------------------------


def test_a_configuration_is_one_frozen_value(load: Any) -> None:
    loaded = load(SINGLE)
    assert loaded.source.lr == 0.1
    assert loaded.data.source_tasks == ("mini_nli", "mini_span")
    assert loaded == load(SINGLE)
    for model, name in ((loaded, "seed"), (loaded.source, "steps"), (loaded.method, "sigma")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, name, 1)


def test_a_run_lives_below_output_unless_it_is_told_where(load: Any) -> None:
    assert load(SINGLE).directory == Path("runs/single")
    assert load(SINGLE, "run_dir=/elsewhere/x").directory == Path("/elsewhere/x")
    assert load(SINGLE, "output=out").directory == Path("out/single")


def test_one_key_may_refer_to_another(load: Any) -> None:
    text = SINGLE.replace("target: {steps: 40}", "target: {steps: '${source.steps}'}")
    assert load(text, "source.steps=30").target.steps == 30
    assert "target.steps: refers to nothing" in refused(load, text.replace("source.steps", "source.step"))


def test_options_become_those_of_the_imported_method(load: Any) -> None:
    read_again = config.method_options.__wrapped__("bpt")  # like the class of the imported file: same fields, another object
    section = load(SINGLE).method
    assert not isinstance(section, read_again)
    assert isinstance(section.as_options_of(read_again), read_again)
    assert section.as_options_of(read_again).model_dump() == section.model_dump()


def test_every_key_says_what_it_means() -> None:
    for method in config.method_names():
        for key, field in fields_by_key(config.method_options(method)).items():
            assert field.description or key == "method.name", key


# --- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("method.sigma=0.1", "method.sigma", 0.1),
        ("sigma=1e-1", "method.sigma", 0.1),
        ("seed=3", "seed", 3),
        ("name=other", "name", "other"),
        ("bandwidth=median", "method.bandwidth", "median"),
        ("bandwidth=2", "method.bandwidth", 2.0),
        ("clip=null", None, None),
        ("source.clip=null", "source.clip", None),
        ("backbone=google-t5/t5-small", "backbone.path", "google-t5/t5-small"),
        ("path=google-t5/t5-small", "backbone.path", "google-t5/t5-small"),
        ("target_tasks=mini_rte", "data.target_tasks", ["mini_rte"]),
        ("target_tasks=mini_rte,mini_sense", "data.target_tasks", ["mini_rte", "mini_sense"]),
        ("target_tasks=[mini_rte,mini_sense]", "data.target_tasks", ["mini_rte", "mini_sense"]),
        ("data.target_tasks=[mini_rte]", "data.target_tasks", ["mini_rte"]),
        ("splits=validation", "evaluation.splits", ["validation"]),
        ("seeds=4", "seeds", [4]),
        ("seeds=4,5", "seeds", [4, 5]),
        ("mlflow=false", "tracking.mlflow", False),
        ("uri=https://tracker.example.org:5000", "tracking.uri", "https://tracker.example.org:5000"),
        ("source.task_weights.mini_nli=2", "source.task_weights", {"mini_nli": 2.0}),
        ("distribution.step_timeout=30", "distribution.step_timeout", 30),
        ("root=/data/pack", "data.root", "/data/pack"),
        ("root=123", "data.root", "123"),
    ],
)
def test_a_word_sets_its_key(load: Any, word: str, key: str | None, value: Any) -> None:
    if key is None:
        message = refused(load, SINGLE, word)
        assert message == "command line: clip: is ambiguous; write one of source.clip, target.clip"
        return
    loaded = load(SINGLE, word).model_dump(mode="json")
    expected = load(SINGLE).model_dump(mode="json")
    overrides.set_key(expected, tuple(key.split(".")), value)
    assert loaded == expected


def test_a_mesh_is_written_key_by_key(load: Any) -> None:
    loaded = load(SINGLE, "mesh.particle=5", "mesh.data=2", "target.batch_size=2")
    assert loaded.distribution.mesh == config.MeshShape(particle=5, data=2)
    assert load(SINGLE, "mesh=auto").distribution.mesh == "auto"


def test_digits_of_a_revision_stay_text(load: Any) -> None:
    for revision in ("1234567", "12e4567", "0", "1.0"):
        assert load(SINGLE, "backbone=google-t5/t5-small", f"revision={revision}").backbone.revision == revision


def test_the_command_line_wins_over_a_key_that_the_file_gets_wrong(load: Any) -> None:
    assert load(SINGLE.replace("sigma: 1.0", "sigma: -1.0"), "sigma=2").method.model_dump()["sigma"] == 2.0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sigm=0.1", "sigm: unknown key; did you mean sigma?"),
        ("target.stepz=1", "target.stepz: unknown key; did you mean target.steps?"),
        ("steps=1", "steps: is ambiguous; write one of source.steps, target.steps"),
        ("data=x", "data: is a section; set one of its keys, data.KEY=VALUE"),
        ("steps", "'steps' is not key=value; write for example target.steps=100"),
        ("--steps=1", "'--steps=1' holds a character"),
        ("sigma=-1", "method.sigma: should be greater than 0"),
        ("sigma=a,b", "method.sigma: should be a valid number"),
        ("seed=5k", "seed: should be a valid integer"),
        ("seeds=[1,2", "seeds: is not a value"),
        ("method=btp", "method.name: no such method (got 'btp'); did you mean bpt?"),
        ("target_tasks=mini_rt", "data.target_tasks[0]: no such task (got 'mini_rt'); did you mean mini_rte?"),
        ("seed=", "seed: should be a valid integer"),
    ],
)
def test_a_wrong_word_is_refused_as_one_of_the_command_line(load: Any, word: str, message: str) -> None:
    assert f"command line: {message}" in refused(load, SINGLE, word)


def test_a_key_may_be_given_once(load: Any) -> None:
    assert "method.sigma: is given twice" in refused(load, SINGLE, "sigma=1", "method.sigma=2")


HOSTILE = [
    "$(touch HIT)", "`touch HIT`", "x;touch HIT", "x|touch HIT", "x&touch HIT", "x>HIT", "x<HIT", "$HOME", "${HOME}", "~root",
    "a b", "a\tb", "a\nb", "'", '"', "\\", "*", "?", "{a,b}", "!!", "#x", "(x)", "x=y", "^a^b", "%n", "é", "\x00", "\x1b[31m",
    "x\r", "a@b", "!id", "$'x'", "<(id)", ">(id)", "&&id", "||id", "\u202e", "\ufeffx", "a;", "--x y",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_word_with_a_meaning_to_shells_is_refused(load: Any, text: str) -> None:
    assert "holds a character with a meaning to shells" in refused(load, SINGLE, f"root={text}")


def test_accepted_words_pass_through_a_shell_unchanged(tmp_path: Path) -> None:
    rng = random.Random(0)
    alphabet = [chr(code) for code in range(33, 127)]
    words = [f"data.root={''.join(rng.choices(alphabet, k=rng.randrange(1, 5)))}" for _ in range(4000)]
    words = [word for word in words if overrides.OVERRIDE.fullmatch(word)] + ["seeds=[1,2]", "uri=https://h.example:5000/x"]
    assert len(words) > 400
    command = ["bash", "-c", "printf '%s\\n' " + " ".join(words)]
    heard = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert heard.stdout.splitlines() == words


# --- rows and seeds ----------------------------------------------------------------------------------------------------


def test_a_single_configuration_expands_to_itself(load: Any) -> None:
    assert config.expand(load(SINGLE)) == [load(SINGLE)]


def test_rows_by_seeds_are_runs_with_names_and_folders(load: Any) -> None:
    runs = config.expand(load(ROWS))
    names = ["prompt_tuning-s0", "prompt_tuning-s7", "vanilla_transfer-s0", "vanilla_transfer-s7", "own-s0", "own-s7"]
    assert [run.name for run in runs] == names
    assert [run.directory for run in runs] == [Path("runs/single") / name for name in names]
    assert [run.seed for run in runs] == [0, 7] * 3
    assert {run.tracking.experiment for run in runs} == {"single"}
    assert all(run.rows is None and run.seeds is None for run in runs)


def test_a_row_may_have_seeds_of_its_own(load: Any) -> None:
    text = ROWS.replace("- label: own\n", "- label: own\n  seeds: [7]\n")
    names = [run.name for run in config.expand(load(text))]
    assert names == ["prompt_tuning-s0", "prompt_tuning-s7", "vanilla_transfer-s0", "vanilla_transfer-s7", "own-s7"]
    alike = config.expand(load(ROWS), ["own"])[1]
    assert config.expand(load(text), ["own"]) == [alike]  # nothing else of the run is another one
    assert [run.seed for run in config.expand(load(text, "seeds=[1,2]"), ["own"])] == [1, 2]  # the command line wins
    assert [run.seed for run in config.expand(load(text.replace("[7]", "null")), ["own"])] == [0, 7]


def test_some_rows_may_be_asked_for(load: Any) -> None:
    names = [run.name for run in config.expand(load(ROWS), ["own", "prompt_tuning"])]
    assert names == ["prompt_tuning-s0", "prompt_tuning-s7", "own-s0", "own-s7"]
    with pytest.raises(ConfigError, match=r"^--row: owm is no row of single; rows are .*; did you mean own\?$"):
        config.expand(load(ROWS), ["own", "owm"])
    for text in (SINGLE, SINGLE + "seeds: [0]\n"):
        with pytest.raises(ConfigError, match=r"^--row: the file has no rows; leave it out$"):
            config.expand(load(text), ["bpt"])


def test_a_row_that_names_another_method_starts_its_section_afresh(load: Any) -> None:
    prompt_tuning, _, transfer, _, own, _ = config.expand(load(ROWS.replace("sigma: 1.0", "sigma: 1.0, length: 50")))
    assert prompt_tuning.method.model_dump()["length"] == 10
    assert transfer.method.model_dump()["length"] == 100
    assert own.method.model_dump()["length"] == 50


def test_source_settings_go_only_to_methods_with_a_source_stage(load: Any) -> None:
    prompt_tuning, _, transfer, *_ = config.expand(load(ROWS))
    assert prompt_tuning.source == config.SourceStageConfig()
    assert prompt_tuning.data.source_tasks == ()
    assert transfer.source.steps == 40
    assert transfer.data.source_tasks == ("mini_nli", "mini_span")


def test_the_command_line_wins_over_rows(load: Any) -> None:
    runs = config.expand(load(ROWS, "target.steps=5", "length=8"))
    assert {run.target.steps for run in runs} == {5}
    assert {run.method.model_dump()["length"] for run in runs} == {8}
    assert [run.method.model_dump().get("sigma") for run in config.expand(load(ROWS, "sigma=3"))] == [None] * 4 + [3.0] * 2


def test_a_method_on_the_command_line_replaces_that_of_the_file(load: Any) -> None:
    run = load(SINGLE, "method=prompt_tuning", "length=7", "target.lr=0.3")
    assert run.method.model_dump()["length"] == 7
    assert run.source.steps == 0
    assert "has no effect, every row names its method" in refused(
        load, ROWS.replace("- label: own", "- {label: own, method: bpt}"), "method=bpt"
    )
    assert config.expand(load(ROWS, "rows=null", "seeds=null")) == [load(SINGLE)]


def test_two_rows_of_one_name_are_refused(load: Any) -> None:
    message = refused(load, ROWS.replace("label: own", "label: prompt_tuning"))
    assert "rows: several rows are named 'prompt_tuning-s0'; give each a label of its own" in message


def test_a_row_may_give_a_rate_relative_where_the_file_leaves_the_default(load: Any) -> None:
    rows = ROWS.replace("- label: own", "- {label: own, method: {lr_full_relative: 0.1}}")
    method = config.expand(load(rows))[-1].method.model_dump()
    assert (method["lr_full"], method["lr_full_relative"]) == (None, 0.1)


@pytest.mark.parametrize(
    ("in_file", "in_row"),
    [("lr_full: 0.3", "lr_full_relative: 0.1"), ("lr_full_relative: 0.3", "lr_full: 0.1"), ("lr_full: 0.3", "sigma_relative: 2.0")],
)
def test_a_row_wins_over_the_file_in_the_other_unit_too(load: Any, in_file: str, in_row: str) -> None:
    rows = ROWS.replace("sigma: 1.0", f"sigma: 1.0, {in_file}").replace("- label: own", f"- {{label: own, method: {{{in_row}}}}}")
    key, value = in_row.split(": ")
    other = key.removesuffix("_relative") if key.endswith("_relative") else f"{key}_relative"
    method = config.expand(load(rows))[-1].method.model_dump()
    assert (method[key], method[other]) == (float(value), None)
    assert "is given beside" in refused(load, rows.replace(in_row, f"{in_row}, {other}: 0.5"))


@pytest.mark.parametrize("text", ["2.0", "median", "{median_times: 0.1}"])
def test_a_row_replaces_the_bandwidth_of_the_file_in_any_form(load: Any, text: str) -> None:
    for of_file in ("5.0", "median", "{median_times: 3.0}"):
        rows = ROWS.replace("sigma: 1.0", f"sigma: 1.0, bandwidth: {of_file}")
        run = config.expand(load(rows.replace("- label: own", f"- {{label: own, method: {{bandwidth: {text}}}}}")))[-1]
        assert run.method.model_dump()["bandwidth"] == yaml.safe_load(text)
        assert load(config.resolved_yaml(run)) == run


@pytest.mark.parametrize("word", ["target.lr=0.7", "target.lr_relative=0.7"])
@pytest.mark.parametrize("unit", ["lr", "lr_relative"])
def test_the_command_line_wins_over_file_and_rows_in_the_other_unit_too(load: Any, word: str, unit: str) -> None:
    text = (
        f"name: x\nmethod: prompt_tuning\ndata: {{target_tasks: [mini_rte]}}\ntarget: {{{unit}: 0.3}}\n"
        "rows: [{label: a}, {label: b, target: {" + unit + ": 0.2}}]\n"
    )
    key = word.partition("=")[0].removeprefix("target.")
    for run in config.expand(load(text, word)):
        given = {name: value for name in ("lr", "lr_relative") if (value := getattr(run.target, name)) is not None}
        assert given == {key: 0.7}
    assert "is given beside" in refused(load, text, "target.lr=0.7", "target.lr_relative=0.7")


COMPARED = ROWS + "comparisons: ['vanilla_transfer:prompt_tuning', 'own:vanilla_transfer@mini_rte']\n"


def test_comparisons_belong_to_the_table_and_change_no_run(load: Any) -> None:
    loaded = load(COMPARED)
    assert loaded.comparisons == ("vanilla_transfer:prompt_tuning", "own:vanilla_transfer@mini_rte")
    assert config.expand(loaded) == config.expand(load(ROWS))


@pytest.mark.parametrize(
    ("text", "says"),
    [(ROWS + "comparisons: ['vanila_transfer:own']", "comparisons[0]: vanila_transfer is no row of the table; rows are own, "),
     (ROWS + "comparisons: ['own/ensemble:own']", "comparisons[0]: own/ensemble is no row of the table; rows are "),
     (ROWS + "comparisons: ['own:own']", "comparisons[0]: compares own with itself; name two rows"),
     (ROWS + "comparisons: ['own:prompt_tuning@mini_sense']", "mini_sense is no target task of row own; it has mini_rte"),
     (ROWS + "comparisons: [own]", "'own' is no comparison of two rows; write FIRST:SECOND"),
     (SINGLE + "comparisons: ['own:single']", "comparisons: has no effect in a file without rows and seeds; remove it")],
)  # fmt: skip
def test_a_comparison_of_what_the_table_will_not_have_is_refused(load: Any, text: str, says: str) -> None:
    message = refused(load, text + "\n")
    assert says in message
    assert "c.yaml:" in message


def test_both_lines_of_a_row_that_predicts_both_ways_can_be_compared(load: Any) -> None:
    text = ROWS.replace("- label: own", "- label: own\n  evaluation: {predict: ensemble}")
    assert load(text + "comparisons: ['own/ensemble:own']\n").comparisons == ("own/ensemble:own",)
    text = text.replace("{predict: ensemble}", "{predict: best}")
    assert load(text + "comparisons: ['own/best:own']\n").comparisons == ("own/best:own",)


# --- resuming ----------------------------------------------------------------------------------------------------------


def test_the_resolved_text_reads_back_to_an_equal_value(load: Any) -> None:
    for text in (SINGLE, ROWS):
        for run in (load(text), *config.expand(load(text))):
            assert load(config.resolved_yaml(run)) == run


def test_another_backbone_drops_the_commit_of_the_one_in_the_file() -> None:
    shipped = Path(__file__).parents[3] / "configs" / "bpt" / "t5_base_6.yaml"
    assert config.load(shipped).backbone.revision is not None
    assert config.load(shipped, ["backbone=t5-small"]).backbone.revision is None
    assert config.load(shipped, ["backbone=t5-small", "revision=abc"]).backbone.revision == "abc"
