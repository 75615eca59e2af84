"""Plain words: comments, docstrings, messages and pages use none of the words that readers of other languages stumble over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "bpt_dist").rglob("*.py"), *(ROOT / "launcher").rglob("*.py")])
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bpt_dist").rglob("*.md")])
# Word -> what to write instead.
PLAINER = {
    "mend": "fix", "mends": "fixes", "mended": "fixed", "anew": "again", "lest": "so that ... not", "whoever": "anybody who",
    "henceforth": "from now on", "in parts": "sharded", "stands in": "replaces", "say so": "name what is meant",
}  # fmt: skip
PATTERN = re.compile(r"\b(" + "|".join(PLAINER).replace(" ", r"\s+") + r")\b", re.IGNORECASE)
ALLOWED: set[tuple[str, str]] = set()  # (file, word), where a word is meant as such


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the comments and the strings of a file with their lines; code does not count."""
    source = path.read_text()
    if path.suffix != ".py":
        yield 1, source
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def problems(path: Path, root: Path = ROOT) -> list[str]:
    name = path.relative_to(root).as_posix()
    return [
        f"{name}:{line + text[: match.start()].count(chr(10))}: {match[0]!r}, write {PLAINER[' '.join(match[0].lower().split())]}"
        for line, text in texts(path)
        for match in PATTERN.finditer(text)
        if (name, match[0].lower()) not in ALLOWED
    ]


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts_use_plain_words(path: Path) -> None:
    assert problems(path) == []


def test_a_word_is_found_in_comments_docstrings_and_messages_only(tmp_path) -> None:
    file = tmp_path / "file.py"
    file.write_text('"""Written\nanew."""\nmend = [x for x in parts]  # lest it\nraise E(f"{mend}: mend it, and say\\nso")\n')
    words = {"file.py:2: 'anew'", "file.py:3: 'lest'", "file.py:4: 'mend'"}
    assert {problem.split(",")[0] for problem in problems(file, tmp_path)} >= words
    assert len(problems(file, tmp_path)) == 4
