"""`quick:` is a smaller version of a table in the same file: only `--quick` uses it, and it is checked with the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bpt_dist import config
from bpt_dist.errors import ConfigError

SHIPPED = Path(__file__).parents[3] / "configs" / "table" / "smollm2.yaml"
TABLE = """\
name: big
method: {name: bpt, length: 10, sigma: 1.0}
data: {source_tasks: [mini_nli, mini_span], target_tasks: [mini_rte, mini_sense]}
source: {steps: 40, lr: 0.1}
target: {steps: 40}
rows:
- method: {name: vanilla_transfer, length: 10}
  target: {lr: 0.3}
- label: own
seeds: [0, 7]
comparisons: ['own:vanilla_transfer']
"""
QUICK = TABLE + "quick: {source: {steps: 4, lr_relative: 0.2}, data: {target_tasks: [mini_rte]}, seeds: [1], method: {length: 5}}\n"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_text(text: str, *words: str, quick: bool = False) -> config.RunConfig:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return config.load(path, words, quick=quick)

    return load_text


def refused(load: Any, text: str, *words: str, quick: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *words, quick=quick)
    return str(caught.value)


def test_the_whole_table_does_not_know_of_it(load: Any) -> None:
    with_section, without = load(QUICK), load(TABLE)
    assert config.expand(with_section) == config.expand(without)
    assert {key for key in config.changed_keys(with_section, without) if not key.startswith("quick")} == set()


def test_the_smaller_version_has_its_keys_its_folder_and_all_else_of_the_file(load: Any) -> None:
    smaller = load(QUICK, quick=True)
    assert (smaller.name, smaller.seeds, smaller.quick) == ("big-quick", (1,), None)
    assert (smaller.source.steps, smaller.source.lr, smaller.source.lr_relative) == (4, None, 0.2)
    assert smaller.data.target_tasks == ("mini_rte",)
    assert smaller.data.source_tasks == ("mini_nli", "mini_span")
    assert smaller.comparisons == ("own:vanilla_transfer",)
    first, second = config.expand(smaller)
    assert (first.method.model_dump()["length"], second.method.model_dump()["length"]) == (10, 5)
    assert first.directory == Path("runs/big-quick/vanilla_transfer-s1")


def test_it_may_have_rows_and_a_name_of_its_own(load: Any) -> None:
    text = TABLE + "quick: {name: small, rows: [{label: only}], comparisons: []}\n"
    assert [run.name for run in config.expand(load(text, quick=True))] == ["only-s0", "only-s7"]
    assert load(text, quick=True).directory == Path("runs/small")


def test_the_command_line_wins(load: Any) -> None:
    smaller = load(QUICK, "source.steps=3", "name=mine", quick=True)
    assert (smaller.source.steps, smaller.name) == (3, "mine")


@pytest.mark.parametrize(
    ("section", "words"),
    [("quick: {source: {stepz: 4}}", ":12: quick.source.stepz: unknown key; did you mean steps?"),
     ("quick: {data: {target_tasks: [mini_rtee]}}", ":12: quick.data.target_tasks[0]: no such task (got 'mini_rtee')"),
     ("quick: {quick: {seed: 1}}", ":12: quick.quick: has no effect inside itself; remove it"),
     ("quick: 3", ":12: quick: should be a mapping (got 3)"),
     ("quick: {comparisons: ['own:other']}", "quick.comparisons[0]: other is no row of the table; ")],
)  # fmt: skip
def test_what_is_wrong_in_it_is_said_whenever_the_file_is_read(load: Any, section: str, words: str) -> None:
    assert words in refused(load, f"{TABLE}{section}\n")


def test_a_file_without_it_has_no_smaller_version(load: Any) -> None:
    line = ":1: quick: is missing, so the file has no smaller version; add the section or leave out --quick"
    assert refused(load, TABLE, quick=True).endswith(line)


def test_a_single_run_has_none(load: Any) -> None:
    single = TABLE[: TABLE.index("rows:")] + "quick: {source: {steps: 1}}\n"
    assert "quick: has no effect in a file without rows and seeds; remove it" in refused(load, single)


def test_rows_cannot_have_one(load: Any) -> None:
    assert "rows[1].quick: belongs to the whole file" in refused(
        load, TABLE.replace("label: own", "label: own\n  quick: {seed: 1}")
    )


def test_the_shipped_one_is_a_part_of_its_table() -> None:
    whole, smaller = config.load(SHIPPED), config.load(SHIPPED, quick=True)
    assert set(smaller.data.target_tasks) < set(whole.data.target_tasks)
    assert len(config.expand(smaller)) == 3
    assert len(config.expand(whole)) == 30
