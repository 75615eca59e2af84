"""What the documents name exists: files, modules, links, and the names behind `where to find things`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bpt_dist

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bpt_dist").rglob("*.md")])
PACKAGES = sorted(path.stem for path in (ROOT / "bpt_dist").iterdir() if path.name[0] not in "_." and path.name != "py.typed")
# Where a path in a document may start: pages name modules from the package on.
BASES = (ROOT, ROOT / "bpt_dist", ROOT / "docs")
FOLDERS = ("bpt_dist", "configs", "docs", "launcher", "tests", *PACKAGES)
# Examples of the reader's own files, and files that a run or a user makes.
EXAMPLES = {
    "bpt_dist/methods/residual_prompt.py",
    "residual_prompt.py",
    "method/residual_prompt.py",
    "my_method.py",
    "invent.py",
    "ask.py",
    "card.py",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def paths(page: Path) -> set[str]:
    """Return the paths of Python files, and of anything below a folder of the repository, that a page names.

    `ATTEMPT:attempt/data/tasks.py` is a file of another repository.
    """
    text = re.sub(r"\]\([^)]*\)|https?://\S+|`[A-Za-z]+:[\w./+-]+", " ", page.read_text())
    found = set(re.findall(r"(?<![\w/.*…])[\w./-]*\w\.py\b", text))
    found |= set(re.findall(rf"(?<![\w/.*…])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w", text))
    return {path for path in found if path not in EXAMPLES}


def exists(path: str, page: Path) -> bool:
    """Return whether a path exists from one of the BASES or from the page on; a file name alone may be in any folder."""
    if "/" not in path and any(any((ROOT / folder).rglob(path)) for folder in ("bpt_dist", "launcher", "tests")):
        return True
    return any(any(base.glob(path)) if "*" in path else (base / path).exists() for base in (*BASES, page.parent))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    missing = sorted(path for path in paths(page) if not exists(path, page))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    modules = re.findall(r"\bbpt_dist(?:\.[a-z_0-9]+)+", page.read_text())
    of_library = {f"bpt_dist.{name}" for name in bpt_dist.__all__}
    files = [ROOT / module.replace(".", "/") for module in modules if module not in of_library]
    assert [file for file in files if not file.is_dir() and not file.with_suffix(".py").exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, link


def test_the_page_of_the_architecture_explains_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package in [*PACKAGES, "launcher"]:
        row = f"| `{package}.py` |" if (ROOT / "bpt_dist" / f"{package}.py").exists() else f"| `{package}/` |"
        assert text.count(row) == 1, row


def test_things_are_where_the_page_of_the_architecture_finds_them() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    places = re.findall(r"^\| [^|]+ \| `(bpt_dist/[\w/]+\.py)` \| `(\w+)` \|$", text, flags=re.MULTILINE)
    assert len(places) > 20
    for file, defined in places:
        assert defined in top_level_names(ROOT / file), f"{file} defines no {defined}"


def top_level_names(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def test_the_page_of_keys_is_as_new_as_the_settings() -> None:
    command = [sys.executable, "docs/configuration.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, "run `make schema`" + checked.stderr


def test_the_messages_of_the_page_of_messages_are_ours() -> None:
    """A message is found by its text, so the page must have the text; `…` stands for what differs."""
    sources = [path.read_text() for folder in ("bpt_dist", "launcher") for path in sorted((ROOT / folder).rglob("*.py"))]
    # Long texts are written as several literals, and names and numbers are put in by braces.
    code = re.sub(r"\{[^{}\n]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources)))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [row.split("` |")[0].removeprefix("| `") for row in page.splitlines() if row.startswith("| `")]
    assert len(messages) > 20
    missing = [text for text in messages if not all(part.strip() in code for part in text.split("…") if len(part.strip()) > 1)]
    assert missing == []
