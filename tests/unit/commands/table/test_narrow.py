"""Tables on their side fit the width they are given and say what the wide table says; experiments and errors have their place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from result_folders import build, entry, grid, write_run

from bpt_dist.artifacts.results import collect
from bpt_dist.commands.main import main
from bpt_dist.commands.table.narrow import WIDTH
from bpt_dist.commands.table.table import Table
from bpt_dist.errors import DataError

METHODS = ("fine_tuning", "adapters", "lora", "prompt_tuning", "spot", "attempt", "mpt", "hyperformer", "bpt")
TASKS = ("mini_review", "mini_rte", "mini_duplicate", "mini_agreement")


def several(root: Path, methods: tuple[str, ...] = METHODS, seeds: int = 2) -> Path:
    for number, method in enumerate(methods):
        for seed in range(seeds):
            entries = [
                entry(method=method, seed=seed, task=task, stage=f"target/{task}", metric=metric, headline=metric == "accuracy",
                      value=value + number + seed, majority=50.0 if metric == "accuracy" else None)
                for task in TASKS
                for metric, value in (("accuracy", 70.0), ("nll", 0.5), ("calibration_error", 5.0))
            ]  # fmt: skip
            write_run(root, entries)
    return root


def test_tasks_as_rows_fit_eighty_columns_and_hold_every_cell(tmp_path: Path) -> None:
    table = build(several(tmp_path))
    text = table.to_narrow(WIDTH)
    assert max(map(len, text.splitlines())) <= WIDTH
    found: dict[str, dict[str, str]] = {}
    for part in re.findall(r"^\|  +\|.*\n(?:\|.*\n)+", text, re.MULTILINE):
        names, _, *rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in part.splitlines()]
        for task, *cells in rows:
            for name, cell in zip(names[1:], cells, strict=True):
                found.setdefault(name, {})[task] = cell
    wide = table.sheets()[0]
    rows = {row[0].text: row[1:] for block in wide.blocks for row in block.rows}
    assert found.keys() == rows.keys()
    for name, cells in rows.items():
        shown = [f"**{cell.text}**" if cell.bold else cell.text for cell in cells]
        assert found[name] == dict(zip(wide.header[1:], shown, strict=True)), name
    assert text.count("mean ± sample standard deviation") == 1, "the notes are there once"


def test_a_column_that_is_too_wide_alone_is_printed_all_the_same(tmp_path: Path) -> None:
    text = build(several(tmp_path, ("bpt", "lora"))).to_narrow(10)
    assert "BPT" in text
    assert "LoRA" in text


def test_errors_are_shown_where_asked_for_and_the_lower_is_the_better(tmp_path: Path) -> None:
    for method, value in (("bpt", 0.25), ("lora", 0.75)):
        for seed in range(3):
            write_run(tmp_path, [entry(method=method, seed=seed), entry(method=method, seed=seed, metric="nll", headline=False,
                                                                        value=value + seed / 1000)])  # fmt: skip
    table = build(tmp_path, metrics=["nll"])
    assert grid(table)["BPT"]["rte (NLL, nats)"] == "**0.251 ± 0.001**"
    assert grid(table)["LoRA"]["rte (NLL, nats)"] == "0.751 ± 0.001"
    assert "NLL in nats" in table.to_markdown()
    assert "NLL" not in build(tmp_path).to_markdown()
    with pytest.raises(DataError, match=r"metric 'nlll': no result on the test split has it; choose one of accuracy, nll"):
        build(tmp_path, metrics=["nlll"])


def test_one_method_of_two_experiments_has_two_rows(tmp_path: Path) -> None:
    several(tmp_path / "first", ("bpt", "lora"))
    several(tmp_path / "second", ("bpt",))
    table = build(tmp_path)
    assert [row.label for row in table.rows] == ["LoRA", "BPT [first]", "BPT [second]"]
    assert {row.num_seeds for row in table.rows} == {2}
    several(tmp_path / "deeper" / "first", ("bpt",))
    assert [row.label for row in build(tmp_path).rows if row.label.startswith("BPT")] == [
        "BPT [deeper/first]", "BPT [second]", f"BPT [{tmp_path.name}/first]"
    ]  # fmt: skip


def test_seeds_of_two_experiments_are_not_joined_in_one_row(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [entry(seed=0)])
    write_run(tmp_path / "b", [entry(seed=1)])
    assert [(row.label, row.num_seeds) for row in build(tmp_path).rows] == [("BPT [a]", 1), ("BPT [b]", 1)]


def test_a_page_is_a_whole_document(tmp_path: Path) -> None:
    page = build(several(tmp_path), published=True).to_page()
    assert page.startswith("\\documentclass")
    assert page.rstrip().endswith("\\end{document}")
    assert page.count("\\begin{table}") == page.count("\\end{table}") > 1
    assert "\\emph{}" not in page
    for line in page.splitlines():
        if line.endswith("\\\\") and "&" in line:
            assert len(line) < 250
    if shutil.which("pdflatex"):
        (tmp_path / "page.tex").write_text(page)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_the_command_writes_each_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several(tmp_path / "runs", ("bpt",))
    assert main(["table", str(tmp_path / "runs"), "--by", "task", "--metric", "nll", "--metric", "calibration_error"]) == 0
    out = capsys.readouterr().out
    assert "mini_rte (calibration error)" in out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert main(["table", str(tmp_path / "runs"), "--json"]) == 0
    found = collect([tmp_path / "runs"])
    assert json.loads(capsys.readouterr().out) == Table.build(found.results, notes=found.notes).to_json()
    assert main(["table", str(tmp_path / "runs"), "--format", "page"]) == 0
    assert capsys.readouterr().out.startswith("\\documentclass")
    assert main(["table", str(tmp_path / "runs"), "--format", "csv", "--by", "task"]) == 2
    assert "--by task" in capsys.readouterr().err
