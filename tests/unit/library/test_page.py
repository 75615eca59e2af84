"""The page of the library is a program: its blocks run one after another, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import bpt_dist.library.training  # noqa: F401  # what the page is about

PAGE = Path(__file__).parents[3] / "docs" / "library.md"


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*label names.*")  # of Trainer on a CPU
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    blocks = [(text[: found.start()].count("\n") + 2, found[1]) for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) >= 8
    names: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks:
        exec(compile("\n" * (line - 1) + block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "<Run 'first'" in printed
    assert "mini\\_review" in printed
    assert "<Prompt [10, 96]" in printed
