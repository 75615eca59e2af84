"""Every way to get a configuration file wrong is refused, with the key, its line and, for a typo, the right name."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import annotated_types
import pytest
import yaml
from omegaconf import OmegaConf

from bpt_dist import config
from bpt_dist.config.keys import fields_by_key, leaves, section_of, takes_value
from bpt_dist.errors import ConfigError

RIGHT: dict[str, Any] = {
    "name": "right",
    "method": {"name": "bpt", "sigma": 1.0},
    "data": {"source_tasks": ["mini_nli", "mini_span"], "target_tasks": ["mini_rte"]},
    "source": {"steps": 40, "lr": 0.3},
    "target": {"steps": 40},
}


def text_of(tree: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(tree))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """RIGHT with every default written out, less the keys that turn one run into several."""
    path = tmp_path_factory.mktemp("right") / "right.yaml"
    path.write_text(text_of(RIGHT))
    return config.load(path).model_dump(mode="json", exclude={"rows", "seeds"})


FIELDS = {
    key: field
    for key, field in fields_by_key(config.method_options("bpt")).items()
    if takes_value(field)
    and key not in ("rows", "seeds", "distribution.mesh.particle", "distribution.mesh.data", "method.bandwidth.median_times")
}
LEAVES = sorted(FIELDS)


def refusal(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    return str(caught.value).splitlines()


def with_value(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    *sections, last = key.split(".")
    section = changed
    for name in sections:
        section = section[name]
    section[last] = value
    return changed


def renamed(tree: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    *sections, last = key.split(".")
    section = changed
    for part in sections:
        section = section[part]
    section[name] = section.pop(last)
    return changed


def assert_names(lines: list[str], key: str, text: str) -> None:
    """One line names the key, and the file line it gives holds the last part of the key."""
    naming = [line for line in lines if f": {key}: " in line or f": {key}[" in line]
    assert naming, lines
    place = int(naming[0].split(":")[1])
    assert key.rpartition(".")[2] in text.splitlines()[place - 1], (naming[0], text.splitlines()[place - 1])


def typos(word: str) -> set[str]:
    """A letter lost, swapped with the next, or mistaken: the slips of the hand."""
    rng = random.Random(word)
    at = rng.randrange(1, len(word))
    swapped = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    slips = {word[:at] + word[at + 1 :], swapped, word[:at] + "x" + word[at + 1 :]}
    return slips - {word}


def test_every_typo_is_refused_and_nine_in_ten_are_understood(tmp_path: Path, full: dict[str, Any]) -> None:
    siblings = {key.rpartition(".")[2] for key in LEAVES}
    tried = understood = 0
    for key in LEAVES:
        section, _, last = key.rpartition(".")
        for typo in typos(last) - siblings:
            text = text_of(renamed(full, key, typo))
            lines = refusal(tmp_path, text)
            assert_names(lines, f"{section}.{typo}".lstrip("."), text)
            tried += 1
            understood += any(f"did you mean {last}?" in line for line in lines)
    assert tried >= 150
    assert understood >= 0.9 * tried


@pytest.mark.parametrize("key", LEAVES)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, full: dict[str, Any], key: str) -> None:
    text = text_of(with_value(full, key, {"surprise": ["wrong"]}))
    lines = refusal(tmp_path, text)
    assert any(f": {key}" in line for line in lines), lines


NUMBERS = [key for key in LEAVES if any(word in str(FIELDS[key].annotation) for word in ("int", "float"))]
NUMBERS = [key for key in NUMBERS if "dict" not in str(FIELDS[key].annotation) and section_of(FIELDS[key], None) is None]


@pytest.mark.parametrize("value", ["5k", "10%", "1_000 steps", "five", "true", [1], {"a": 1}], ids=str)
def test_a_number_with_a_unit_or_a_text_is_no_number(tmp_path: Path, full: dict[str, Any], value: Any) -> None:
    assert len(NUMBERS) > 30
    for key in NUMBERS:
        text = text_of(with_value(full, key, value))
        assert_names(refusal(tmp_path, text), key, text)


def out_of_range(key: str) -> list[float]:
    """Values just outside the declared range of a key, of its own type."""
    step = 1 if "int" in str(FIELDS[key].annotation) else 1e-9
    outside = []
    for bound in FIELDS[key].metadata:
        if isinstance(bound, annotated_types.Ge):
            outside.append(bound.ge - step)
        elif isinstance(bound, annotated_types.Gt):
            outside.append(bound.gt)
        elif isinstance(bound, annotated_types.Le):
            outside.append(bound.le + step)
        elif isinstance(bound, annotated_types.Lt):
            outside.append(bound.lt)
    return outside


def test_numbers_out_of_range_are_refused(tmp_path: Path, full: dict[str, Any]) -> None:
    tried = 0
    for key in NUMBERS:
        for value in out_of_range(key):
            text = text_of(with_value(full, key, value))
            assert_names(refusal(tmp_path, text), key, text)
            tried += 1
    assert tried >= 30


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_are_finite(tmp_path: Path, full: dict[str, Any], value: str) -> None:
    for key in ("method.sigma", "source.lr", "method.bandwidth", "source.likelihood_scale"):
        text = text_of(with_value(full, key, "HERE")).replace("HERE", value)
        assert_names(refusal(tmp_path, text), key, text)


def test_one_particle_is_no_ensemble(tmp_path: Path, full: dict[str, Any]) -> None:
    text = text_of(with_value(with_value(full, "method.num_particles", 1), "evaluation.predict", "ensemble"))
    (problem,) = refusal(tmp_path, text)
    assert "evaluation.predict: ensemble needs two particles, method.num_particles is 1" in problem
    (problem,) = refusal(tmp_path, text.replace("ensemble", "best"))
    assert "evaluation.predict: best needs two particles, method.num_particles is 1" in problem


CROSS_FIELD = [
    # key to change, value, key that must be named, words of the refusal
    ("method", {"name": "bpt"}, "method.sigma", "is missing"),
    ("method", {"name": "bpt", "prior": "none", "sigma": 1.0}, "method.sigma", "no effect with prior none"),
    ("method", {"name": "bpt", "sigma": 1.0, "sigma_relative": 1.0}, "method.sigma", "beside sigma_relative"),
    (
        "method",
        {"name": "bpt", "sigma": 1.0, "lr_full": 0.3, "lr_full_relative": 0.1},
        "method.lr_full",
        "is given beside lr_full_relative (got 0.3 and 0.1); set one of them to null",
    ),
    (
        "method",
        {"name": "bpt", "sigma": 1.0, "start": "ensemble"},
        "method.start",
        "should be 'mean' or 'best' (got 'ensemble'); evaluation.predict: ensemble starts from every particle",
    ),
    ("method", {"name": "bpt", "sigma": 1.0, "start": "first"}, "method.start", "should be 'mean' or 'best' (got 'first')"),
    ("method", {"name": "bpt", "sigma": 1.0, "start": "best", "num_particles": 1}, "method.start", "with num_particles 1"),
    ("method", {"name": "bpt", "sigma": 1.0, "lr_full": None}, "method.lr_full", "give lr_full or lr_full_relative"),
    ("method", {"name": "bpt", "sigma": 1.0, "bandwidth": 0}, "method.bandwidth", "greater than 0 or 'median' (got 0)"),
    ("method", {"name": "bpt", "sigma": 1.0, "bandwidth": "mean"}, "method.bandwidth", "a valid number or 'median' (got 'mean')"),
    (
        "method",
        {"name": "bpt", "sigma": 1.0, "bandwidth": {"median_times": 0}},
        "method.bandwidth.median_times",
        "should be greater than 0 (got 0)",
    ),
    (
        "method",
        {"name": "bpt", "sigma": 1.0, "bandwidth": {"median_time": 2}},
        "method.bandwidth.median_time",
        "did you mean median_times?",
    ),
    ("method", {"name": "bpt", "sigma": 1.0, "init": "text"}, "method.init_text", "is missing"),
    ("method", {"name": "bpt", "sigma": 1.0, "init_text": "x"}, "method.init_text", "no effect with init vocabulary"),
    ("method", {"name": "bpt", "sigma": 1.0, "rank": 0, "lr_low_rank": 0.1}, "method.lr_low_rank", "with rank 0"),
    ("method", {"name": "bpt", "sigma": 1.0, "particle_init": "independent", "spread": 0.1}, "method.spread", "no effect"),
    ("method", {"name": "bptt"}, "method.name", "did you mean bpt?"),
    ("method", {"name": "base"}, "method.name", "no such method"),
    ("method", {"name": "../bpt"}, "method.name", "no such method"),
    ("method", {"name": "os"}, "method.name", "no such method"),
    ("method", {"sigma": 1.0}, "method.name", "is missing"),
    ("method", 3, "method", "should be a name or a section"),
    ("data.source_tasks", [], "data.source_tasks", "is empty"),
    ("data.target_tasks", [], "data.target_tasks", "is empty"),
    ("data.target_tasks", ["mini_rte", "mini_rte"], "data.target_tasks", "more than once"),
    ("data.target_tasks", ["mini_rt"], "data.target_tasks[0]", "did you mean mini_rte?"),
    ("data.target_tasks", ["../mini_rte"], "data.target_tasks[0]", "a-z 0-9"),
    ("data.target_tasks", "mini_rte", "data.target_tasks", "should be a list"),
    ("source.steps", 0, "source.steps", "set steps or source.posterior"),
    ("source.lr", None, "source.lr", "is missing"),
    ("source.lr_relative", 0.1, "source.lr", "is given beside lr_relative (got 0.3 and 0.1); set one of them to null"),
    ("target.lr_relative", 0.1, "target.lr_relative", "names its own rates"),
    ("source.tasks_per_step", 3, "source.tasks_per_step", "exceeds the 2 source tasks"),
    ("source.task_weights", {"mini_rte": 2.0}, "source.task_weights.mini_rte", "not among data.source_tasks"),
    ("source.task_weights", {"mini_nli": -2.0}, "source.task_weights.mini_nli", "greater than 0"),
    ("source.annealing", "tanh", "source.annealing_steps", "is missing"),
    ("source.annealing_steps", 5, "source.annealing_steps", "no effect with annealing none"),
    ("backbone.attention", "flex_attention", "backbone.attention", "wrong; use auto, eager or sdpa"),
    ("target.lr", 0.3, "target.lr", "names its own rates"),
    ("target.patience", 3, "target.patience", "needs target.eval_every"),
    ("evaluation.num_samples", 4, "evaluation.num_samples", "no effect with predict map"),
    ("evaluation", {"decode": "rank", "max_new_tokens": 4}, "evaluation.max_new_tokens", "no effect with decode rank"),
    ("evaluation.splits", [], "evaluation.splits", "at least 1 item"),
    ("evaluation.splits", ["train"], "evaluation.splits[0]", "'validation' or 'test'"),
    ("backbone", {"path": "mini", "revision": "abc"}, "backbone.revision", "not a hub id"),
    ("distribution.mesh", {"particle": 2, "data": 1}, "distribution.mesh.particle", "use one of 1, 5"),
    ("distribution.mesh", {"particle": 5}, "distribution.mesh.data", "is missing"),
    ("distribution.mesh", "particle", "distribution.mesh", "'auto'"),
    ("distribution", {"mesh": {"particle": 5, "data": 1}, "expect_world_size": 4}, "distribution.expect_world_size", "5 ranks"),
    ("tracking.uri", "http://tracker.example.org:5000", "tracking.uri", "plain http to another host"),
    ("tracking.uri", "http://0.0.0.0:5000", "tracking.uri", "plain http to another host"),
    ("tracking.uri", "sqlite:///mlflow.db", "tracking.uri", "absolute path"),
    ("tracking.uri", "file:///tmp/mlruns", "tracking.uri", "neither sqlite nor http"),
    ("tracking.uri", "https://me:secret@tracker.example.org", "tracking.uri", "holds credentials"),
    ("tracking", {"mlflow": False, "experiment": "x"}, "tracking.experiment", "no effect with mlflow false"),
    ("name", "../elsewhere", "name", "a-z 0-9"),
    ("name", "A b", "name", "a-z 0-9"),
    ("name", "x" * 65, "name", "64 characters"),
    ("seed", True, "seed", "valid integer"),
    ("seeds", [1, 1], "seeds", "lists a seed twice"),
    ("seeds", [], "seeds", "at least 1 item"),
    ("rows", [{"method": "prompt_tuning", "target": {"lr": 0.3}, "name": "x"}], "rows[0].name", "belongs to the whole file"),
    ("rows", [{"seeds": [0, 0]}], "rows[0].seeds", "lists a seed twice"),
    ("rows", [{"seeds": 3}], "rows[0].seeds", "is no list of whole numbers from 0 (got 3)"),
    ("rows", [{"seeds": [-1]}], "rows[0].seeds", "is no list of whole numbers from 0"),
    ("rows", [{"seeds": []}], "rows[0].seeds", "is no list of whole numbers from 0"),
    ("rows", [{}, {}], "rows", "several rows are named 'bpt-s0'"),
    ("rows", [{"label": "../x"}], "rows[0].label", "a-z 0-9"),
    ("rows", [{"target": {"stepz": 3}}], "rows[0].target.stepz", "did you mean steps?"),
    ("rows", [{"method": "prompt_tuning"}], "target.lr", "is missing"),
    ("rows", [{"method": "bptt"}], "rows[0].method.name", "did you mean bpt?"),
    ("rows", ["prompt_tuning"], "rows[0]", "should be a mapping"),
]


@pytest.mark.parametrize(("key", "value", "named", "words"), CROSS_FIELD, ids=lambda part: str(part)[:40])
def test_what_keys_say_about_each_other(tmp_path: Path, key: str, value: Any, named: str, words: str) -> None:
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(RIGHT))  # type: ignore[assignment]
    OmegaConf.update(merged := OmegaConf.create(tree), key, value, merge=False, force_add=True)
    lines = refusal(tmp_path, OmegaConf.to_yaml(merged))
    assert any(f": {named}: " in line and words in line for line in lines), lines


def test_secrets_are_not_repeated(tmp_path: Path) -> None:
    lines = refusal(tmp_path, text_of({**RIGHT, "tracking": {"uri": "https://me:canary@host"}}))
    assert "canary" not in "\n".join(lines)


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path,
        "name: Bad Name\n"
        "method: {name: bpt, num_partcles: 4, sigma: 0.1}\n"
        "data: {source_tasks: [mini_nli], target_tasks: [mini_rte]}\n"
        "source: {steps: 5k, tasks_per_step: 3, lr: 0.3}\n"
        "target: {steps: 10, patience: 3}\n"
        "seed: 1\n"
        "seed: 2\n"
        "seeds: [1, 1]\n"
        "figurs: true\n",
    )
    numbers = [int(line.split(":")[1]) for line in lines]
    assert numbers == sorted(numbers)
    keys = [line.split(": ")[1] for line in lines]
    assert keys == [
        "name", "method.num_partcles", "source.steps", "source.tasks_per_step", "target.patience",
        "seed", "seed", "seeds", "figurs",
    ]  # fmt: skip


def test_a_broken_key_causes_no_further_complaints(tmp_path: Path) -> None:
    broken = copy.deepcopy(RIGHT)
    broken["data"]["source_task"] = broken["data"].pop("source_tasks")
    broken["method"]["name"] = "btp"
    lines = refusal(tmp_path, text_of(broken))
    assert [line.split(": ")[1] for line in lines] == ["method.name", "data.source_task"]


def test_leaves_of_a_dump_are_the_fields(full: dict[str, Any]) -> None:
    assert set(leaves(full)) == set(LEAVES)


@pytest.mark.parametrize(
    ("output", "tracking", "refused"),
    [
        ("/tmp/what?", {}, True),
        ("/tmp/what?", {"mlflow": False}, False),
        ("/tmp/what?", {"uri": "sqlite:////tmp/x.db"}, False),
        ("/tmp/a b#c%20é", {}, False),
    ],
)
def test_a_folder_that_no_address_of_the_store_can_name_is_refused_first(
    tmp_path: Path, output: str, tracking: dict[str, Any], refused: bool
) -> None:
    plain = {"method": "prompt_tuning", "output": output, "tracking": tracking, "target": {"steps": 1, "lr": 0.3}}
    plain["data"] = {"target_tasks": ["rte"]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain))
    if refused:
        with pytest.raises(ConfigError, match=r"config.yaml:5: output: .*contains '\?'"):
            config.load(file)
    else:
        assert config.load(file).output == Path(output)


@pytest.mark.parametrize("path", ["a\nb", "a\x00b", "a\x1b[31m"])
def test_a_path_with_a_control_character_is_refused(tmp_path: Path, path: str) -> None:
    plain = {"method": "prompt_tuning", "output": path, "target": {"steps": 1, "lr": 0.3}, "data": {"target_tasks": ["rte"]}}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match="contains a control character"):
        config.load(file)


def test_a_tilde_without_a_home_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    file = tmp_path / "config.yaml"
    file.write_text("method: prompt_tuning\noutput: ~/runs\ntarget: {steps: 1, lr: 0.3}\ndata: {target_tasks: [rte]}\n")
    with pytest.raises(ConfigError, match="write the whole path, or set HOME"):
        config.load(file)
