"""The shipped configurations are valid, documented for editors, and read without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_t5
import yaml
from transformers import AutoTokenizer

from bpt_dist import config
from bpt_dist.config.schema import SCHEMA, schema_text
from bpt_dist.data.tokens import tokenise
from bpt_dist.tasks.catalogue import GLUE_8, SOURCE_6, SOURCE_12, SUPER_GLUE_5, TASKS
from bpt_dist.tasks.text_to_text import Example

CONFIGS = SCHEMA.parent
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if "sweep" not in path.parts)
HEAVY = ("torch", "transformers", "datasets", "deepspeed", "ray", "mlflow", "peft", "numpy")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_configuration_is_valid_and_reads_back(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    for run in (loaded, *config.expand(loaded)):
        (tmp_path / "resolved.yaml").write_text(config.resolved_yaml(run))
        assert config.load(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_configuration_tells_editors_its_schema(path: Path) -> None:
    first, *_ = path.read_text().splitlines()
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("$schema=")[2]).resolve() == SCHEMA.resolve()
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))


def test_the_schema_is_current() -> None:
    assert SCHEMA.read_text() == schema_text(), "run: python -m bpt_dist.config.schema"


@pytest.mark.parametrize(
    "wrong",
    [{"figurs": True}, {"seed": "x"}, {"source": {"stepz": 1}}, {"method": {"name": "bptt"}}, {"method": "bptt"},
     {"method": {"name": "bpt", "num_partcles": 1}}, {"target": {"schedule": "cosine"}},
     {"distribution": {"mesh": {"particle": 0}}}],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses_what_editors_should_underline(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"method": "bpt", **wrong}, json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [({"name": "bpt", "num_partcles": 1}, ["method"], "num_partcles"), ({"name": "bpt", "sigma": "x"}, ["method", "sigma"], "'x'"),
     ("bptt", ["method"], "'bptt' is not one of"), ({"name": "bptt"}, ["method", "name"], "'bptt' is not one of"),
     ({"length": 3}, ["method"], "'name' is a required property")],
)  # fmt: skip
def test_editors_name_the_wrong_option_of_the_method_that_is_meant(method: Any, path: list[str], words: str) -> None:
    schema = json.loads(SCHEMA.read_text())
    (error,) = jsonschema.Draft202012Validator(schema).iter_errors({"method": method})
    assert list(error.absolute_path) == path
    assert words in error.message


def test_the_published_comparison_has_its_tasks() -> None:
    six = config.load(CONFIGS / "bpt" / "t5_base_6.yaml")
    assert six.data.source_tasks == SOURCE_6
    assert six.data.target_tasks == (*GLUE_8, *SUPER_GLUE_5)
    assert six.data.root is None
    twelve = config.load(CONFIGS / "bpt" / "t5_base_12_sampled.yaml")
    assert twelve.data.source_tasks == SOURCE_12
    assert twelve.source.tasks_per_step == 6
    assert config.load(CONFIGS / "multi_target" / "bpt_t5_base_6.yaml").target.joint


def test_methods_are_compared_under_one_protocol() -> None:
    """Each method's own file and the BPT one differ in the method, its learning rates and source stage, in nothing else."""
    reference = config.load(CONFIGS / "bpt" / "t5_base_6.yaml")
    free = ("name", "method.", "source.", "data.source_tasks", "target.lr", "target.weight_decay")
    folders = sorted({path.parent.name for path in CONFIGS.glob("*/t5_base.yaml")} - {"table"})
    assert {*folders, "bpt"} == set(config.method_names())
    for folder in folders:
        changed = config.changed_keys(reference, config.load(CONFIGS / folder / "t5_base.yaml"))
        assert [key for key in changed if not key.startswith(free)] == []


@pytest.mark.parametrize("path", [path for path in SHIPPED if "t5_" in path.name], ids=lambda path: str(path.relative_to(CONFIGS)))
def test_target_stages_on_t5_clip_gradients_as_every_cited_code_does(path: Path) -> None:
    """ATTEMPT and Compacter (Hugging Face Trainer), MPT's code base, DePT, HyperFormer, HyperDecoder: at 1.0."""
    assert {run.target.clip for run in config.expand(config.load(path))} == {1.0}


def test_adapters_of_several_targets_are_the_published_ones() -> None:
    """One adapter a target with shared layer norms: HyperFormer's configs/adapter_dagger.json."""
    files = ("multi_target/adapters_t5_base.yaml", "table/t5_base_multi_target.yaml", "table/mini_multi_target.yaml")
    runs = [run for file in files for run in config.expand(config.load(CONFIGS / file)) if run.method.name == "adapters"]
    assert len(runs) == 3 * len(files)  # of three seeds each
    assert not any(run.method.model_dump()["shared"] for run in runs)


def test_dept_trains_without_the_weight_decay_its_code_does_not_apply() -> None:
    for file in ("dept/t5_base.yaml", "table/t5_base.yaml"):
        runs = [run for run in config.expand(config.load(CONFIGS / file)) if run.method.name == "dept"]
        assert {run.target.weight_decay for run in runs} == {0.0}


@pytest.mark.parametrize(("task", "tokens"), [("multirc", 348), ("mnli", 256)])
def test_texts_are_cut_where_the_published_protocol_cuts_them(task: str, tokens: int, tmp_path: Path) -> None:
    """DePT, ATTEMPT: 256 tokens, MultiRC 348. A limit set for a whole file takes the place of every task's own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5.make(tmp_path))
    long = [Example("cat " * 2000, TASKS[task].words("fixed")[0], "train:1")]
    for path in (path for path in SHIPPED if "t5_" in path.name):
        for limit in {run.data.max_source_length for run in config.expand(config.load(path))}:
            (ids,) = tokenise(TASKS[task], long, tokenizer, limit).source_ids
            assert len(ids) == tokens, path


def test_partition_settings_are_those_measured() -> None:
    settings = json.loads((CONFIGS / "deepspeed" / "zero3_inference.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert "optimizer" not in settings


PROGRAM = """
import sys
from pathlib import Path
from bpt_dist import config
from bpt_dist.errors import ConfigError
try:
    config.expand(config.load(Path(sys.argv[1]), sys.argv[2:]))
except ConfigError as error:
    print(error)
print([name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize("words", [[], ["sigm=3", "target.stepz=1"]], ids=["right", "wrong"])
def test_a_configuration_is_judged_without_torch(words: list[str]) -> None:
    command = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), str(CONFIGS / "quickstart.yaml"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *problems, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert len(problems) == len(words)
